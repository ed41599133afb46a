"""Servers side by side: what a transaction costs with MegaPipe, epoll and io_uring, and at least.

For each cell of a grid (vCPUs, message size, transactions per connection) all servers are measured
in turn, round after round, so that what the host does meanwhile meets all of them. What one
transaction costs is the slope between two windows, see `grader.experiment`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from grader import compare, samples
from grader.checks import Interval
from grader.compare import Comparison
from grader.errors import UsageError
from grader.experiment import Session
from grader.lab import CONNECTIONS_PER_VCPU, Lab, LoadShape
from grader.machine import CPU_MODEL, qemu_version
from grader.probe.counted import EVENTS
from grader.progress import Progress, duration
from grader.results import commit
from grader.samples import Cell, Journal, Sample
from grader.station import Built, Station, build_solution

# epoll with one listener for all, as in the paper, and with what Linux has learned since; io_uring
# as good as we know it; MegaPipe with any of its optimisations: batching, partitioning, lwsockets.
SERVERS: Mapping[str, str] = {
    "epoll": "epoll-server",
    "epoll-exclusive": "epoll-server --exclusive",
    "epoll-reuseport": "epoll-server --reuseport",
    "io_uring": "uring-server --reuseport",
    "plain": "mp-server",
    "B": "mp-server --batch",
    "P": "mp-server --partition",
    "L": "mp-server --lwsocket",
    "BP": "mp-server --batch --partition",
    "BL": "mp-server --batch --lwsocket",
    "PL": "mp-server --partition --lwsocket",
    "BPL": "mp-server --batch --partition --lwsocket",
    "limit": "limit-server",
}
SHORT_WINDOW = 1024
MAX_SIZE = 65536
MAX_VCPUS = 64
# For the estimate before anything has been measured: what a quick bench took on the reference
# machine with nothing beside it. Seconds for a server's start and end, for a transaction of a
# connection that stays, for a connection, and (from the limit's instructions) a KiB of payload.
_SERVER_SECONDS, _TRANSACTION_SECONDS = 0.7, 0.00015
_CONNECTION_SECONDS, _KIB_SECONDS = 0.00027, 0.00005


@dataclass(frozen=True)
class Grid:
    """What is measured: every server in every cell, `rounds` times."""

    servers: tuple[str, ...]
    per_connection: tuple[int, ...]
    sizes: tuple[int, ...] = (64,)
    vcpus: tuple[int, ...] = (4,)
    rounds: int = 3
    until: float = 0.0
    """Go on, up to four times as many rounds, until each ratio's interval is so narrow (± %)."""
    seed: int = 1

    def __post_init__(self) -> None:
        checks = (
            (self.rounds >= 2, "--rounds: two are needed to see a spread"),
            (self.until >= 0, "--until: a percentage"),
            (min(self.per_connection, default=-1) >= 0, "--per-connection: numbers from 0"),
            (
                all(1 <= size <= MAX_SIZE for size in self.sizes) and self.sizes,
                f"--sizes: bytes of a message, from 1 to {MAX_SIZE}",
            ),
            (
                all(1 <= number <= MAX_VCPUS for number in self.vcpus) and self.vcpus,
                f"--smp: numbers of vCPUs, from 1 to {MAX_VCPUS}",
            ),
        )
        for good, text in checks:
            if not good:
                raise UsageError(text, "see --help bench")

    def cells(self, vcpus: int) -> Iterator[Cell]:
        """Yield the cells that one machine serves."""
        for size in self.sizes:
            for n in self.per_connection:
                yield Cell(vcpus, size, n)

    @property
    def seconds(self) -> float:
        """About how long this takes on an idle machine, before anything is known."""
        total = 0.0
        for vcpus in self.vcpus:
            for cell in self.cells(vcpus):
                short, long = windows(cell)
                # The warm-up is one more round of all connections.
                count = short + long + connections(cell) * max(1, cell.per_connection)
                each = _TRANSACTION_SECONDS
                each += _CONNECTION_SECONDS / cell.per_connection if cell.per_connection else 0
                each += _KIB_SECONDS * cell.size / 1024
                total += len(self.servers) * self.rounds * (_SERVER_SECONDS + count * each)
        return total


PEERS = ("epoll", "epoll-exclusive", "epoll-reuseport", "io_uring")
USUAL = Grid((*PEERS, "plain", "B", "BPL", "limit"), (1, 10, 128))
# In five minutes on two cores.
QUICK = Grid(("epoll", "epoll-reuseport", "io_uring", "BPL", "limit"), (1, 10, 32), rounds=4)
FULL = Grid(
    tuple(SERVERS),
    per_connection=(1, 2, 4, 8, 16, 32, 64, 128),
    sizes=(64, 256, 1024, 4096, 16384),
    vcpus=(1, 2, 4, 8),
)
WIRE = {"usual": USUAL, "quick": QUICK, "full": FULL}
# In exact mode, where one round says all.
EXACT = {
    "usual": Grid((*PEERS, "plain", "B", "BPL", "limit"), (1, 10)),
    "quick": Grid(("epoll", "epoll-reuseport", "io_uring", "BPL", "limit"), (1, 10), vcpus=(1, 4)),
    "full": Grid(tuple(SERVERS), (1, 10, 128), vcpus=(1, 2, 4, 8, 12, 16)),
}


