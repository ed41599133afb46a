"""lab.toml: the real one is right, and each mistake in one is named."""

import re
from pathlib import Path

import pytest

from grader.errors import UserError
from grader.lab import LABS, LabError, known_labs, load_lab

REAL = (LABS / "1-batching" / "lab.toml").read_text()


@pytest.mark.parametrize("name", known_labs())
def test_the_real_labs(name: str) -> None:
    lab = load_lab(name)
    of_code = {
        "wire",
        "wire, and the debug kernel's reports by probe",
        "probe, confirmed by wire",
    }
    assert {check.evidence for check in lab.checks} == (of_code if lab.has_code else {"probe"})
    assert lab.max_score == 100
    assert lab.needs_debug_kernel == lab.has_code
    assert all(check.hint for check in lab.checks)


def test_the_lab_of_batching() -> None:
    lab = load_lab("1-batching")
    assert lab.kernel_files == ("mp_batch.c",)
    same = {check.id: check.load for check in lab.checks}
    assert same["wakeups-long"] == same["crossings-long"]


def test_a_check_alone_brings_the_one_that_is_measured_with_it() -> None:
    lab = load_lab("1-batching")
    assert [check.id for check in lab.only(["serve-one"]).checks] == ["serve-one"]
    alone = lab.only(["wakeups-long"])
    assert [check.id for check in alone.checks] == ["crossings-long", "wakeups-long"]
    assert set(alone.rubrics) == {"performance"}
    with pytest.raises(UserError, match="no check serve-two"):
        lab.only(["serve-one", "serve-two"])


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('id = "serve-long"', 'id = "serve-short"', "two checks are called serve-short"),
        ('metric = "wakeups"', 'metric = "luck"', "metric is none of"),
        ('same_run = "crossings-long"', 'same_run = "nothing"', "same_run names no earlier"),
        ("share = 0.60, points = 12", "share = 0.90, points = 12", "steps must increase"),
        ('check = "crossings-long"', 'check = "serve-one"', "is no reduction check"),
        ('rubric = "performance"', 'rubric = "beauty"', "there is no rubric beauty"),
        ("points = 6\n", "", "a serve check has points"),
        ('metric = "syscalls"', 'metric = "remote"', "one connection at a time"),
        (
            'metric = "syscalls"',
            'kills = 1\nmetric = "syscalls"',
            "no other points, debug or kills",
        ),
        ('kernel = ["mp_batch.c"]', 'kernel = ["other.c"]', "kernel lists a file"),
        ("title = ", "titel = ", "missing or unknown key"),
        ("[active]", "[active", "Expected"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in REAL
    folder = tmp_path / "1-batching"
    folder.mkdir()
    (folder / "lab.toml").write_text(REAL.replace(old, new, 1))
    with pytest.raises(LabError, match=re.escape(complaint)):
        load_lab("1-batching", tmp_path)


def test_an_unknown_lab_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        load_lab("7-magic")
    assert "1-batching" in caught.value.todo
