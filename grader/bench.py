"""Servers side by side: what a transaction costs with epoll and with MegaPipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from grader import variant as variants
from grader.checks import Interval, interval
from grader.errors import UsageError
from grader.experiment import Costs, Session
from grader.lab import Lab, LoadShape
from grader.progress import Progress
from grader.station import Station, build
from kernel.build import build_kernel

# MegaPipe with any of its three optimisations: batching, partitioning, lwsockets.
SERVERS: Mapping[str, str] = {
    "epoll": "epoll-server",
    "plain": "mp-server",
    "B": "mp-server --batch",
    "P": "mp-server --partition",
    "L": "mp-server --lwsocket",
    "BP": "mp-server --batch --partition",
    "BL": "mp-server --batch --lwsocket",
    "PL": "mp-server --partition --lwsocket",
    "BPL": "mp-server --batch --partition --lwsocket",
}
METRICS: Mapping[str, str] = {
    "instructions": "instructions",
    "syscalls": "system calls",
    "wakeups": "wake-ups",
    "file_alloc": "files",
}
# 64 connections for each of 4 vCPUs.
CONNECTIONS = 256
SHORT_WINDOW = 1024
SEED = 1


@dataclass(frozen=True)
class Row:
    """One server at one number of transactions per connection."""

    per_connection: int
    server: str
    costs: tuple[Costs, ...]

    def spread(self, metric: str) -> Interval:
        """Return the mean and its 95 % interval, per transaction."""
        return interval([costs.metric(metric) for costs in self.costs])


def measure(
    station: Station,
    per_connection: Sequence[int],
    rounds: int,
    progress: Progress,
    servers: Mapping[str, str],
) -> list[Row]:
    """Measure every server at every n in turn, `rounds` times. Raises `ExperimentFailed`."""
    rows = []
    for n in per_connection:
        shape = LoadShape(CONNECTIONS, n, 64, mode="rounds")
        unit = CONNECTIONS * n
        short = max(1, SHORT_WINDOW // unit) * unit
        costs: dict[str, list[Costs]] = {name: [] for name in servers}
        for number in range(rounds):
            for name, command in servers.items():
                progress.update(f"n = {n}, round {number + 1} of {rounds}: {name}")
                with Session(station, command, shape, SEED + number) as session:
                    costs[name].append(session.costs(short, 2 * short))
        rows += [Row(n, name, tuple(costs[name])) for name in servers]
    return rows


def choose(names: str) -> dict[str, str]:
    """Return the servers of a list such as ``epoll,BPL``, or of ``all``."""
    chosen = list(SERVERS) if names == "all" else names.split(",")
    if unknown := [name for name in chosen if name not in SERVERS]:
        raise UsageError(
            f"--servers: what is {unknown[0]}?", f"all, or some of {','.join(SERVERS)}"
        )
    return {name: SERVERS[name] for name in chosen}


def run(
    lab: Lab, servers: Mapping[str, str], per_connection: Sequence[int], rounds: int, vcpus: int
) -> None:
    """Boot the solution, measure, and print the table."""
    if rounds < 2 or not per_connection or min(per_connection) < 1:
        raise UsageError(
            "bench needs 2 or more rounds, and numbers of transactions from 1", "see --help bench"
        )
    progress = Progress()
    with progress.phase("build"):
        built = build(lab, variants.solution(lab.folder), build_kernel(progress=progress))
    with progress.phase("bench"), Station(built, vcpus) as station:
        rows = measure(station, per_connection, rounds, progress, servers)
    Console().print(table(rows))
    progress.say(
        f"{vcpus} vCPUs, {CONNECTIONS} connections in rounds, 64 B, {rounds} rounds; ± is the 95 % "
        f"interval of the mean. {progress.summary()}"
    )


def table(rows: Sequence[Row]) -> Table:
    """Return the costs per transaction for people."""
    result = Table(box=box.SIMPLE_HEAD, title="per transaction", title_justify="left")
    result.add_column("n", justify="right")
    result.add_column("server", no_wrap=True)
    for title in METRICS.values():
        result.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for metric in METRICS:
            spread = row.spread(metric)
            digits = 0 if metric == "instructions" else 2
            # Slopes of 0 come out on either side of it: no "-0.00".
            mean = round(spread.mean, digits) + 0.0
            cells.append(f"{mean:,.{digits}f} ± {spread.half:,.{digits}f}")
        result.add_row(str(row.per_connection), row.server, *cells)
    return result
