"""Result document -> why each check has the points that it has, as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grader import checks as judge
from grader.formats import clean

WIDTH = 100
NAMES = ("starter", "solution", "submission")
_MODES = {"closed": "each connection at its own pace", "rounds": "all connections in rounds"}


def text(document: Mapping[str, Any]) -> str:
    """Return the explanation of every check of a result, see result.schema.json."""
    rows = {row["id"]: row for row in document["table"]["checks"]}
    blocks = ["\n".join(_check(result, rows[result["id"]])) for result in document["checks"]]
    active = document["table"]["active"]
    blocks.append(
        _filled(
            f"Points count once {active['check']} shows {active['share']:.0%}: the starter, too, "
            "gets every byte right, and what is not built yet earns nothing."
        )
    )
    return "\n\n".join(blocks) + "\n"


def _check(result: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    given = f"{result['points']:g} of {result['max_points']:g} points"
    yield f"{result['id']}: {result['title']}"
    yield f"  {result['verdict']}, {given}: {clean(result['reason'])}"
    yield f"  evidence     {result['evidence']}"
    yield _filled(experiment(row), "  measured     ")
    if comparison(result):
        yield from _rounds(result, row)
    else:
        seen = [
            f"{name} {', '.join(f'{value:g}' for value in values)}"
            for name, values in result["samples"].items()
        ]
        if seen:
            yield _filled("; ".join(seen), "  seen         ")
    if not row["steps"]:
        yield "  points       all or nothing"
    if row["why"]:
        yield _filled(row["why"], "  why          ")


def comparison(result: Mapping[str, Any]) -> bool:
    """Whether a check was measured beside starter and solution."""
    return bool(result["measured"]) and all(name in result["samples"] for name in NAMES)


def experiment(row: Mapping[str, Any]) -> str:
    """Return in one sentence how a check is measured."""
    load = row["experiment"]["load"]
    each = load.get("transactions_per_connection", 0)
    parts = [
        row["experiment"]["server"],
        f"{_many(load['connections'], 'connection')} at a time",
        f"{_many(each, 'transaction')} on each" if each else "open throughout",
        f"messages of {load['size']:,} bytes",
        _MODES[load["mode"]],
    ]
    if "pause_us" in load:
        parts.append(f"a pause of {load['pause_us']:,} µs between transactions")
    said = ("server", "load", "run", "versus")
    if run := row["experiment"].get("run"):
        parts.append(_many(run["vcpus"], "vCPU"))
    if other := row["experiment"].get("versus"):
        named = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in other.items())
        parts.append(f"compared with {named}")
    others = {k: v for k, v in row["experiment"].items() if k not in said}
    return "; ".join([*parts, *(f"{name}: {value}" for name, value in others.items())])


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _rounds(result: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    samples: Mapping[str, Sequence[float]] = result["samples"]
    share = judge.share(*(samples[name] for name in NAMES))
    yield f"  {row['metric']} per transaction, starter, solution and submission measured in turn:"
    yield "               " + "".join(f"{name:>12}" for name in (*NAMES, "share"))
    for number, values in enumerate(zip(*(samples[name] for name in NAMES), strict=True), 1):
        yield f"    round {number:<5}{''.join(f'{count(value):>12}' for value in values)}"
    intervals = [judge.interval(samples[name]) for name in NAMES]
    means = "".join(f"{count(i.mean):>12}" for i in intervals)
    halves = "".join(f"{count(i.half):>12}" for i in intervals)
    yield f"    mean       {means}{share.mean:>12.1%}"
    yield f"    95 %: ±    {halves}{share.half:>12.1%}"
    yield "  compared     share = (starter - submission) / (starter - solution), of the means"
    for step in row["steps"]:
        best = judge.share_given(share)
        state = "reached" if step["share"] <= best else "not reached"
        if share.low < step["share"] <= best:
            state += ": it lies within the interval, and the better step counts"
        at = count(at_step(result, step["share"]))
        yield (
            f"  step         {step['points']:g} points from {step['share']:.0%} on "
            f"({at} {row['metric']}): {state}"
        )


def at_step(result: Mapping[str, Any], share: float) -> float:
    """Return the count per transaction that is this share of the way, by the means."""
    starter, solution = (result["compared_with"][name] for name in ("starter", "solution"))
    return float(starter - share * (starter - solution))


def count(value: float) -> str:
    """Return a count per transaction with as many digits as say something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _filled(words: str, label: str = "  ") -> str:
    return textwrap.fill(words, WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
