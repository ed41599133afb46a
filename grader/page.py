"""Result document -> one page that needs nothing else: no script, no network, no other file.

Texts of a submission (a compiler's message, a console) are cleaned of control characters and
escaped; the page's own policy forbids scripts besides. Nothing in it is told by colour alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from grader import checks as judge
from grader import explain, markup, recorded, results
from grader.formats import NO_SCORE, clean, judged
from grader.probe.counted import EVENTS
from grader.recorded import Recorded

TEMPLATE = "page.html.j2"
# Fill, edge and marker: to be told apart in grey, and by their shapes.
_MARKS = {
    "starter": ("white", "#555555", "s"),
    "solution": ("#aaaaaa", "#555555", "D"),
    "submission": ("#1f4e79", "#1f4e79", "o"),
}
# Fill and hatch, to be told apart in grey.
_PARTS = {"user": ("white", ""), "kernel": ("#cccccc", ""), "clock": ("#eeeeee", "////")}
_GREY = "#777777"
# Per transaction: one in a window of the measurement is nobody's.
LEAST_SHOWN = 0.005


def write(document: Mapping[str, object], path: Path) -> None:
    """Write the page of a result, whole or not at all. Raises `UserError`."""
    results.write(path, text(document))


def text(document: Mapping[str, object]) -> str:
    """Return the page of a result, see result.schema.json; the same for the same result."""
    clean_document: dict[str, Any] = _cleaned(document)
    rows = {row["id"]: row for row in clean_document["table"]["checks"]}
    checks = clean_document["checks"]
    vcpus = clean_document["environment"]["vcpus"]
    return markup.template(TEMPLATE).render(
        document=clean_document,
        judged=judged(clean_document),
        no_score=NO_SCORE,
        rows=rows,
        checks=checks,
        names=explain.NAMES,
        count=explain.count,
        experiment=explain.experiment,
        advice=_advice(checks),
        compared=[
            {"check": check, "row": rows[check["id"]], **_numbers(check, rows[check["id"]], vcpus)}
            for check in checks
            if explain.comparison(check)
        ],
        spent=[
            {"check": check, "row": rows[check["id"]], **_spent(check)}
            for check in checks
            if check.get("costs")
        ],
        served=[check for check in checks if "transactions" in check["samples"]],
        phases=phases(clean_document["phases"]),
        environment=_flat(clean_document["environment"]),
    )


def _cleaned(value: Any) -> Any:
    """Return a document with every text in it cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return value


def _advice(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what to do, once for all checks of which the same is to be said."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in checks:
        if check["next_step"]:
            found.setdefault((check["verdict"], check["next_step"]), []).append(check)
    advice = []
    for (verdict, next_step), mine in found.items():
        # A panic's and a hang's trace follows the advice; a compiler's output is all there is.
        step, _, output = next_step.partition("\n")
        if verdict == "no-build":
            step, output = "", next_step
        reasons = {check["reason"] for check in mine}
        advice.append(
            {
                "ids": [check["id"] for check in mine],
                "verdict": verdict,
                # Where they differ, the table of checks has them.
                "reason": reasons.pop() if len(reasons) == 1 else "",
                "step": step,
                "output": output,
            }
        )
    return advice


def _numbers(check: Mapping[str, Any], row: Mapping[str, Any], vcpus: int) -> dict[str, Any]:
    samples = check["samples"]
    limit = recorded.limit(row["experiment"]["load"], row["metric"], vcpus)
    return {
        "plot": comparison(check, row, limit),
        "limit": limit,
        "means": {name: judge.interval(samples[name]) for name in explain.NAMES},
        "share": judge.share(*(samples[name] for name in explain.NAMES)),
    }


def _spent(check: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plot of the instructions, and by meaning each event of which there was any."""
    costs = [check["costs"][name] for name in explain.NAMES]
    events = {
        event.meaning: [cost[event.name] for cost in costs]
        for event in EVENTS
        if all(event.name in cost for cost in costs)
    }
    return {
        "plot": instructions(check),
        "events": {meaning: row for meaning, row in events.items() if max(row) >= LEAST_SHOWN},
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}, ")
        else:
            found[f"{prefix}{name}".replace("_", " ")] = _shown(value)
    return found


def _shown(value: object) -> str:
    if isinstance(value, list):
        return shlex.join(map(str, value))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def comparison(check: Mapping[str, Any], row: Mapping[str, Any], limit: Recorded | None) -> str:
    """Return the counts of a check as SVG: a dot for each round, a line for each step.

    And one for the `limit`, where it is known.
    """
    figure = Figure(figsize=(5.4, 2.3), layout="constrained")
    axes = figure.add_subplot()
    for height, name in enumerate(reversed(explain.NAMES)):
        fill, edge, marker = _MARKS[name]
        values = check["samples"][name]
        mean = judge.interval(values)
        axes.errorbar(mean.mean, height, xerr=mean.half, color=_GREY, capsize=3, lw=1, zorder=2)
        # The first round on top, so that equal counts do not hide each other.
        heights = np.linspace(height + 0.22, height - 0.22, len(values))
        axes.scatter(values, heights, s=22, c=fill, edgecolors=edge, marker=marker, zorder=3)
    for level, step in enumerate(reversed(row["steps"])):
        x = explain.at_step(check, step["share"])
        axes.axvline(x, color="black", lw=0.9, ls=(0, (4, 2)), zorder=1)
        axes.text(
            x,
            # Steps may lie close together.
            1.03 + 0.13 * level,
            f"{step['points']:g} points",
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=8,
        )
    if limit:
        axes.axvline(limit.count.mean, color=_GREY, lw=1.5, ls=(0, (1, 1)), zorder=1)
        axes.annotate(
            "limit",
            (limit.count.mean, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, 2),
            textcoords="offset points",
            color="#555555",
            fontsize=8,
        )
    axes.set_yticks(range(len(explain.NAMES)), reversed(explain.NAMES))
    axes.set_ylim(-0.6, len(explain.NAMES) - 0.4)
    axes.set_xlabel(f"{row['metric']} per transaction")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return markup.svg(figure, f"{check['title']}: {check['reason']}", check["id"])


def instructions(check: Mapping[str, Any]) -> str:
    """Return as SVG the instructions of a transaction: the server's, the kernel's, the clock's."""
    costs = check["costs"]
    figure = Figure(figsize=(7.0, 1.9), layout="constrained")
    axes = figure.add_subplot()
    names = list(reversed(explain.NAMES))
    left = np.zeros(len(names))
    for part, (fill, hatch) in _PARTS.items():
        values = np.array([max(0.0, costs[name][part]) for name in names])
        bars = axes.barh(
            names, values, left=left, color=fill, edgecolor=_GREY, hatch=hatch, label=part
        )
        left += values
    axes.bar_label(bars, [f"{total:,.0f}" for total in left], padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel("instructions per transaction")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    description = f"{check['title']}: instructions per transaction, by who executes them"
    return markup.svg(figure, description, f"instructions-{check['id']}")


def phases(seconds: Mapping[str, float]) -> str:
    """Return as SVG how long each phase of the grade took."""
    figure = Figure(figsize=(7.0, 0.5 + 0.27 * len(seconds)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(seconds), list(seconds.values()), color="#cccccc", edgecolor=_GREY)
    axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    return markup.svg(figure, "Seconds that each phase took", "phases")
