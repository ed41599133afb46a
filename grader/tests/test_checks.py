"""Verdicts and points from recorded numbers, without a machine."""

import dataclasses

import pytest

from grader import checks
from grader.lab import load_lab

LAB = load_lab("1-batching")
CHECK = next(check for check in LAB.checks if check.id == "crossings-long")
SERVE = next(check for check in LAB.checks if check.kind == "serve")


def test_the_labs_points_add_up_to_a_hundred() -> None:
    assert LAB.max_score == 100


def test_solution_gets_everything_and_starter_nothing() -> None:
    starter, solution = [4.0, 4.1, 4.05], [0.10, 0.11, 0.10]
    full = checks.reduction(CHECK, starter, solution, solution)
    none = checks.reduction(CHECK, starter, solution, starter)
    assert (full.verdict, full.points) == ("pass", CHECK.max_points)
    assert (none.verdict, none.points) == ("fail", 0)
    assert full.next_step == ""
    assert CHECK.hint in none.next_step
    assert full.compared_with["starter"] == pytest.approx(4.05)


def test_the_way_between_gives_the_step_it_reaches() -> None:
    starter, solution = [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]
    middle = checks.reduction(CHECK, starter, solution, [1.2, 1.21, 1.19])
    assert middle.points == 12
    assert middle.measured["share"] == pytest.approx(0.70)
    assert middle.next_step.startswith("20 points from 90% on")


def test_a_step_inside_the_interval_counts_as_reached_and_asks_for_more() -> None:
    starter, solution = [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]
    samples = [1.55, 1.61, 1.68]
    share = checks.share(starter, solution, samples)
    assert share.low < 0.6 <= share.high
    assert checks.straddles(CHECK, share)
    assert checks.reduction(CHECK, starter, solution, samples).points == 12


def test_the_doubt_that_is_given_ends_somewhere() -> None:
    # Means of 0 %, and an interval that reaches beyond 100 %.
    starter, solution, samples = [4.0] * 3, [0.1] * 3, [0.1, 4.0, 7.9]
    share = checks.share(starter, solution, samples)
    assert share.high > 1
    assert checks.reduction(CHECK, starter, solution, samples).points == 0


def test_a_round_that_could_not_tell_does_not_outweigh_the_others() -> None:
    # In the second, starter and solution happened to lie close together.
    starter, solution = [30.3, 26.7, 30.2], [26.6, 26.6, 26.7]
    share = checks.share(starter, solution, [26.5, 26.8, 26.4])
    assert 0.9 < share.mean < 1.1


def test_what_disturbs_a_whole_round_is_not_in_the_interval() -> None:
    starter, solution = [30.0, 35.0, 32.0], [26.0, 31.0, 28.0]
    share = checks.share(starter, solution, [27.0, 32.0, 29.0])
    assert share.mean == pytest.approx(0.75)
    assert share.half == pytest.approx(0, abs=1e-9)


def test_where_starter_and_solution_cannot_be_told_apart_nothing_is_judged() -> None:
    with pytest.raises(checks.Indistinct):
        checks.share([4.0, 4.2], [4.1, 4.3], [4.0, 4.0])
    assert checks.reduction(CHECK, [4.0, 4.0], [4.0, 4.0], [4.0, 4.0]).verdict == "infra"


def test_worse_than_the_starter_is_no_negative_score() -> None:
    result = checks.reduction(CHECK, [4.0, 4.0], [0.1, 0.1], [9.0, 9.1])
    assert result.points == 0
    assert result.measured["share"] < 0
    hardly = checks.reduction(CHECK, [4.0, 4.0], [0.1, 0.1], [4.001, 4.001])
    assert hardly.reason.startswith("0% of the way")


def test_interval_is_students() -> None:
    # Two samples: t(1 degree of freedom) = 12.71, standard error of 1 and 3 is 1.
    assert checks.interval([1.0, 3.0]) == checks.Interval(2.0, 12.71)
    with pytest.raises(ValueError):
        checks.interval([1.0])


def _results(share: float) -> list[checks.CheckResult]:
    results = [
        checks.served(check, 10)
        if check.kind == "serve"
        else checks.reduction(check, [4.0, 4.0], [0.0, 0.0], [4 - 4 * share] * 2)
        for check in LAB.checks
    ]
    return checks.apply_activity(LAB, results)


def test_points_count_only_while_batching_is_active() -> None:
    assert checks.score(_results(0.0)) == 0
    assert checks.score(_results(1.0)) == 100
    plain = next(result for result in _results(0.0) if result.id == SERVE.id)
    assert (plain.verdict, plain.points) == ("pass", 0)
    assert "not active" in plain.reason
    assert "crossings-long" in plain.next_step


def test_the_spread_of_another_cost_gives_the_starter_nothing() -> None:
    results = [
        checks.served(check, 10)
        if check.kind == "serve"
        else checks.reduction(
            check,
            [4.0, 4.0],
            [0.0, 0.0],
            [4.0, 4.0] if check.id == LAB.active_check else [4.0, 0.0],
        )
        for check in LAB.checks
    ]
    assert checks.score(results) > 0
    assert checks.score(checks.apply_activity(LAB, results)) == 0


def test_activity_takes_nothing_when_the_machine_was_at_fault() -> None:
    results = [
        checks.served(check, 10) if check.kind == "serve" else checks.failed(check, "infra", "x")
        for check in LAB.checks
    ]
    assert checks.score(checks.apply_activity(LAB, results)) == sum(
        check.points for check in LAB.checks if check.kind == "serve"
    )


@pytest.mark.parametrize("verdict", ["fail", "no-build", "panic", "hang", "infra"])
def test_every_failure_has_a_reason_and_a_next_step(verdict: checks.Verdict) -> None:
    result = checks.failed(SERVE, verdict, "because")
    assert result.points == 0
    assert result.reason == "because"
    assert result.next_step
    assert dataclasses.asdict(result)["verdict"] == verdict
