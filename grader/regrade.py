"""Result file -> points once more, without a machine: lab.toml may have changed since.

What was measured stays; what it is worth is computed anew. So points, steps and texts of lab.toml
may change, but not what a check runs: for that there is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from grader import checks as judge
from grader import grade as grading
from grader import points
from grader.checks import CheckResult
from grader.errors import UserError
from grader.grade import Grade
from grader.lab import Check, Lab
from grader.results import commit


def regrade(document: Mapping[str, Any], lab: Lab) -> Grade:
    """Return the grade that the evidence of a result file is worth under `lab`.

    Of a result of some checks alone, these. Raises `UserError` if one has not been measured like
    that.
    """
    if only := document["environment"].get("only"):
        lab = lab.only(only)
    table = points.table(lab)
    if missing := points.not_measured(document["table"], table):
        raise UserError(
            f"the result holds no evidence for what {', '.join(missing)} of {lab.name} asks now",
            "grade the submission again, or name with --check what it holds",
        )
    rows = {row["id"]: row for row in document["checks"]}
    results = judge.apply_activity(lab, [_result(check, rows[check.id]) for check in lab.checks])
    regraded = {"time": grading.now(), "commit": commit()}
    return Grade(
        lab=lab.name,
        variant=document["variant"],
        score=judge.score(results),
        max_score=lab.max_score,
        checks=tuple(results),
        environment={**document["environment"], "regraded": regraded},
        phases=document["phases"],
        table=table,
        ignored=tuple(document["ignored"]),
    )


def _result(check: Check, row: Mapping[str, Any]) -> CheckResult:
    samples = {name: tuple(values) for name, values in row["samples"].items()}
    if check.kind == "answer":
        result = judge.failed(check, row["verdict"], row["reason"], row["next_step"])
        return replace(
            result,
            points=check.max_points if row["verdict"] == "pass" else 0.0,
            measured=dict(row["measured"]),
            compared_with=dict(row["compared_with"]),
        )
    if not row["measured"]:
        result = judge.failed(check, row["verdict"], row["reason"], row["next_step"])
        return replace(result, samples=samples)
    result = judge.again(check, samples)
    # A remark about the run, if there was one, follows the reason.
    reason = row["reason"].removesuffix(judge.INACTIVE)
    reason = reason if reason.startswith(result.reason) else result.reason
    return replace(result, reason=reason, costs=row.get("costs", {}))


def changes(document: Mapping[str, Any], grade: Grade) -> list[str]:
    """Return what has become different since `document` was written, a line each."""
    return list(_changes(document, grade))


def _changes(document: Mapping[str, Any], grade: Grade) -> Iterator[str]:
    for change in points.changes(document["table"], grade.table):
        yield f"the table of points: {change}"
    before = {row["id"]: row for row in document["checks"]}
    for result in grade.checks:
        was = before[result.id]
        if (was["points"], was["max_points"]) != (result.points, result.max_points):
            yield (
                f"{result.id}: {result.points:g} of {result.max_points:g} points, "
                f"no longer {was['points']:g} of {was['max_points']:g}"
            )
    if (document["score"], document["max_score"]) != (grade.score, grade.max_score):
        yield (
            f"score {grade.score:g} of {grade.max_score:g}, "
            f"no longer {document['score']:g} of {document['max_score']:g}"
        )
