"""The explanation of a result."""

from dataclasses import replace

from grader import checks, explain, report
from grader.tests import documents
from grader.tests.documents import HOSTILE, HOSTILE_SHOWN, LAB, SOLUTION, STARTER, document, failed


def _block(text: str, id: str) -> str:
    return next(block for block in text.split("\n\n") if block.startswith(f"{id}:"))


def test_every_round_is_shown_with_mean_interval_and_steps() -> None:
    submission = (1.27, 1.31, 1.29)
    block = _block(explain.text(document(submission)), "crossings-long")
    assert "fail, 12 of 20 points" in block
    assert "evidence     probe, confirmed by wire" in block
    assert "256 connections at a time" in block
    for number, counts in enumerate(zip(STARTER, SOLUTION, submission, strict=True), 1):
        line = next(line for line in block.splitlines() if f"round {number}" in line)
        assert all(explain.count(value) in line for value in counts)
    mean = checks.interval(submission)
    share = checks.share(STARTER, SOLUTION, submission)
    assert f"{mean.mean:.3f}{share.mean:>12.1%}" in block
    assert f"{mean.half:.3f}{share.half:>12.1%}" in block
    # 60 % of the way from 4.05 to 0.11.
    assert "12 points from 60% on (1.686 syscalls): reached" in block
    assert "20 points from 90% on (0.504 syscalls): not reached" in block


def test_a_step_within_the_interval_is_called_so() -> None:
    # Around 60 %.
    block = _block(explain.text(document((1.60, 1.70, 1.80))), "crossings-long")
    line = next(line for line in block.splitlines() if "12 points" in line and "step" in line)
    assert line.endswith("reached: it lies within the interval, and the better step counts")


def test_what_the_wire_saw_is_shown_and_that_it_is_all_or_nothing() -> None:
    text = explain.text(document(others={"serve-one": failed("serve-one", "fail", "wrong byte")}))
    good, bad = (_block(text, id) for id in ("serve-short", "serve-one"))
    assert "transactions 256; errors 0; latency_p50_s 0.0021; latency_p99_s 0.0345" in good
    assert "all or nothing" in good
    assert "fail, 0 of 10 points: wrong byte" in bad
    assert "round" not in bad


def test_the_reasons_of_lab_toml_are_told() -> None:
    reason = "since there is a reason " * 8
    lab = replace(LAB, checks=tuple(replace(check, why=reason) for check in LAB.checks))
    text = explain.text(report.as_json(documents.grade(lab=lab)))
    assert text.count("  why          since there") == len(LAB.checks)
    assert all(len(line) <= explain.WIDTH for line in text.splitlines() if "since" in line)


def test_a_students_text_does_not_reach_the_terminal_as_it_is() -> None:
    text = explain.text(document(others={"serve-one": failed("serve-one", "fail", HOSTILE)}))
    assert HOSTILE_SHOWN in text
    assert HOSTILE not in text


def test_when_points_count_is_told() -> None:
    assert "Points count once crossings-long shows 30%" in explain.text(document(STARTER))