def connections(cell: Cell) -> int:
    """Return how many connections are open at a time."""
    return CONNECTIONS_PER_VCPU * cell.vcpus


def windows(cell: Cell, open_connections: int | None = None) -> tuple[int, int]:
    """Return the transactions of the two windows: in whole lives of all connections.

    So many are open at a time (None: as many as in a bench).
    """
    unit = (open_connections or connections(cell)) * max(1, cell.per_connection)
    short = max(1, SHORT_WINDOW // unit) * unit
    return short, 2 * short


def choose(names: str) -> tuple[str, ...]:
    """Return the servers of a list such as ``epoll,BPL``, or of ``all``."""
    chosen = tuple(SERVERS) if names == "all" else tuple(dict.fromkeys(names.split(",")))
    if unknown := [name for name in chosen if name not in SERVERS]:
        raise UsageError(
            f"--servers: what is {unknown[0]}?", f"all, or some of {','.join(SERVERS)}"
        )
    return chosen


class _Clock:
    """Says how much is done and how long the rest takes, from how long the rest took so far."""

    def __init__(self, grid: Grid, done: Sequence[Sample]) -> None:
        cells = sum(1 for vcpus in grid.vcpus for _ in grid.cells(vcpus))
        self.total = cells * len(grid.servers) * grid.rounds
        self.done = len(done)
        self._estimate = grid.seconds
        self._spent = sum(sample.seconds for sample in done)

    def add(self, sample: Sample) -> None:
        self.done += 1
        self._spent += sample.seconds

    def __str__(self) -> str:
        # The cells differ in length, so trust the estimate's shape and correct its scale.
        share = min(self.done / self.total, 1.0)
        whole = self._estimate if share < 0.05 else (self._spent / share)
        left = max(0.0, whole - self._spent)
        return f"{self.done} of {self.total}, about {duration(left)} left"


def measure_once(station: Station, cell: Cell, server: str, number: int, seed: int) -> Sample:
    """Return round `number` of a server (a name of `SERVERS`). Raises `ExperimentFailed`."""
    begin = time.monotonic()
    shape = LoadShape(connections(cell), cell.per_connection, cell.size, mode="rounds")
    with Session(station, SERVERS[server], shape, seed) as session:
        short, long = session.windows(*windows(cell))
    seconds = round(time.monotonic() - begin, 3)
    return Sample(cell, server, number, seed, seconds, short, long)


def _measure_cell(
    station: Station, cell: Cell, grid: Grid, journal: Journal, clock: _Clock, progress: Progress
) -> None:
    def there() -> list[Sample]:
        return [sample for sample in journal.samples if sample.cell == cell]

    for number in range(4 * grid.rounds if grid.until else grid.rounds):
        done = {sample.server for sample in there() if sample.round == number}
        if number >= grid.rounds and not done and _narrow(there(), grid):
            break
        for server in grid.servers:
            if server in done:
                continue
            progress.update(
                f"{cell.vcpus} vCPUs, {cell.size} B, {cell.life}, "
                f"round {number + 1}: {server} ({clock})"
            )
            sample = measure_once(station, cell, server, number, grid.seed + number)
            journal.add(sample)
            clock.add(sample)


def _narrow(found: Sequence[Sample], grid: Grid) -> bool:
    """Whether each server's ratio to the first is known as exactly as is wanted."""
    (comparison,) = compare.compare(found)
    ratios = [
        comparison.ratio(server, compare.instructions, grid.servers[0]) for server in grid.servers
    ]
    return all(100 * ratio.half <= grid.until for ratio in ratios if ratio is not None)


def identity(grid: Grid, built: Built) -> dict[str, Any]:
    """Return what makes two benches the same: what is measured, and with what."""
    # More rounds may be added to what there is.
    what = {key: value for key, value in asdict(grid).items() if key not in ("rounds", "until")}
    return {
        **what,
        "commands": {name: SERVERS[name] for name in grid.servers},
        "qemu": qemu_version(),
        "cpu_model": CPU_MODEL,
        "kernel": built.kernel.release,
        "kernel_key": built.kernel.key,
        "module_key": built.module.key,
        "image_key": built.image.key,
    }


def run(lab: Lab, grid: Grid, out: Path, *, fresh: bool = False) -> None:
    """Measure what is not measured yet, write the result to `out`, and print the tables."""
    progress = Progress()
    built = build_solution(lab, progress)
    journal = Journal(out, identity(grid, built))
    with journal.open(fresh=fresh):
        clock = _Clock(grid, journal.samples)
        if clock.done:
            progress.say(f"going on after {clock.done} measurements in {journal.path}")
        progress.say(f"{clock.total} measurements, {duration(grid.seconds)} or so in all")
        with progress.phase("bench"):
            for vcpus in grid.vcpus:
                cells = [cell for cell in grid.cells(vcpus) if not _complete(cell, grid, journal)]
                if not cells:
                    continue
                progress.update(f"booting with {vcpus} vCPUs")
                with Station(built, vcpus) as station:
                    for cell in cells:
                        _measure_cell(station, cell, grid, journal, clock, progress)
        made = samples.document(identity(grid, built), environment(), journal.samples)
        journal.finish(made)
    report(journal.samples, wide_console())
    progress.say(f"{out} has the counts. {progress.summary()}")


def _complete(cell: Cell, grid: Grid, journal: Journal) -> bool:
    rounds = {(s.server, s.round) for s in journal.samples if s.cell == cell}
    if not rounds.issuperset((s, r) for s in grid.servers for r in range(grid.rounds)):
        return False
    return not grid.until or _narrow([s for s in journal.samples if s.cell == cell], grid)


def environment() -> dict[str, Any]:
    """Return what it was measured with and on, beside what makes it another bench."""
    return {
        "qemu": qemu_version(),
        "cpu_model": CPU_MODEL,
        "accelerator": "tcg",
        "host_processor": _processor(),
        "host_cpus": len(os.sched_getaffinity(0)),
        "host_kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def wide_console() -> Console:
    """Return a console for tables: as wide as the terminal, and wide enough in a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=160)


def report(found: Sequence[Sample], console: Console, *, counts: bool = False) -> None:
    """Print a table for each cell, and with `counts` one of everything that the probe counts."""
    for comparison in compare.compare(found):
        console.print(table(comparison))
        if counts:
            console.print(counts_table(comparison))
    console.print(
        "± is the 95 % interval over the rounds; ratio and tax are taken round by round. "
        "instructions are those without the clock's interrupt (clock), which go with real time. "
        "tax: what is above the limit, in parts of it; removed: how much of epoll's tax is gone."
    )


def table(comparison: Comparison) -> Table:
    """Return one cell for people: per transaction, each server's counts, ratio and tax."""
    cell = comparison.cell
    rounds = len(next(iter(comparison.samples.values())))
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"{cell.life}, {cell.size} B, {cell.vcpus} vCPUs, "
        f"{connections(cell)} connections, {rounds} rounds; per transaction",
        title_justify="left",
    )
    result.add_column("server", no_wrap=True)
    for title in (
        "instructions",
        "of epoll",
        "tax",
        "removed",
        "clock",
        "system calls",
        "wake-ups",
        "files",
    ):
        result.add_column(title, justify="right", no_wrap=True)
    for server in comparison.samples:
        result.add_row(
            server,
            _number(comparison.spread(server, compare.instructions), 0),
            _percent(comparison.ratio(server, compare.instructions)),
            _percent(comparison.tax(server, compare.instructions)),
            _percent(comparison.removed(server, compare.instructions)),
            f"{comparison.spread(server, compare.clock).mean:,.0f}",
            *(
                _number(comparison.spread(server, compare.calls(name)), 2)
                for name in ("syscalls", "wakeups", "file_alloc")
            ),
        )
    return result


def counts_table(comparison: Comparison) -> Table:
    """Return every counter of one cell for people: means per transaction, side by side."""
    cell = comparison.cell
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"{cell.life}, {cell.size} B, {cell.vcpus} vCPUs: every count; per transaction",
        title_justify="left",
    )
    result.add_column("counter", no_wrap=True)
    for server in comparison.samples:
        result.add_column(server, justify="right", no_wrap=True)
    result.add_column("what it counts")

    def add(name: str, meaning: str, measure: compare.Measure, digits: int) -> None:
        spreads = [comparison.spread(server, measure) for server in comparison.samples]
        result.add_row(name, *(_number(spread, digits) for spread in spreads), meaning)

    add("user", "instructions of programs", lambda sample: sample.costs.user_instructions, 0)
    add(
        "kernel",
        "instructions of the kernel, without the clock's interrupt",
        lambda sample: sample.costs.kernel_instructions - sample.costs.clock_instructions,
        0,
    )
    for counted in EVENTS:
        if all(counted.name in s.costs.calls for each in comparison.samples.values() for s in each):
            add(counted.name, counted.meaning, compare.calls(counted.name), 2)
    return result


def _number(spread: Interval, digits: int) -> str:
    # Slopes of 0 come out on either side of it: no "-0.00".
    mean = round(spread.mean, digits) + 0.0
    return f"{mean:,.{digits}f} ± {spread.half:,.{digits}f}"


def _percent(spread: Interval | None) -> str:
    return "" if spread is None else f"{spread.mean:.1%} ± {spread.half:.1%}"
