"""A lab's table of points as plain data: kept with each result, and compared with a later one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from grader.lab import Check, Lab

# What may change without a new measurement; all the rest of a check says how it is measured.
_TEXTS = ("title", "rubric", "hint", "why")
_POINTS = ("max_points", "steps")


def table(lab: Lab) -> dict[str, Any]:
    """Return what lab.toml asks for, and the points it gives, as the result's schema has it."""
    return {
        "title": lab.title,
        "rubrics": dict(lab.rubrics),
        "active": {"check": lab.active_check, "share": lab.active_share},
        "checks": [_row(check) for check in lab.checks],
    }


def _row(check: Check) -> dict[str, Any]:
    fields = asdict(check)
    # Whose measurement it is says nothing: the load and the server are this check's, too.
    del fields["same_run"], fields["points"]
    row = {name: fields.pop(name) for name in ("id", *_TEXTS, "kind", "metric")}
    row["max_points"] = check.max_points
    row["steps"] = list(fields.pop("steps"))
    row["experiment"] = {**_set(fields), "load": _set(fields["load"])}
    return row


def _set(fields: Mapping[str, Any]) -> dict[str, Any]:
    # What a later lab.toml can ask for besides was not asked for in what was measured before.
    return {name: value for name, value in fields.items() if value}


def not_measured(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the checks of `new` for which a result with the table `old` holds no evidence."""
    before = {row["id"]: row for row in old["checks"]}
    return [
        row["id"]
        for row in new["checks"]
        if row["id"] not in before
        or any(row[key] != before[row["id"]][key] for key in ("kind", "metric", "experiment"))
    ]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what a table gives points for otherwise than another one, a line each."""
    return list(_changes(old, new))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old["active"] != new["active"]:
        was, now = (f"{t['active']['check']} at {t['active']['share']:.0%}" for t in (old, new))
        yield f"points count once there is {now}, no longer {was}"
    before = {row["id"]: row for row in old["checks"]}
    for row in new["checks"]:
        was = before.pop(row["id"], None)
        if was is None:
            yield f"{row['id']}: new"
        elif any(was[key] != row[key] for key in _POINTS):
            yield f"{row['id']}: {_given(row)}, no longer {_given(was)}"
    for id in before:
        yield f"{id}: no longer asked for"


def _given(row: Mapping[str, Any]) -> str:
    steps = [f"{step['points']:g} from {step['share']:.0%}" for step in row["steps"]]
    return ", ".join(steps) if steps else f"{row['max_points']:g} points"
