"""The scaling model: what the model's cycles say of throughput, as the server's vCPUs grow.

Counts are measured in exact mode (`grader.exact`); a core's cycles for a transaction are those of
the cost model (`grader.model`), and cores do together what their cycles allow each. Nobody waits in
it, neither for a lock nor for work, and it has not been compared with real cores: where it says
that a server scales, locks may still stop it; where it says that one does not, lines that move are
enough to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from grader import model
from grader.compare import BASELINE
from grader.experiment import Costs
from grader.samples import Cell, Sample

# By transactions per connection and size of a message; then by server, and its vCPUs.
Grown = Mapping[tuple[int, int], Mapping[str, Mapping[int, Costs]]]


def grown(samples: Sequence[Sample]) -> Grown:
    """Group the samples of an exact bench: servers in their order, vCPUs ascending."""
    found: dict[tuple[int, int], dict[str, dict[int, Costs]]] = {}
    for sample in sorted(samples, key=lambda one: one.cell.vcpus):
        servers = found.setdefault((sample.cell.per_connection, sample.cell.size), {})
        servers.setdefault(sample.server, {})[sample.cell.vcpus] = sample.costs
    return found


def counts(costs: Costs) -> dict[str, float]:
    """Return what the cost model takes, per transaction; without the clock's interrupt."""
    return {**costs.calls, "instructions": costs.work}


def cycles(costs: Mapping[int, Costs]) -> list[tuple[int, float]]:
    """Return (vCPUs, cycles of the model for a transaction)."""
    return [(vcpus, model.cycles(counts(one))) for vcpus, one in costs.items()]


def speed(costs: Mapping[int, Costs]) -> list[tuple[int, float]]:
    """Return (vCPUs, times the throughput on the fewest of them, by the model's cycles)."""
    (fewest, alone), *_ = all_ = cycles(costs)
    return [(vcpus, vcpus / fewest * alone / each) for vcpus, each in all_]


def gain(costs: Mapping[int, Costs], base: Mapping[int, Costs]) -> list[tuple[int, float]]:
    """Return (vCPUs, times the throughput of `base` on as many), where both were measured."""
    other = dict(cycles(base))
    return [(vcpus, other[vcpus] / each) for vcpus, each in cycles(costs) if vcpus in other]


def report(samples: Sequence[Sample], console: Console) -> None:
    """Print, for each life of a connection, what becomes of throughput as the vCPUs grow."""
    for (n, size), servers in grown(samples).items():
        what = f"{Cell(1, size, n).life}, {size} B"
        console.print(
            _table(
                f"{what}: times the throughput of the fewest vCPUs",
                {server: speed(costs) for server, costs in servers.items()},
            )
        )
        if BASELINE in servers:
            console.print(
                _table(
                    f"{what}: times {BASELINE}'s throughput on as many vCPUs",
                    {server: gain(costs, servers[BASELINE]) for server, costs in servers.items()},
                )
            )
    console.print(
        "A model, not validated here: cores' cycles by the weights of grader/model.py. Nobody "
        "waits in it, neither for a lock nor for work."
    )


def _table(title: str, servers: Mapping[str, Sequence[tuple[int, float]]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", min_width=len(title) + 2)
    result.add_column("server", no_wrap=True)
    columns = sorted({vcpus for points in servers.values() for vcpus, _ in points})
    for vcpus in columns:
        result.add_column(f"{vcpus} vCPU{'s' if vcpus > 1 else ''}", justify="right")
    for server, points in servers.items():
        known = dict(points)
        result.add_row(server, *(f"{known[v]:.2f}" if v in known else "" for v in columns))
    return result
