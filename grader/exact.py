"""Exact runs: server and clients in one machine, in virtual time, the same to the last instruction.

The machine's time is the number of instructions that its CPUs have executed, nothing reaches it
from outside, and QEMU runs one CPU at a time: so two runs of the same thing differ in nothing,
whatever the host does meanwhile. The server has the first vCPUs. The clients have as many behind
them, in a network namespace of their own at the other end of a veth pair, whose packets are spread
over the CPUs of the receiving end by a hash of the flow (RPS), as by a network card's RSS. What is
counted is what the server's vCPUs execute.

What differs from the wire, where the clients are outside: no driver and no queueing discipline (in
their place veth and RPS), a CPU is interrupted by another CPU and not by a card, flows stay on the
CPU of their hash (the wire's tap moves them after the guest's sending), and virtual time passes for
all CPUs together, so that the clock ticks the more often for a CPU the more CPUs there are.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from grader import bench, compare, samples
from grader.bench import SERVERS, Grid
from grader.checks import Interval
from grader.compare import Comparison
from grader.errors import UsageError
from grader.experiment import (
    PORT,
    Costs,
    ExperimentFailed,
    Failure,
    Window,
    machine_failure,
    slope,
)
from grader.lab import Lab, LoadShape
from grader.load import build_loadgen
from grader.machine import MachineError
from grader.probe import Counters
from grader.probe.lock_file import Locks
from grader.probe.memory import GuestMemory
from grader.probe.sharing_file import Transfers
from grader.progress import Progress, duration
from grader.samples import Cell, Journal, LockUse, Sample
from grader.station import Built, Script, Station, build_solution
from images.build import Image, build_image
from kernel.build import build_turns

CONNECTIONS_PER_VCPU = 16
# Of the server; the clients have as many again, and a machine at most 64.
MAX_SERVERS = 32
# Ticks of the PIT, 838 ns each; an instruction is a nanosecond.
TURN = 12
MAX_TURN = 65535
# Nothing has come for so long: a window has drained. Of virtual time, in which nothing is late but
# by a timer of its own; acknowledgements are never delayed here.
QUIET_MS = 5
MEMORY_MIB = 512
# What a lock costs beside its instructions: its line must come from the CPU that had it last.
LOCKS = ("_raw_spin_lock", "_raw_spin_trylock", "_raw_read_lock", "_raw_write_lock",
         "native_queued_spin_lock_slowpath", "queued_read_lock_slowpath",
         "queued_write_lock_slowpath", "mutex_lock", "mutex_trylock")  # fmt: skip
# A lock that is taken so often per transaction, and by more than one CPU, is shown by itself, and
# others of its name together; names of which all locks together are taken less often have none.
LEAST_VISITS = 0.02
OTHER_LOCKS = "others"
# Asks the guest, when all is over, how it ended.
OUTCOME = "cat /run/boot.status /run/boot.output"
# Names of counts beside those of the probe, see `Window.calls`.
TRANSFERS, HANDOVERS = "transfers", "lock_handovers"


@dataclass(frozen=True)
class Setting:
    """What is the same for all cells of a bench."""

    turn: int = TURN
    """How long a vCPU runs before the next one does, in ticks of the PIT; 0: until a timer."""
    sharing: bool = False
    """Also count the cache lines that move to the server's vCPUs, and what they do with locks."""

    def __post_init__(self) -> None:
        if self.turn == 1 or not 0 <= self.turn <= MAX_TURN:
            raise UsageError(f"--turn: 0, or 2 to {MAX_TURN} ticks", "see --help bench")


def image(built: Built) -> Image:
    """Return the image with which `built` can be run in exact mode."""
    modules = [built.module.ko, built.limit.ko, build_turns(built.kernel).ko]
    return build_image(built.programs, modules, [build_loadgen(static=True)])


