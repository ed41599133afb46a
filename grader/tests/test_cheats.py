"""The table of cheats: that it can be read, and that what is not even built is as it states.

What has to be booted is tried by ``invoke prove --cheats``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from grader import cheats
from grader.cheats import Cheat, CheatError, Row
from grader.errors import UserError
from grader.lab import LABS, load_lab
from grader.progress import Progress
from kernel.build import Kernel

CHEATS = cheats.read()


def test_there_are_many_and_each_says_what_the_instructor_reads() -> None:
    assert len(CHEATS) >= 15
    for cheat in CHEATS:
        assert cheat.line and cheat.tries
        if cheat.verdict in ("no-build", "refused"):
            assert cheat.points == 0
    folders = {path.name for path in cheats.FOLDER.iterdir() if path.is_dir()}
    assert folders <= {cheat.id for cheat in CHEATS}


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.id)
def test_each_differs_from_what_it_starts_from(
    cheat: Cheat, kernel: Kernel, tmp_path: Path
) -> None:
    lab = load_lab(cheat.lab)
    path = cheats.write(cheat, lab, kernel, tmp_path)
    if path.is_dir():
        texts = {file.name: file.read_text() for file in path.iterdir()}
        assert set(lab.files) <= set(texts)
        assert not [name for name, text in texts.items() if "{address:" in text]


@pytest.mark.parametrize(
    "cheat",
    [cheat for cheat in CHEATS if cheat.verdict in ("no-build", "refused")],
    ids=lambda cheat: cheat.id,
)
def test_what_is_not_built_is_as_stated(cheat: Cheat, kernel: Kernel) -> None:
    row = cheats.judge(cheat, kernel, Progress(quiet=True))
    assert row.as_stated, row


def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    row = 'id = "a"\ntries = "b"\nlab = "c"\nverdict = "fail"\nline = "d"\npoints = 0\n'
    path = tmp_path / "cheats.toml"
    for text, problem in (
        ("[[cheat]]\n", "missing or unknown key"),
        (f'[[cheat]]\n{row}base = "other"\n', "neither solution nor starter"),
        (f'[[cheat]]\n{row}base = "starter"\nnew = 1\n', "unknown keys new"),
        (f'[[cheat]]\n{row}base = "starter"\n' * 2, "two cheats have one id"),
    ):
        path.write_text(text)
        with pytest.raises(CheatError, match=problem):
            cheats.read(path)


def test_an_edit_that_fits_nowhere_is_refused(kernel: Kernel, tmp_path: Path) -> None:
    cheat = next(cheat for cheat in CHEATS if cheat.edits)
    wrong = cheats.Edit(cheat.edits[0].file, "no such text", "")
    changed = Cheat(**{**vars(cheat), "edits": (wrong,)})
    with pytest.raises(CheatError, match=r"is not in the \w+ exactly once"):
        cheats.write(changed, load_lab(cheat.lab), kernel, tmp_path)


def test_some_can_be_chosen() -> None:
    assert [cheat.id for cheat in cheats.matching("1-batching", "answers")] == [
        "answers-in-the-kernel"
    ]
    assert cheats.matching("", "") == CHEATS
    with pytest.raises(UserError, match="no such cheat"):
        cheats.matching("2-partitioning", "answers")


def test_the_table_shows_what_differs() -> None:
    cheat = CHEATS[0]
    rows = [
        Row(cheat, cheat.verdict, cheat.points, f"because {cheat.line}"),
        Row(cheat, "pass", 100, "all is well"),
    ]
    assert [row.as_stated for row in rows] == [True, False]
    console = Console(width=200, record=True)
    console.print(cheats.table(rows))
    text = console.export_text()
    assert f"pass (not {cheat.verdict})" in text
    assert "100 (not 0)" in text


def test_the_folder_of_cheats_is_no_lab() -> None:
    assert not (LABS / "cheats" / "lab.toml").exists()
