"""A class: graded once each, whatever happens to one of them or to the run."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from grader import batch, results, setup
from grader import variant as variants
from grader.batch import GradedClass, Row
from grader.errors import UsageError, UserError
from grader.roster import RosterError
from grader.tests.course import LAB, Course
from grader.variant import Variant
from kernel.build import Kernel

pytest_plugins = ("grader.tests.course",)

SECONDS = 30.0


def _by_name(graded: GradedClass) -> dict[str, Row]:
    return {row.student.name: row for row in graded.rows}


def _scores(graded: GradedClass) -> dict[str, float | None]:
    return {
        row.student.name: None if row.outcome.document is None else row.outcome.document["score"]
        for row in graded.rows
    }


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_everybody_has_a_row_in_the_order_of_names(course: Course) -> None:
    for name, word in (("Zoe", "full"), ("adam", "half"), ("Bob", "nothing")):
        course.hand_in(name, word)
    graded = course.grade()
    assert list(_scores(graded)) == ["adam", "Bob", "Zoe"]
    scores = _scores(graded)
    assert scores["Zoe"] == LAB.max_score and scores["Bob"] == 0
    assert 0 < (scores["adam"] or 0) < LAB.max_score
    assert graded.judged
    assert len({row.name for row in graded.rows}) == 3


def test_the_same_files_are_graded_once(course: Course) -> None:
    for name in ("a", "b", "c"):
        course.hand_in(name, "full")
    (course.source / "c" / "notes.txt").write_text("mine")
    course.hand_in("d", "full", more="int own;\n")
    graded = course.grade()
    assert course.words() == ["full", "full"]
    rows = _by_name(graded)
    assert rows["a"].outcome is rows["b"].outcome is rows["c"].outcome
    assert rows["d"].outcome.key != rows["a"].outcome.key
    assert rows["c"].variant is not None and rows["c"].variant.ignored == ("notes.txt",)
    assert rows["a"].variant is not None and rows["a"].variant.ignored == ()


def test_what_goes_wrong_with_one_concerns_no_other(course: Course) -> None:
    for word in ("full", "crash", "error", "torn", "infra", "infra-once"):
        course.hand_in(word, word)
    (course.source / "lacking").mkdir()
    (course.source / "lacking" / "mp_batch.c").write_text("int a;\n")
    (course.source / "broken.zip").write_bytes(b"PK\3\4")
    with zipfile.ZipFile(course.source / "escape.zip", "w") as archive:
        archive.writestr("../mp_batch.c", "int a;\n")
    (course.source / "empty.tar.gz").write_bytes(b"")
    graded = course.grade(jobs=3)
    rows = _by_name(graded)
    reasons = {name: row.outcome.reason for name, row in rows.items()}
    for name, reason in {
        "lacking": "lacks mp_flush.c",
        "broken": "is damaged",
        "escape": "leads out of the archive",
        "empty": "is not a .zip",
    }.items():
        assert rows[name].outcome.status == "unreadable"
        assert reason in reasons[name]
        assert str(course.source) not in reasons.pop(name)
    for name, reason in {
        "crash": "ended with status -6: it said nothing",
        "error": "ended with status 1: error: the solution does not boot here",
        "torn": "ended with status 0",
        "infra": "serve-short could not be judged: the solution fails here, too",
    }.items():
        assert rows[name].outcome.status == "no grade"
        assert reason in reasons.pop(name)
        assert rows[name].outcome.document is None
    assert reasons == {"full": "", "infra-once": ""}
    assert _scores(graded)["infra-once"] == LAB.max_score
    assert not graded.judged
    # Once more at the end, and not a third time.
    assert sorted(course.words()) == sorted(
        ["full", *(["crash", "error", "torn", "infra", "infra-once"] * 2)]
    )


def test_a_grade_without_end_is_ended(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    course.hand_in("a", "wait")
    monkeypatch.setattr(batch, "scaled", lambda _: 0.5)
    # It does not hear SIGINT where the tests themselves were started in the background.
    monkeypatch.setattr(batch, "STOP_SECONDS", 1.0)
    (row,) = course.grade().rows
    assert row.outcome.status == "no grade"
    assert "took longer than" in row.outcome.reason
    assert course.running() == []


def test_an_exception_of_the_reader_is_a_row(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.hand_in("a", "full")
    course.hand_in("b", "half")
    real = variants.submission

    def fails(folder: Path, path: Path) -> Variant:
        if path.name == "a":
            raise ZeroDivisionError("a bug\x1b[2J")
        return real(folder, path)

    monkeypatch.setattr(variants, "submission", fails)
    rows = _by_name(course.grade())
    assert rows["a"].outcome.status == "no grade"
    assert (
        "ZeroDivisionError" in rows["a"].outcome.reason and "\x1b" not in rows["a"].outcome.reason
    )
    assert rows["b"].outcome.status == "graded"


def test_what_is_graded_is_not_graded_again(course: Course) -> None:
    course.hand_in("a", "full")
    course.hand_in("b", "infra")
    first = course.grade()
    course.hand_in("c", "half")
    second = course.grade()
    # A machine's fault gets another chance each time, and a second one at the end.
    assert sorted(course.words()) == ["full", "half", "infra", "infra", "infra", "infra"]
    assert _by_name(second)["a"].outcome == _by_name(first)["a"].outcome


def test_another_lab_or_project_is_graded_anew(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    course.hand_in("a", "full")
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    first = course.grade().rows[0].outcome.key
    assert course.grade().rows[0].outcome.key == first
    monkeypatch.setattr(results, "commit", lambda: "ba9876543210")
    assert course.grade().rows[0].outcome.key != first
    assert course.words() == ["full", "full"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_end_in_the_middle_leaves_nothing_running_and_the_next_run_goes_on(
    course: Course, tmp_path: Path, how: signal.Signals
) -> None:
    for number in range(4):
        course.hand_in(f"s{number}", ("full", "half", "nothing", "wait")[number])
        course.hand_in(f"t{number}", ("full", "half", "nothing", "wait")[number], more="int t;\n")
    with course.driver() as driver:
        try:
            _until(lambda: len(course.running()) == 2)
            waiting = course.running()
            driver.send_signal(how)
            assert driver.wait(SECONDS) != 0
        finally:
            driver.kill()
    _until(lambda: not any(process.is_running() for process in waiting))
    done = [path for path in (course.out / "results").iterdir() if path.suffix == ".json"]
    before = course.words()
    assert len(done) == 6 and len(before) == 8
    assert all(json.loads(path.read_text())["score"] >= 0 for path in done)
    # What a write that was cut off leaves.
    for partial in (".summary.csv.abc", "results/.0123.json.abc"):
        (course.out / partial).write_text("{")

    course.calls.with_suffix(".go").write_text("")
    graded = course.grade()
    assert course.words()[8:] == ["wait", "wait"]
    assert [path.name for path in course.out.rglob(".*")] == [".lock"]
    undisturbed = course.grade(out=tmp_path / "undisturbed")
    assert [(row.student, row.outcome) for row in graded.rows] == [
        (row.student, row.outcome) for row in undisturbed.rows
    ]


def test_two_runs_do_not_write_the_same_folder(course: Course) -> None:
    course.hand_in("a", "full")
    course.out.mkdir()
    with (
        FileLock(course.out / ".lock"),
        pytest.raises(UserError, match="another grade-all is writing"),
    ):
        course.grade()


def test_what_cannot_work_is_said_before_the_work(course: Course) -> None:
    with pytest.raises(RosterError):
        course.grade()
    course.hand_in("a", "full")
    with pytest.raises(UsageError, match="--jobs 0"):
        course.grade(jobs=0)
    course.out.write_text("in the way")
    with pytest.raises(UserError, match="results"):
        course.grade()


def test_the_default_number_of_grades_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs(cores: int, gibibytes: int) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        memory = psutil.virtual_memory()._replace(available=gibibytes << 30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        return batch.default_jobs()

    assert [jobs(1, 64), jobs(2, 64), jobs(4, 64), jobs(16, 64)] == [1, 1, 2, 8]
    assert [jobs(16, 1), jobs(16, 8)] == [1, 2]


def test_a_class_is_graded_in_the_machine(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.vmlinux.is_file()
    source = tmp_path / "handed in"
    for name, variant in (
        ("Ada Lovelace_1", variants.solution(LAB.folder)),
        ("No Build_2", variants.solution(LAB.folder)),
    ):
        folder = source / f"{name}_assignsubmission_file"
        folder.mkdir(parents=True)
        for file, path in variant.files.items():
            (folder / file).write_text(path.read_text() + ("}\n" if "No Build" in name else ""))
    out = tmp_path / "results"
    invoke = [sys.executable, "-m", "invoke", "--search-root", str(setup.ROOT), "grade-all"]
    done = subprocess.run(
        [*invoke, str(source), "--lab", LAB.name, "--out", str(out)],
        cwd=setup.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (out / "summary.csv").open(newline="") as table:
        lines = {line["id"]: line for line in csv.DictReader(table)}
    count = len(LAB.checks)
    assert (lines["1"]["score"], lines["1"]["verdicts"]) == (f"{LAB.max_score:g}", f"{count} pass")
    assert (lines["2"]["score"], lines["2"]["verdicts"]) == ("0", f"{count} no-build")
    assert [lines[number]["student"] for number in "12"] == ["Ada Lovelace", "No Build"]
