"""Grading again when a file is saved: what is waited for, and what is said."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from grader import checks, watch
from grader.errors import UserError
from grader.grade import Grade
from grader.lab import load_lab
from grader.setup import ROOT
from grader.tests.results import graded

LAB = load_lab("2-partitioning")


def grade(passed: Sequence[str]) -> Grade:
    results = [
        checks.served(check, 1) if check.id in passed else checks.failed(check, "fail", "no answer")
        for check in LAB.checks
    ]
    return graded(LAB, results)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.001)


def test_what_is_watched(tmp_path: Path) -> None:
    assert watch.watched(LAB, None) == (LAB.folder / "mp_partition.c",)
    assert watch.watched(LAB, tmp_path) == (tmp_path / "mp_partition.c",)
    archive = tmp_path / "submission.zip"
    assert watch.watched(LAB, archive) == (archive,)


def test_a_file_that_is_replaced_is_waited_for_until_it_is_there_again(tmp_path: Path) -> None:
    one, other = tmp_path / "one.c", tmp_path / "other.c"
    one.write_text("a")
    other.write_text("b")
    known = watch.contents([one, other])
    one.unlink()
    waiting = threading.Thread(target=watch.until_saved, args=(known,), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    one.write_text("c")
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_is_saved_as_it_was_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "one.c"
    path.write_text("a")
    waiting = threading.Thread(
        target=watch.until_saved, args=(watch.contents([path]),), daemon=True
    )
    waiting.start()
    path.write_text("a")
    waiting.join(0.05)
    assert waiting.is_alive()
    path.write_text("b")
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_has_changed_is_said() -> None:
    before, after = grade(["serve-short", "serve-rest"]), grade(["serve-short", "serve-again"])
    assert list(watch.changes(before, after)) == [
        "-8  serve-rest: pass -> fail (Parts for two of four processors; the rest stays with the "
        "original)",
        "+8  serve-again: fail -> pass (Parts come and go, 200 times on each processor, and the "
        "last ones serve)",
        "score: 14 of 100, as before",
    ]
    assert list(watch.changes(before, grade([])))[-1] == "score: 14 -> 0 of 100"


def test_points_alone_are_a_change() -> None:
    before = grade(["serve-short"])
    more = [replace(r, points=20.0) if r.id == "local" else r for r in before.checks]
    lines = list(watch.changes(before, graded(LAB, more)))
    assert lines[0].startswith("+20  local: fail (")


def test_it_goes_on_after_what_cannot_be_graded_and_ends_with_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Grade | BaseException] = [
        grade(["serve-short"]),
        UserError("it is not UTF-8 text", "save it as a UTF-8 text file"),
        # What the machine could not judge is not compared, neither with what came before.
        graded(LAB, [checks.failed(check, "infra", "too slow") for check in LAB.checks]),
        grade(["serve-short", "serve-rest"]),
        KeyboardInterrupt(),
    ]
    monkeypatch.setattr(watch, "until_saved", lambda known: known)

    def grade_next() -> Grade:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    said: list[str] = []
    watch.grade_on_save([tmp_path / "mp_partition.c"], grade_next, said.append)
    assert outcomes == []
    assert said.count("watching mp_partition.c; Ctrl-C ends") == 4
    assert any("save it as a UTF-8 text file" in text for text in said)
    assert said[-2] == "score: 6 -> 14 of 100"
    assert not [text for text in said if "infra" in text]


def test_the_verb_says_what_cannot_be_graded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "invoke", "grade", "--submission", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "what to do: " in done.stderr
