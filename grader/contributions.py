"""What P, B and L contribute, one after the other as in the paper's table 3, and each alone.

Counts are measured; cycles are those of the model (`grader.model`). The paper's own figures stand
beside them: percentage points of throughput over its baseline, on eight cores of 2012.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from grader import compare, model
from grader.compare import BASELINE, Comparison
from grader.samples import Cell, Sample

# Han et al., OSDI 2012, table 3: transactions per connection -> percentage points, as printed.
PAPER: Mapping[str, Mapping[int, float]] = {
    "P": {1: 211.6, 2: 207.5, 4: 181.3, 8: 83.5, 16: 38.9, 32: 29.5, 64: 17.2, 128: 8.8},
    "B": {1: 18.8, 2: 22.8, 4: 72.4, 8: 44.6, 16: 31.8, 32: 30.4, 64: 27.3, 128: 19.8},
    "L": {1: 352.1, 2: 230.5, 4: 79.3, 8: 22.0, 16: 9.7, 32: 2.9, 64: 0.4, 128: 0.1},
}
# What is added, to what, making what.
IN_ORDER = (("P", BASELINE, "P"), ("B", "P", "BP"), ("L", "BP", "BPL"))
ALONE = (("P", "plain", "P"), ("B", "plain", "B"), ("L", "plain", "L"))


@dataclass(frozen=True)
class Contribution:
    """What one optimisation takes away, per transaction."""

    what: str
    """P, B or L."""
    before: str
    """The server without it; `after` is the one with it."""
    after: str
    instructions: float
    transfers: float | None
    """None if they were not counted."""
    cycles: float
    """Of the model."""
    points: float
    """Percentage points of throughput over epoll, if the model's cycles were all."""


def contributions(
    servers: Mapping[str, Mapping[str, float]], steps: Sequence[tuple[str, str, str]] = IN_ORDER
) -> list[Contribution]:
    """Return those of the steps whose two servers are there, from the servers' `counts`.

    Raises KeyError without epoll, which points are relative to.
    """
    base = model.cycles(servers[BASELINE])
    found = []
    for what, before, after in steps:
        if before not in servers or after not in servers:
            continue
        one, other = servers[before], servers[after]
        found.append(
            Contribution(
                what,
                before,
                after,
                instructions=one["instructions"] - other["instructions"],
                transfers=one["transfers"] - other["transfers"] if "transfers" in one else None,
                cycles=model.cycles(one) - model.cycles(other),
                points=100 * base * (1 / model.cycles(other) - 1 / model.cycles(one)),
            )
        )
    return found


def counts(
    comparison: Comparison, transfers: Mapping[str, float] | None
) -> dict[str, dict[str, float]]:
    """Return each server's counts per transaction, as the model wants them."""
    found = {}
    for server, samples in comparison.samples.items():
        one = {"instructions": comparison.spread(server, compare.instructions).mean}
        for name in ("syscalls", "context_switches", "ipis", "doorbells"):
            one[name] = fmean(sample.costs.calls[name] for sample in samples)
        if transfers is not None:
            if server not in transfers:
                continue
            one["transfers"] = transfers[server]
        found[server] = one
    return found


def paper_at(what: str, n: int) -> str:
    """Return the paper's figure for the measured n; where it has none, for the nearest.

    n = 0 is a connection that stays open: the paper's longest is the nearest.
    """
    longest = max(PAPER[what])
    nearest = min(PAPER[what], key=lambda other: abs(other - (n or longest)))
    text = f"{PAPER[what][nearest]:+.1f}"
    return text if nearest == n else f"{text} (n = {nearest})"


def report(
    samples: Sequence[Sample],
    transfers: Mapping[Cell, Mapping[str, float]],
    console: Console,
    least: int = 2,
) -> None:
    """Print, for each cell, the model's cycles, what they hang on, and the contributions.

    `least`: rounds that a cell must have; one is enough of an exact result.
    """
    for comparison in compare.compare(samples, least):
        found = counts(comparison, transfers.get(comparison.cell))
        console.print(cycles_table(comparison.cell, found))
        console.print(_sensitivity(found))
        if set(found).issuperset({server for step in IN_ORDER for server in step[1:]}):
            console.print(contributions_table(comparison, found))


def cycles_table(cell: Cell, servers: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the model for people: counts, what each adds in cycles, and the sum."""
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"{cell.life}, {cell.size} B, {cell.vcpus} vCPUs: the model's cycles "
        "per transaction (count x weight)",
        title_justify="left",
    )
    result.add_column("server", no_wrap=True)
    names = [w for w in model.WEIGHTS if any(w.count in one for one in servers.values())]
    for weight in names:
        result.add_column(f"{weight.count} x {weight.cycles:g}", justify="right")
    result.add_column("cycles", justify="right")
    result.add_column("of epoll", justify="right")
    base = model.cycles(servers[BASELINE]) if BASELINE in servers else 0.0
    for server, one in servers.items():
        total = model.cycles(one)
        result.add_row(
            server,
            *(f"{one.get(w.count, 0.0) + 0.0:,.{0 if w.cycles == 1 else 2}f}" for w in names),
            f"{total:,.0f}",
            f"{total / base:.1%}" if base else "",
        )
    return result


def _sensitivity(servers: Mapping[str, Mapping[str, float]]) -> str:
    changed = [one for one in model.sensitivity(servers) if one.changed]
    if not changed:
        return "The order of the servers stays when any weight is halved or doubled.\n"
    lines = ["The order of the servers hangs on these weights:"]
    for one in changed:
        lines.append(f"  {one.weight.count} x {one.factor:g}: {', '.join(one.order)}")
    return "\n".join(lines) + "\n"


def contributions_table(
    comparison: Comparison, servers: Mapping[str, Mapping[str, float]]
) -> Table:
    """Return what each optimisation takes away: added in the paper's order, and alone."""
    cell = comparison.cell
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"{cell.life}: what each optimisation takes away, per transaction",
        title_justify="left",
    )
    result.add_column("step", no_wrap=True)
    for column in ("instructions", "transfers", "model cycles", "points", "paper's points"):
        result.add_column(column, justify="right")
    for title, steps in (("in order", IN_ORDER), ("alone", ALONE)):
        for one in contributions(servers, steps):
            result.add_row(
                f"{title}: {one.before} -> {one.after}",
                f"{one.instructions:,.0f}",
                "" if one.transfers is None else f"{one.transfers:,.1f}",
                f"{one.cycles:,.0f}",
                f"{one.points:+.1f}",
                paper_at(one.what, cell.per_connection) if title == "in order" else "",
            )
    result.caption = (
        "points: percentage points of throughput over epoll, if cycles were all (a model). The "
        "paper's are of eight cores, where a shared line also makes the others wait."
    )
    result.caption_justify = "left"
    return result
