"""The result file and the table."""

import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from grader import checks, report, results
from grader.errors import UserError
from grader.grade import Grade, MachineEnd
from grader.lab import load_lab
from grader.tests.results import graded

LAB = load_lab("1-batching")


def _grade(verdict: checks.Verdict = "fail") -> Grade:
    results = [
        checks.failed(check, verdict, "wrong byte at 17")
        if check.kind == "serve"
        else checks.reduction(check, [4.0, 4.1], [0.1, 0.11], [0.1, 0.11])
        for check in LAB.checks
    ]
    return graded(LAB, results, phases={"boot": 2.0}, ignored=("notes.txt",))


def test_the_file_fits_its_schema_and_holds_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    report.write_json(_grade(), path)
    document = json.loads(path.read_text())
    jsonschema.validate(document, json.loads(report.SCHEMA.read_text()))
    row = next(check for check in document["checks"] if check["id"] == "crossings-long")
    assert row["measured"]["syscalls"] == pytest.approx(0.105)
    assert row["compared_with"] == {
        "starter": pytest.approx(4.05),
        "solution": row["measured"]["syscalls"],
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_the_file_holds_all_that_the_points_follow_from(tmp_path: Path) -> None:
    report.write_json(_grade(), tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    row = next(check for check in document["checks"] if check["id"] == "crossings-long")
    assert row["samples"] == {
        "starter": [4.0, 4.1],
        "solution": [0.1, 0.11],
        "submission": [0.1, 0.11],
    }
    asked = next(row for row in document["table"]["checks"] if row["id"] == "serve-one")
    serve_one = next(check for check in LAB.checks if check.id == "serve-one")
    assert (asked["max_points"], asked["steps"]) == (serve_one.points, [])
    assert asked["experiment"]["load"]["pause_us"] == 2000


def test_a_result_that_was_never_booted_fits_the_schema() -> None:
    whole = _grade("no-build")
    booted = ("qemu", "cpu_model", "accelerator")
    there = {k: v for k, v in whole.environment.items() if k not in booted}
    assert report.as_json(replace(whole, environment=there))["environment"] == there


def test_a_document_that_does_not_fit_is_refused() -> None:
    broken = _grade()
    object.__setattr__(broken, "score", "full")
    with pytest.raises(jsonschema.ValidationError):
        report.as_json(broken)


def test_a_path_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        results.check_writable(tmp_path / "missing" / "result.json", "--json")
    with pytest.raises(UserError, match="cannot be written"):
        results.check_writable(tmp_path, "--json")
    results.check_writable(tmp_path / "result.json", "--json")


def _text(grade: Grade) -> str:
    console = Console(file=io.StringIO(), width=140)
    report.table(grade, LAB, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_says_score_reason_and_what_was_ignored() -> None:
    text = _text(_grade())
    assert "score 60 of 100" in text
    assert "wrong byte at 17" in text
    assert "notes.txt" in text


def test_infra_is_not_reported_as_a_score() -> None:
    text = _text(_grade("infra"))
    assert "score" in text
    assert "score 60" not in text


def test_what_went_wrong_is_kept_with_the_command_to_repeat_it(tmp_path: Path) -> None:
    ends = (
        MachineEnd("submission", "Kernel panic\n", {"syscalls": 7}),
        MachineEnd("solution", "quiet\n", {}),
    )
    grade = replace(_grade("panic"), machines=ends)
    folder = report.write_bundle(grade, "invoke grade --seed 1", tmp_path / "results")
    assert folder is not None
    assert folder.parent == tmp_path / "results"
    assert (folder / "console-1-submission.txt").read_text() == "Kernel panic\n"
    assert json.loads((folder / "counters-1-submission.json").read_text()) == {"syscalls": 7}
    assert (folder / "console-2-solution.txt").read_text() == "quiet\n"
    assert (folder / "again.txt").read_text() == "invoke grade --seed 1\n"
    assert json.loads((folder / "result.json").read_text())["score"] == grade.score


def test_nothing_is_kept_of_a_submission_that_is_only_slow(tmp_path: Path) -> None:
    slow = [
        checks.served(check, 1)
        if check.kind == "serve"
        else checks.reduction(check, [4.0, 4.1], [0.1, 0.11], [4.0, 4.1])
        for check in LAB.checks
    ]
    ends = (MachineEnd("submission", "", {}),)
    grade = replace(_grade(), checks=tuple(slow), machines=ends)
    assert report.write_bundle(grade, "", tmp_path / "results") is None
    assert not (tmp_path / "results").exists()
    # But of a reference that was lost on the way, whatever the grade.
    grade = replace(grade, machines=(*ends, MachineEnd("starter", "Oops\n", {})))
    folder = report.write_bundle(grade, "", tmp_path / "results")
    assert folder is not None and (folder / "console-2-starter.txt").read_text() == "Oops\n"


def test_what_is_wrong_with_all_checks_is_said_once() -> None:
    results = [checks.failed(c, "no-build", "does not compile: x.c:1", "error") for c in LAB.checks]
    text = _text(replace(_grade(), checks=tuple(results), score=0))
    assert text.count("x.c:1") == 1
