"""Results as the grader writes them, without a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grader import checks, report
from grader.checks import CheckResult, Verdict
from grader.grade import Grade
from grader.lab import Check, Lab, load_lab
from grader.tests.results import ENVIRONMENT, graded

LAB = load_lab("echo", Path(__file__).parent / "labs")
STARTER = (4.0, 4.1, 4.05)
SOLUTION = (0.10, 0.11, 0.12)
# What a student's compiler or console may hold.
HOSTILE = (
    "<script>alert('x')</script> & ]]> \"quoted\" {{ 7 * 7 }} \x1b[31mred\x1b[0m \x00 "
    "\u202egnp.exe \ud800 <img src=x onerror=y>\n</pre></table>\tlast line"
)
HOSTILE_SHOWN = (
    "<script>alert('x')</script> & ]]> \"quoted\" {{ 7 * 7 }} \\x1b[31mred\\x1b[0m \\x00 "
    "\\u202egnp.exe \\ud800 <img src=x onerror=y>\n</pre></table>\tlast line"
)


def seen(transactions: int) -> dict[str, tuple[float, ...]]:
    """What a load generator sees when all goes well."""
    return {
        "transactions": (float(transactions),),
        "errors": (0.0,),
        "latency_p50_s": (0.0021,),
        "latency_p99_s": (0.0345,),
    }


def measured(check: Check, submission: tuple[float, ...]) -> CheckResult:
    """A check for which these counts were taken, and some more."""
    samples = {"starter": STARTER, "solution": SOLUTION, "submission": submission}
    costs = {
        name: {"user": 900.0, "kernel": 25_000.0, "clock": 310.0, "syscalls": values[0]}
        for name, values in samples.items()
    }
    return replace(checks.again(check, samples), costs={} if check.same_run else costs)


def grade(
    submission: tuple[float, ...] = SOLUTION,
    others: Mapping[str, CheckResult] | None = None,
    lab: Lab = LAB,
) -> Grade:
    """A grade in which every byte is right and these counts were measured, but for `others`."""
    results = [
        (others or {}).get(check.id)
        or (
            checks.again(check, seen(check.transactions))
            if check.kind == "serve"
            else measured(check, submission)
        )
        for check in lab.checks
    ]
    results = checks.apply_activity(lab, results)
    return graded(
        lab,
        results,
        environment={
            **ENVIRONMENT,
            "commit": "0123456789ab",
            "time": "2026-11-26T08:00:00Z",
            "seconds": 31.4,
        },
        phases={"kernel": 0.1, "boot": 2.0, "correctness": 9.5},
        ignored=("notes.txt",),
    )


def document(
    submission: tuple[float, ...] = SOLUTION, others: Mapping[str, CheckResult] | None = None
) -> dict[str, Any]:
    """The result file of `grade`."""
    return report.as_json(grade(submission, others))


def failed(id: str, verdict: Verdict, reason: str = "because", next_step: str = "") -> CheckResult:
    """A check that went wrong."""
    check = next(check for check in LAB.checks if check.id == id)
    return checks.failed(check, verdict, reason, next_step)


def all_failed(verdict: Verdict, reason: str, next_step: str = "") -> dict[str, Any]:
    """The result file of a submission with which everything went wrong."""
    others = {check.id: failed(check.id, verdict, reason, next_step) for check in LAB.checks}
    whole = grade(others=others)
    if verdict == "no-build":
        booted = ("qemu", "cpu_model", "accelerator")
        there = {k: v for k, v in whole.environment.items() if k not in booted}
        whole = replace(whole, environment=there)
    return report.as_json(whole)
