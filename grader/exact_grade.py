"""Grading in exact mode: what a transaction costs, identical in each run, and nothing else.

It needs no tap, and nobody outside of the machine. But the clients run in the student's own kernel
here, so that every byte was right is the guest's word, and earns nothing by itself: the checks on
the wire are left out, and so is the debug kernel. What the host's probe has counted is compared
with starter and solution as always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from grader import checks as judge
from grader import exact
from grader.checks import CheckResult
from grader.errors import UsageError
from grader.evidence import answered_elsewhere, not_received
from grader.experiment import Compared, Costs, ExperimentFailed, Failure
from grader.lab import Check, Lab
from grader.progress import Progress
from grader.station import Built

# As near to the wire as it comes: there, too, a CPU has its turn until there is nothing to do.
SETTING = exact.Setting(turn=0)


def possible(lab: Lab) -> Lab:
    """Return the part of a lab that exact mode can judge; `UsageError` if there is none."""
    ids = [
        check.id for check in lab.checks if check.kind == "reduction" and check.metric != "remote"
    ]
    if not lab.has_code or not ids:
        raise UsageError(
            f"nothing of {lab.name} can be graded in exact mode",
            "leave out --exact, or choose other checks",
        )
    return lab.only(ids)


def measure(
    lab: Lab, built: Built, references: Mapping[str, Built], vcpus: int, progress: Progress
) -> list[CheckResult]:
    """Judge every check of a lab that is `possible`, in its order."""
    variants = {**references, "submission": built}
    images = {name: exact.image(one) for name, one in variants.items()}
    runs = [check for check in lab.checks if not check.same_run]
    found: dict[str, CheckResult] = {}
    with progress.phase("performance"), exact.machines() as (pool, stop):

        def once(check: Check, name: str) -> Costs | Failure:
            progress.update(f"{check.title}: {name}")
            one, made = variants[name], images[name]
            try:
                counted = exact.measure(one, made, check.server, check.load, vcpus, SETTING, stop)
            except ExperimentFailed as error:
                return error.failure
            return counted.costs

        pending = {
            (check.id, name): pool.submit(once, check, name) for check in runs for name in variants
        }
        for check in runs:
            costs = {name: pending[check.id, name].result() for name in variants}
            same = [one for one in lab.checks if check.id in (one.id, one.same_run)]
            for result in _judge(same, costs):
                progress.say(f"  {result.verdict:8} {result.title}")
                found[result.id] = result
    return [found[check.id] for check in lab.checks]


def _judge(checks: Sequence[Check], found: Mapping[str, Costs | Failure]) -> list[CheckResult]:
    """Judge the checks of one run; whoever fails alone is to blame, and a reference never is."""
    costs = {name: [each] for name, each in found.items() if isinstance(each, Costs)}
    for name in ("solution", "starter", "submission"):
        failure = found[name]
        if isinstance(failure, Failure):
            mine = name == "submission"
            verdict = failure.verdict if mine else "infra"
            reason = failure.reason if mine else f"the {name} fails here: {failure.reason}"
            return [judge.failed(check, verdict, reason) for check in checks]
    known = [costs["starter"], costs["solution"]]
    reason = answered_elsewhere(known, costs["submission"])
    reason = reason or not_received([one for (one,) in known], costs["submission"][0])
    if reason:
        return [judge.failed(check, "fail", reason) for check in checks]
    compared = Compared(costs, {})
    results = [judge.reduction(check, *compared.samples(check.metric)) for check in checks]
    results[0] = replace(results[0], costs=compared.means())
    return results
