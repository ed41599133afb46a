"""Measurement -> verdict and points: pure functions, nothing here runs anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from grader.lab import Check, Lab

Verdict = Literal["pass", "fail", "no-build", "panic", "hang", "infra"]

# How much better than its mean a share may be taken for, when its interval is wide: on a busy host
# it can be so wide that it would give every step to everybody.
DOUBT = 0.20

INACTIVE = "; no points yet, for the optimisation is not active"

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class CheckResult:
    """One row of a grade."""

    id: str
    title: str
    rubric: str
    verdict: Verdict
    points: float
    max_points: float
    evidence: str
    reason: str
    next_step: str
    measured: dict[str, float] = field(default_factory=dict)
    compared_with: dict[str, float] = field(default_factory=dict)
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """All that the points follow from, by name: one value for each time it was measured."""
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What else was counted in that run, of starter, solution and submission: means per
    transaction of user, kernel and clock (instructions), and of each counted function."""


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % confidence interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def interval(samples: Sequence[float]) -> Interval:
    """Return the mean of two or more samples with its 95 % interval (Student's t)."""
    count = len(samples)
    if count < 2:
        raise ValueError("an interval needs at least two samples")
    t = _STUDENT_T[min(count - 2, len(_STUDENT_T) - 1)]
    return Interval(statistics.fmean(samples), t * statistics.stdev(samples) / math.sqrt(count))


def spread(samples: Sequence[float]) -> Interval:
    """Return `interval`, or for a single sample, which is an exact run's, just that."""
    return Interval(samples[0], 0.0) if len(samples) == 1 else interval(samples)


class Indistinct(ValueError):
    """The solution seems to cost no less than the starter: the counts spread too far to compare."""


def share(
    starter: Sequence[float], solution: Sequence[float], submission: Sequence[float]
) -> Interval:
    """Return how far the submission goes from the starter (0) to the solution (1).

    Each has a count for every round of measurements. The share is the ratio of the means, not the
    mean of the rounds' ratios: of these, one round in which starter and solution happen to lie
    close together would outweigh all others. Its interval is that of a ratio estimate (Cochran,
    Sampling Techniques, 1977, chapter 6), from what each round leaves over; what disturbs a whole
    round, and so all three alike, is not in it. Raises `Indistinct`.
    """
    saved = [base - value for base, value in zip(starter, submission, strict=True)]
    most = [base - best for base, best in zip(starter, solution, strict=True)]
    span = statistics.fmean(most)
    if span <= 0:
        raise Indistinct
    ratio = statistics.fmean(saved) / span
    left = spread([mine - ratio * all_ for mine, all_ in zip(saved, most, strict=True)])
    return Interval(ratio, left.half / span)


def share_given(seen: Interval) -> float:
    """Return the share that steps are compared with: the better end, within `DOUBT`."""
    return seen.mean + min(seen.half, DOUBT)


def straddles(check: Check, seen: Interval) -> bool:
    """Whether a step lies inside the interval, so that measuring more could change the points."""
    return any(seen.low < step.share <= seen.high for step in check.steps)


def reduction(
    check: Check,
    starter: Sequence[float],
    solution: Sequence[float],
    submission: Sequence[float],
) -> CheckResult:
    """Give the points of a ``reduction`` check from the per-transaction counts of each round.

    A step that lies inside the interval counts as reached: the student gets the better one, as far
    as `DOUBT`.
    """
    try:
        seen = share(starter, solution, submission)
    except Indistinct:
        return failed(check, "infra", "the solution seems to cost no less than the starter here")
    best = share_given(seen)
    reached = [step for step in check.steps if step.share <= best]
    points = reached[-1].points if reached else 0.0
    full = points == check.max_points
    missing = next((step for step in check.steps if step.share > best), None)
    return CheckResult(
        id=check.id,
        title=check.title,
        rubric=check.rubric,
        verdict="pass" if full else "fail",
        points=points,
        max_points=check.max_points,
        evidence=check.evidence,
        reason=f"{seen.mean:z.0%} of the way from starter to solution (± {seen.half:.0%})",
        next_step=""
        if missing is None
        else f"{missing.points:g} points from {missing.share:.0%} on. {check.hint}",
        measured={
            check.metric: statistics.fmean(submission),
            "share": seen.mean,
            "share_half_width": seen.half,
        },
        compared_with={
            "starter": statistics.fmean(starter),
            "solution": statistics.fmean(solution),
        },
        samples={
            "starter": tuple(starter),
            "solution": tuple(solution),
            "submission": tuple(submission),
        },
    )


def served(check: Check, transactions: int) -> CheckResult:
    """Return the result of a ``serve`` check in which every byte was right."""
    reason = f"{transactions} transactions, every byte right"
    if check.kills:
        times = "once" if check.kills == 1 else f"{check.kills} times"
        reason += f", after the server was killed {times} under this load"
    if check.debug:
        reason += "; the debug kernel has nothing to report"
    return CheckResult(
        id=check.id,
        title=check.title,
        rubric=check.rubric,
        verdict="pass",
        points=check.max_points,
        max_points=check.max_points,
        evidence=check.evidence,
        reason=reason,
        next_step="",
        measured={"transactions": transactions, "wrong": 0},
    )


def again(check: Check, samples: Mapping[str, tuple[float, ...]]) -> CheckResult:
    """Return the result of a check that was measured to its end, from its samples alone."""
    if check.kind == "serve":
        return replace(served(check, int(samples["transactions"][0])), samples=samples)
    return reduction(check, samples["starter"], samples["solution"], samples["submission"])


def failed(check: Check, verdict: Verdict, reason: str, next_step: str = "") -> CheckResult:
    """Return the result of a check that gives no points, with the verdict's usual next step."""
    usual = {
        "fail": check.hint,
        "no-build": "Mend the first error above, then grade again.",
        "panic": "Read the trace from its top: the first function of yours in it is where to look.",
        "hang": "Which lock is held, or which flag never set? `invoke boot --gdb` shows where each "
        "vCPU is.",
        "infra": "This is no fault of the submission; grade again, and see `invoke doctor`.",
    }
    return CheckResult(
        id=check.id,
        title=check.title,
        rubric=check.rubric,
        verdict=verdict,
        points=0.0,
        max_points=check.max_points,
        evidence=check.evidence,
        reason=reason,
        next_step=next_step or usual.get(verdict, ""),
    )


def apply_activity(lab: Lab, results: Sequence[CheckResult]) -> list[CheckResult]:
    """Take the points away while the optimisation is not active.

    What the plain way does right is still shown as passed, with 0 points and the reason. The
    other costs give no points either: the spread of one must not give any to the starter.
    """
    judge = next((result for result in results if result.id == lab.active_check), None)
    if judge is None:  # not asked for: each check stands for itself
        return list(results)
    if judge.verdict == "infra" or judge.measured.get("share", 0.0) >= lab.active_share:
        return list(results)
    share = judge.measured.get("share")
    seen = "it could not be measured" if share is None else f"now: {max(share, 0):.0%}"
    return [
        replace(
            result,
            points=0.0,
            reason=f"{result.reason}{INACTIVE}",
            next_step=f"Points count once check {judge.id} shows {lab.active_share:.0%} ({seen}).",
        )
        if result.points > 0
        else result
        for result in results
    ]


def score(results: Sequence[CheckResult]) -> float:
    """Return the sum of the points."""
    return sum(result.points for result in results)
