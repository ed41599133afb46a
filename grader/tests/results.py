"""What a grade for tests is made of, where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grader import checks, points
from grader.checks import CheckResult
from grader.grade import Grade
from grader.lab import Lab

ENVIRONMENT: Mapping[str, object] = {
    "kernel": "6.12.1-megapipe",
    "qemu": "7.2",
    "cpu_model": "qemu64",
    "accelerator": "tcg",
    "vcpus": 4,
    "seed": 1,
    "host_load": {"before": 0.1, "after": 0.2},
    "commit": "",
}


def graded(lab: Lab, results: Sequence[CheckResult], **others: Any) -> Grade:
    """Return the grade of a submission with these results; `others` are fields of `Grade`."""
    fields: dict[str, Any] = {"environment": ENVIRONMENT, "phases": {}, **others}
    return Grade(
        lab=lab.name,
        variant="submission",
        score=checks.score(results),
        max_score=lab.max_score,
        checks=tuple(results),
        table=points.table(lab),
        **fields,
    )
