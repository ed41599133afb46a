"""The scaling model: what the model's cycles say of throughput, as the server's vCPUs grow.

Counts are measured in exact mode (`grader.exact`); a core's cycles for a transaction are those of
the cost model (`grader.model`), and cores do together what their cycles allow each. Where locks
were followed (``--sharing``), cores wait for them as customers of a closed queueing network do:

A core's transaction takes R cycles: Z of its own, and for each lock l the time until it has been
had, R_l. N cores together do X = N / R transactions a cycle. Held is a lock for D_l cycles of a
transaction, those of its hand-overs among them. Whoever comes to it finds Q_l = X R_l / M_l others
there, if M_l locks share the visits of that name, and waits for each as long as it is held itself::

    R_l = D_l (1 + h_l Q_l)   hence   R_l = D_l / (1 - h_l X D_l / M_l)

That is mean value analysis as Schweitzer and Bard approximate it (Lazowska, Zahorjan, Graham,
Sevcik, Quantitative System Performance, 1984, section 7.4.2), in which h_l, what of a queue is
another's than one's own, is (N - 1) / N. Here it is measured: how often a lock was last held by
another core. So a lock that each core has for itself makes nobody wait.

Nobody waits for work, nor for the locks that `grader.probe.locks` does not see, and the model has
not been compared with real cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from grader import model
from grader.compare import BASELINE
from grader.experiment import Costs
from grader.samples import Cell, LockUse, Sample

# Of one server, by its vCPUs.
Growth = Mapping[int, Sample]
# By transactions per connection and size of a message; then by server.
Grown = Mapping[tuple[int, int], Mapping[str, Growth]]
# Halvings by which the throughput is found: to the last bit of a double.
_HALVINGS = 60


@dataclass(frozen=True)
class Waiting:
    """What of a transaction's cycles is waiting for locks, by the model."""

    cycles: float
    """All of a transaction's, waiting included."""
    waited: float
    lock: str
    """Where most of it is waited; empty if nobody waits."""


def grown(samples: Sequence[Sample]) -> Grown:
    """Group the samples of an exact bench: servers in their order, vCPUs ascending."""
    found: dict[tuple[int, int], dict[str, dict[int, Sample]]] = {}
    for sample in sorted(samples, key=lambda one: one.cell.vcpus):
        servers = found.setdefault((sample.cell.per_connection, sample.cell.size), {})
        servers.setdefault(sample.server, {})[sample.cell.vcpus] = sample
    return found


def counts(costs: Costs) -> dict[str, float]:
    """Return what the cost model takes, per transaction; without the clock's interrupt."""
    return {**costs.calls, "instructions": costs.work}


def waiting(sample: Sample) -> Waiting:
    """Return what the cores of a sample wait for one another's locks."""
    work = model.cycles(counts(sample.costs))
    transactions = sample.short.transactions + sample.long.transactions
    shared = [use for use in sample.locks if use.handovers]
    demands = [_held(use) / transactions for use in shared]
    # What another core has, of the visits; and the lock's share of X at which it is always held.
    loads = [
        use.handovers / use.visits * demand / use.locks
        for use, demand in zip(shared, demands, strict=True)
    ]

    def waits(speed: float) -> list[float]:
        return [
            demand * speed * load / (1 - speed * load)
            for demand, load in zip(demands, loads, strict=True)
        ]

    # The more, the more is waited: the one throughput at which N cores take R cycles each.
    slow, fast = 0.0, min(sample.cell.vcpus / work, 1 / max(loads, default=1.0))
    for _ in range(_HALVINGS):
        middle = (slow + fast) / 2
        if middle * (work + sum(waits(middle))) < sample.cell.vcpus:
            slow = middle
        else:
            fast = middle
    waited = waits(slow)
    if not any(waited):
        return Waiting(work, 0.0, "")
    longest = max(range(len(shared)), key=waited.__getitem__)
    return Waiting(work + sum(waited), sum(waited), shared[longest].name)


def _held(use: LockUse) -> float:
    """Return the cycles for which the locks were held, the lines of hand-overs included."""
    return model.cycles({"instructions": use.held, "transfers": use.handovers})


def cycles(growth: Growth) -> list[tuple[int, float]]:
    """Return (vCPUs, cycles of the model for a transaction, waiting included)."""
    return [(vcpus, waiting(sample).cycles) for vcpus, sample in growth.items()]


def speed(growth: Growth) -> list[tuple[int, float]]:
    """Return (vCPUs, times the throughput on the fewest of them, by the model's cycles)."""
    (fewest, alone), *_ = all_ = cycles(growth)
    return [(vcpus, vcpus / fewest * alone / each) for vcpus, each in all_]


def gain(growth: Growth, base: Growth) -> list[tuple[int, float]]:
    """Return (vCPUs, times the throughput of `base` on as many), where both were measured."""
    other = dict(cycles(base))
    return [(vcpus, other[vcpus] / each) for vcpus, each in cycles(growth) if vcpus in other]


def waited(growth: Growth) -> list[tuple[int, float]]:
    """Return (vCPUs, the part of a transaction's cycles that is waiting for locks)."""
    found = ((vcpus, waiting(sample)) for vcpus, sample in growth.items())
    return [(vcpus, one.waited / one.cycles) for vcpus, one in found]


def report(samples: Sequence[Sample], console: Console) -> None:
    """Print, for each life of a connection, what becomes of throughput as the vCPUs grow."""
    for (n, size), servers in grown(samples).items():
        what = f"{Cell(1, size, n).life}, {size} B"
        console.print(
            _table(
                f"{what}: times the throughput of the fewest vCPUs",
                {server: _shown(speed(growth)) for server, growth in servers.items()},
            )
        )
        if BASELINE in servers:
            console.print(
                _table(
                    f"{what}: times {BASELINE}'s throughput on as many vCPUs",
                    {
                        server: _shown(gain(growth, servers[BASELINE]))
                        for server, growth in servers.items()
                    },
                )
            )
        if any(sample.locks for growth in servers.values() for sample in growth.values()):
            console.print(
                _table(
                    f"{what}: waiting for locks, of a transaction's cycles; and most for which",
                    {server: _waited(growth) for server, growth in servers.items()},
                )
            )
    seen = all(sample.locks or sample.cell.vcpus == 1 for sample in samples)
    console.print(
        "A model, not validated here: cores' cycles by the weights of grader/model.py. "
        + (
            "Nobody waits in it but for locks, those of its queueing (grader/scaling.py)."
            if seen
            else "Nobody waits in it, neither for a lock nor for work."
        )
    )


def _shown(points: Sequence[tuple[int, float]]) -> dict[int, str]:
    return {vcpus: f"{value:.2f}" for vcpus, value in points}


def _waited(growth: Growth) -> dict[int, str]:
    found = {vcpus: waiting(sample) for vcpus, sample in growth.items()}
    return {
        vcpus: f"{one.waited / one.cycles:.1%}" + (f" {one.lock}" if one.waited else "")
        for vcpus, one in found.items()
    }


def _table(title: str, servers: Mapping[str, Mapping[int, str]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", min_width=len(title) + 2)
    result.add_column("server", no_wrap=True)
    columns = sorted({vcpus for shown in servers.values() for vcpus in shown})
    for vcpus in columns:
        result.add_column(f"{vcpus} vCPU{'s' if vcpus > 1 else ''}", justify="right")
    for server, shown in servers.items():
        result.add_row(server, *(shown.get(vcpus, "") for vcpus in columns))
    return result
