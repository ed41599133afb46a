"""One grade, and those of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grader import checks as judge
from grader import explain, recorded
from grader.checks import Interval
from grader.lab import Lab
from notebooks import figures, material
from notebooks.figures import Bars, Curve, Judged, Row, curve
from notebooks.material import Student
from notebooks.pictures import (
    INSTRUCTIONS,
    OBJECTS,
    Picture,
    Pictures,
    hundred,
    named,
    plus_minus,
)


def grade_pictures(document: Mapping[str, Any], bench: Path = recorded.BENCH) -> Pictures:
    """Return the pictures of a grade's result (see result.schema.json).

    Beside counts that were taken under a load of the bench stands what the limit costs there.
    """
    number = document["lab"][0]
    rows = {row["id"]: row for row in document["table"]["checks"]}
    found = [
        Picture(
            f"grade{number}-points",
            lambda: _points(document),
            lambda: _points_learned(document),
        )
    ]
    vcpus = document["environment"]["vcpus"]
    compared = [check for check in document["checks"] if explain.comparison(check)]
    if compared:
        found.append(
            Picture(
                f"grade{number}-counts",
                lambda: figures.judged([_judged(c, rows[c["id"]], vcpus, bench) for c in compared]),
                lambda: _counts_learned(compared),
            )
        )
    spent = [check for check in document["checks"] if check.get("costs")]
    if spent:
        found.append(
            Picture(f"grade{number}-spent", lambda: _spent(spent), lambda: _spent_learned(spent))
        )
    numbers = [c for c in document["checks"] if "answer" in c["measured"]]
    if numbers:
        found.append(
            Picture(
                f"grade{number}-answers",
                lambda: _answers(numbers),
                lambda: _answers_learned(numbers),
            )
        )
    return named(found)


def _points(document: Mapping[str, Any]) -> Figure:
    rows = [
        Row(
            check["id"],
            check["points"],
            check["max_points"],
            f"{check['points']:g} of {check['max_points']:g}, {check['verdict']}",
        )
        for check in document["checks"]
    ]
    score = f"{document['score']:g} of {document['max_score']:g}"
    title = f"{document['lab']}, {document['variant']}: {score}"
    return figures.reached(title, rows, "points", ("reached", "to be had"))


def _points_learned(document: Mapping[str, Any]) -> str:
    lost = [c["id"] for c in document["checks"] if c["points"] < c["max_points"]]
    where = f"points are missing in {', '.join(lost)}" if lost else "no points are missing"
    return f"{document['score']:g} of {document['max_score']:g} points; {where}."


def _judged(check: Mapping[str, Any], row: Mapping[str, Any], vcpus: int, bench: Path) -> Judged:
    limit = recorded.limit(row["experiment"]["load"], row["metric"], vcpus, bench)
    steps = [
        (explain.at_step(check, step["share"]), f"{step['points']:g} points")
        for step in row["steps"]
    ]
    return Judged(
        f"{check['id']}: {check['points']:g} of {check['max_points']:g} points",
        _axis(row["metric"]),
        {name: check["samples"][name] for name in explain.NAMES},
        steps,
        limit.count if limit else None,
    )


def _axis(metric: str) -> str:
    """Return what stands on an axis for one of `grader.lab.METRICS`."""
    if metric == "remote":
        return "work done on another processor, in parts of all work"
    words = {
        "syscalls": "system calls",
        "wakeups": "wake-ups",
        "queue_wakeups": "wake-ups of wait queues",
        **OBJECTS,
    }
    return f"{words.get(metric, metric)} per transaction"


def _share(check: Mapping[str, Any]) -> Interval:
    return judge.share(*(check["samples"][name] for name in explain.NAMES))


def _counts_learned(compared: Sequence[Mapping[str, Any]]) -> str:
    words = [f"{c['id']} {plus_minus(hundred(_share(c)), 0, ' %')}" for c in compared]
    return f"How far it is from the starter (0 %) to the solution (100 %): {', '.join(words)}."


def _spent(checks: Sequence[Mapping[str, Any]]) -> Figure:
    def part(check: Mapping[str, Any], name: str) -> Curve:
        dots = [
            (float(i), max(0.0, check["costs"][who].get(name, 0.0)))
            for i, who in enumerate(explain.NAMES)
        ]
        like = {"user": "P", "kernel": "B", "clock": "plain"}[name]
        return curve({"clock": "the clock's interrupt"}.get(name, name), dots, like)

    return figures.bars(
        *(
            Bars(
                f"measured for {check['id']}",
                list(explain.NAMES),
                [part(check, name) for name in ("kernel", "user", "clock")],
                "whose files",
                INSTRUCTIONS,
                stacked=True,
                digits=0,
            )
            for check in checks[:4]
        )
    )


def _spent_learned(checks: Sequence[Mapping[str, Any]]) -> str:
    words = []
    for check in checks[:4]:
        cost = check["costs"]["submission"]
        whole = cost["user"] + cost["kernel"] + cost["clock"]
        words.append(f"{cost['user'] / whole:.1%} ({check['id']})")
    return f"The server's own program executes {', '.join(words)} of the instructions."


def _answers(checks: Sequence[Mapping[str, Any]]) -> Figure:
    found = []
    for check in checks:
        mean = check["compared_with"]["mean"]
        low, high = check["compared_with"]["low"], check["compared_with"]["high"]
        answer = check["measured"]["answer"]
        found.append(
            figures.Answer(
                check["id"],
                answer / mean,
                low / mean,
                high / mean,
                check["verdict"] == "pass",
                f"{answer:,.6g}; {explain.count(low)} to {explain.count(high)}",
            )
        )
    return figures.answers(found)


def _answers_learned(checks: Sequence[Mapping[str, Any]]) -> str:
    right = [check for check in checks if check["verdict"] == "pass"]
    return f"{len(right)} of the {len(checks)} numbers given agree with what the grader measured."


def class_pictures(students: Sequence[Student], lab: Lab) -> Pictures:
    """Return the pictures of a class."""
    return named(
        (
            Picture(
                "class-scores",
                lambda: figures.histogram(
                    material.scores(students), lab.max_score, _without(students)
                ),
                lambda: _scores_learned(students, lab),
            ),
            Picture(
                "class-checks",
                lambda: _class_checks(students, lab),
                lambda: _class_learned(students, lab),
            ),
        )
    )


def _without(students: Sequence[Student]) -> int:
    return len([student for student in students if student.score is None])


def _scores_learned(students: Sequence[Student], lab: Lab) -> str:
    scores = material.scores(students)
    full = len([score for score in scores if score == lab.max_score])
    none = len([score for score in scores if score == 0])
    return (
        f"Of {len(students)} students {len(scores)} have a grade; {full} have all points, {none} "
        f"have none, and {_without(students)} have no grade, which is not 0."
    )


def _full(students: Sequence[Student], check: str, most: float) -> tuple[int, int]:
    """Return how many have all points of a check, and how many have a grade."""
    points = [student.checks[check] for student in students if check in student.checks]
    return len([value for value in points if value >= most]), len(points)


def _class_checks(students: Sequence[Student], lab: Lab) -> Figure:
    rows = []
    for check in lab.checks:
        full, graded_ = _full(students, check.id, check.max_points)
        share = 100 * full / graded_ if graded_ else 0.0
        rows.append(Row(check.id, share, 100.0, f"{full} of {graded_}"))
    return figures.reached(
        "Who has all points of a check",
        rows,
        "students with a grade (%)",
        ("have all its points", "all with a grade"),
    )


def _class_learned(students: Sequence[Student], lab: Lab) -> str:
    shares = {
        check.id: full / most
        for check in lab.checks
        for full, most in (_full(students, check.id, check.max_points),)
        if most
    }
    if not shares:
        return "Nobody has a grade."
    least = min(shares, key=lambda name: shares[name])
    return f"{least} is the check that most have missed: {shares[least]:.0%} have all its points."