@contextmanager
def machines(at_a_time: int = 0) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Lend threads to run so many machines in (0: one for each of the host's CPUs).

    If the block is left by an exception, the event is set, on which `measure` ends its machine,
    and what has not begun does not.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(at_a_time or len(os.sched_getaffinity(0))) as pool:
        try:
            yield pool, stop
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def connections(cell: Cell) -> int:
    """Return how many connections are open at a time in a bench, over all clients."""
    return CONNECTIONS_PER_VCPU * cell.vcpus


def shape(cell: Cell) -> LoadShape:
    """Return the load of a cell of a bench."""
    return LoadShape(connections(cell), cell.per_connection, cell.size, mode="rounds")


def windows(load: LoadShape) -> tuple[int, int, int]:
    """Return the transactions of the warm-up and the two windows, over all clients."""
    n = load.transactions_per_connection
    unit = load.connections * max(1, n)
    return (unit, *bench.windows(Cell(1, load.size, n), load.connections))


def script(
    server: str, load: LoadShape, vcpus: int, setting: Setting, made: Image, *more: str
) -> Script:
    """Return what the machine does: serve with the command `server` on so many vCPUs.

    `more` are options for the load generators. `ValueError` if the connections cannot be shared
    out to as many clients.
    """
    if load.connections % vcpus:
        raise ValueError(f"{load.connections} connections for {vcpus} clients")
    words = [
        *("exact", vcpus, vcpus, setting.turn, PORT),
        ",".join(str(length // vcpus) for length in windows(load)),
        *("--connections", load.connections // vcpus),
        *("--transactions-per-connection", load.transactions_per_connection),
        *("--size", load.size, "--mode", load.mode, "--close", load.close),
        *("--pause", load.pause_us, "--quiet", QUIET_MS, *more),
        *("--", server, "--buffer", max(4096, min(load.size, 65536))),
    ]
    return Script(" ".join(map(str, words)), made, vcpus)


@dataclass(frozen=True)
class Reading:
    """All that is counted, at a mark."""

    counters: Counters
    transfers: Transfers | None
    locks: Locks | None


@dataclass(frozen=True)
class Measured:
    """What was counted in the two windows, and done with locks in both together."""

    short: Window
    long: Window
    locks: tuple[LockUse, ...]

    @property
    def costs(self) -> Costs:
        """What one transaction cost."""
        return slope(self.short, self.long)


@contextmanager
def playing(station: Station) -> Iterator[None]:
    """Start a station with a script, and end it; a guest that is lost is `ExperimentFailed`."""
    try:
        station.start()
        yield
    except MachineError as error:
        raise ExperimentFailed(machine_failure(error)) from None
    finally:
        station.close()


def measure(
    built: Built,
    made: Image,
    server: str,
    load: LoadShape,
    vcpus: int,
    setting: Setting,
    stop: threading.Event,
) -> Measured:
    """Boot a machine that serves a load with the command `server`, and count in two windows.

    Raises `ExperimentFailed`, or `Stopped`.
    """
    station = Station(
        built,
        2 * vcpus,
        memory_mib=MEMORY_MIB,
        sharing=setting.sharing,
        locks=setting.sharing,
        script=script(server, load, vcpus, setting, made),
    )
    lengths = windows(load)
    # Looked at whenever the guest stands still: what is freed in between keeps its name.
    memory: GuestMemory | None = None
    used: tuple[LockUse, ...] = ()
    with playing(station):
        readings = []
        for _ in station.marks(len(lengths), stop):
            readings.append(_read(station))
            if setting.sharing and memory is None:
                memory = station.sharing.guest_memory()
            elif memory is not None:
                memory.look()
        if memory is not None:
            used = _locks(readings, memory, sum(lengths[1:]))
        with station:
            check(station.machine.run(OUTCOME).text, vcpus)
            functions = station.sharing.functions() if setting.sharing else []
    short, long = (
        _window(length, before, after, vcpus, functions)
        for length, before, after in zip(lengths[1:], readings, readings[1:], strict=False)
    )
    return Measured(short, long, used)


def measure_cell(
    built: Built, made: Image, cell: Cell, server: str, setting: Setting, stop: threading.Event
) -> Sample:
    """Measure a server of a bench (a name of `SERVERS`) in one cell."""
    begin = time.monotonic()
    found = measure(built, made, SERVERS[server], shape(cell), cell.vcpus, setting, stop)
    seconds = round(time.monotonic() - begin, 3)
    return Sample(cell, server, 0, 1, seconds, found.short, found.long, found.locks, exact=True)


def _read(station: Station) -> Reading:
    transfers = locks = None
    if station.has_sharing:
        transfers, locks = station.sharing.read(), station.locks.read()
        station.sharing.record()
        station.locks.record()
    return Reading(station.probe.read(), transfers, locks)


def _locks(
    readings: Sequence[Reading], memory: GuestMemory, transactions: int
) -> tuple[LockUse, ...]:
    first, last = readings[0].locks, readings[-1].locks
    if first is None or last is None:
        return ()
    return lock_uses(last - first, lambda address: str(memory.identify(address)), transactions)


def lock_uses(used: Locks, name: Callable[[int], str], transactions: int) -> tuple[LockUse, ...]:
    """Sum up what was done with locks, by what `name` says of their addresses; the busiest first.

    One that is taken in so many transactions as `LEAST_VISITS` says, and handed over, stands by
    itself.
    """
    often = LEAST_VISITS * transactions
    alone: list[LockUse] = []
    together: dict[str, LockUse] = {}
    for row in np.flatnonzero(used.visits):
        visits, held, handovers = (
            int(column[row]) for column in (used.visits, used.held, used.handovers)
        )
        use = LockUse(name(int(used.vaddr[row])), 1, visits, held, handovers)
        if visits >= often and handovers:
            alone.append(use)
        else:
            together[use.name] = _sum(use.name, together.get(use.name), use)
    rare = None
    for each, use in list(together.items()):
        if use.visits < often:
            rare = _sum(OTHER_LOCKS, rare, together.pop(each))
    found = [*alone, *together.values(), *([rare] if rare else [])]
    return tuple(sorted(found, key=lambda use: (-use.held, use.name, -use.visits)))


def _sum(name: str, one: LockUse | None, other: LockUse) -> LockUse:
    if one is None:
        return replace(other, name=name)
    return LockUse(
        name,
        one.locks + other.locks,
        one.visits + other.visits,
        one.held + other.held,
        one.handovers + other.handovers,
    )


def check(said: str, clients: int) -> None:
    """Raise `ExperimentFailed` unless every client has had every byte: the guest's word for it."""
    status, *lines = said.splitlines() or [""]
    if status != "0":
        text = "\n".join(line for line in lines if not line.startswith("{"))[-500:]
        raise ExperimentFailed(
            Failure("fail", f"the run ended with status {status or '?'}: {text}")
        )
    try:
        results = [json.loads(line) for line in lines if line.startswith("{")]
        good = sum(result["outcome"] == "complete" for result in results)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"what the clients say makes no sense: {error}"
        raise ExperimentFailed(Failure("fail", reason)) from None
    if good != clients:
        raise ExperimentFailed(Failure("fail", f"of {clients} clients {good} had all replies"))


def _window(
    length: int, before: Reading, after: Reading, servers: int, functions: Sequence[str]
) -> Window:
    moved = after.counters - before.counters
    calls = {name: int(count[:servers].sum()) for name, count in moved.functions.items()}
    if before.transfers is not None and after.transfers is not None:
        lines = after.transfers - before.transfers
        calls[TRANSFERS] = lines.loads + lines.stores
        codes = [code for code, name in enumerate(functions) if name.startswith(LOCKS)]
        rows = (lines.row_loads + lines.row_stores)[np.isin(lines.code, codes)]
        calls[HANDOVERS] = int(rows.sum())
    user, kernel, clock = (
        int(count[:servers].sum()) for count in (moved.user, moved.kernel, moved.clock)
    )
    return Window(length, user, kernel, clock, calls)


def run(
    lab: Lab, grid: Grid, setting: Setting, out: Path, *, fresh: bool = False, jobs: int = 0
) -> None:
    """Measure what is not measured yet, write the result to `out`, and print the tables.

    So many machines run at a time as `jobs` says (0: as many as the host has CPUs): no count
    depends on it.
    """
    if max(grid.vcpus) > MAX_SERVERS:
        raise UsageError(
            f"--smp: in exact mode a server has at most {MAX_SERVERS}, for clients have as many",
            f"leave out what is above {MAX_SERVERS}",
        )
    progress = Progress()
    built = build_solution(lab, progress)
    made = image(built)
    identity = {**bench.identity(grid, built), "image_key": made.key, "exact": asdict(setting)}
    journal = Journal(out, identity)
    with journal.open(fresh=fresh), progress.phase("exact"):
        known = {(sample.cell, sample.server) for sample in journal.samples}
        # The longest first, so that none of them is left for the end.
        wanted = [
            (cell, server)
            for vcpus in sorted(grid.vcpus, reverse=True)
            for cell in sorted(grid.cells(vcpus), key=lambda cell: -windows(shape(cell))[-1])
            for server in grid.servers
            if (cell, server) not in known
        ]
        if known:
            progress.say(f"going on after {len(known)} measurements in {journal.path}")
        _measure_all(built, made, wanted, setting, journal, progress, jobs)
        order = {(cell, server): number for number, (cell, server) in enumerate(_order(grid))}
        found = sorted(journal.samples, key=lambda sample: order[sample.cell, sample.server])
        journal.finish(samples.document(identity, bench.environment(), found))
    report(found, bench.wide_console())
    progress.say(f"{out} has the counts. {progress.summary()}")


def _order(grid: Grid) -> Iterator[tuple[Cell, str]]:
    for vcpus in grid.vcpus:
        for cell in grid.cells(vcpus):
            for server in grid.servers:
                yield cell, server


def _measure_all(
    built: Built,
    made: Image,
    wanted: Sequence[tuple[Cell, str]],
    setting: Setting,
    journal: Journal,
    progress: Progress,
    jobs: int,
) -> None:
    weight = {pair: 1 + sum(windows(shape(pair[0]))) / 5000 for pair in wanted}
    whole, gone, begin = sum(weight.values()), 0.0, time.monotonic()
    with machines(jobs) as (pool, stop):
        running = {
            pool.submit(measure_cell, built, made, cell, server, setting, stop): (cell, server)
            for cell, server in wanted
        }
        for number, done in enumerate(as_completed(running), 1):
            journal.add(done.result())
            gone += weight[running[done]]
            left = (time.monotonic() - begin) * (whole - gone) / gone
            progress.update(f"{number} of {len(wanted)}, about {duration(left)} left")


def transfers(found: Sequence[Sample]) -> dict[Cell, dict[str, float]]:
    """Return each server's transfers per transaction by cell, where they were counted."""
    moved: dict[Cell, dict[str, float]] = {}
    for sample in found:
        if TRANSFERS in sample.short.calls:
            moved.setdefault(sample.cell, {})[sample.server] = sample.costs.calls[TRANSFERS]
    return moved


def report(found: Sequence[Sample], console: Console, *, counts: bool = False) -> None:
    """Print a table for each cell, and with `counts` one of everything that the probe counts."""
    for comparison in compare.compare(found, least=1):
        console.print(_table(comparison))
        if counts:
            console.print(bench.counts_table(comparison))
    console.print(
        "Counted on the server's vCPUs, in virtual time: the same in each run. On several vCPUs a "
        "difference of a few percent means nothing all the same, for another order of turns has "
        "other batches. instructions are those without the clock's interrupt (clock). tax: what is "
        "above the limit, in parts of it; removed: how much of epoll's tax is gone. transfers: "
        "cache lines that another CPU had."
    )


def _table(comparison: Comparison) -> Table:
    cell = comparison.cell
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"{cell.life}, {cell.size} B, {cell.vcpus} server vCPUs, "
        f"{connections(cell)} connections; per transaction",
        title_justify="left",
    )
    result.add_column("server", no_wrap=True)
    columns: dict[str, Callable[[str], str]] = {
        "instructions": lambda one: f"{comparison.spread(one, compare.instructions).mean:,.0f}",
        "of epoll": lambda one: _percent(comparison.ratio(one, compare.instructions)),
        "tax": lambda one: _percent(comparison.tax(one, compare.instructions)),
        "removed": lambda one: _percent(comparison.removed(one, compare.instructions)),
        "clock": lambda one: f"{comparison.spread(one, compare.clock).mean:,.0f}",
    }
    counts = {"system calls": "syscalls", "wake-ups": "wakeups", "files": "file_alloc"}
    if all(TRANSFERS in each[0].short.calls for each in comparison.samples.values()):
        counts |= {"transfers": TRANSFERS, "of locks": HANDOVERS}
    for title, name in counts.items():
        columns[title] = partial(_calls, comparison, name)
    for title in columns:
        result.add_column(title, justify="right", no_wrap=True)
    for server in comparison.samples:
        result.add_row(server, *(show(server) for show in columns.values()))
    return result


def _calls(comparison: Comparison, name: str, server: str) -> str:
    return f"{comparison.spread(server, compare.calls(name)).mean + 0.0:,.2f}"


def _percent(value: Interval | None) -> str:
    return "" if value is None else f"{value.mean:.1%}"
