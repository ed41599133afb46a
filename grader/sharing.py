"""Sharing: which cache lines a server makes move between CPUs, per transaction, and who moves them.

Like a cost, the number of transfers of a transaction is the slope between a short and a long
window (see `grader.experiment`), over all vCPUs. What a transfer is says `grader/probe/sharing.c`.
The clock's interrupt is left out, as from instructions: it goes with real time, and an emulated
machine needs more of that for each transaction than a real one. So do, in part, the scheduler and
what reads the time that the interrupt has written: their lines weigh too much here, the same for
every server that takes as long.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from grader import bench, results
from grader.bench import SERVERS, Grid
from grader.errors import UsageError
from grader.experiment import Session
from grader.lab import Lab, LoadShape
from grader.probe.memory import KINDS, GuestMemory, Thing
from grader.probe.sharing_file import Transfers
from grader.progress import Progress
from grader.samples import BadResult, Cell
from grader.station import Station, build_solution, module_symbols

VERSION = 2
TOP = 20
# Times as long as those of a bench: pages and slabs wander more slowly than transactions.
WINDOWS = 4
LOOK_SECONDS = 0.2
# Caches of objects of one size are otherwise one, under the name of the first.
KERNEL_ARGS = ("slab_nomerge",)


@dataclass(frozen=True)
class Moved:
    """Transfers per transaction."""

    loads: float
    stores: float

    @property
    def all(self) -> float:
        """Both together."""
        return self.loads + self.stores


@dataclass(frozen=True)
class FunctionShare:
    """The transfers that one function causes, per transaction."""

    name: str
    moved: Moved


@dataclass(frozen=True)
class LineShare:
    """The transfers of one line, or of the same line of many objects of a kind."""

    kind: str
    """One of `KINDS`."""
    name: str
    object: str
    """What the line is part of: the name without an offset."""
    lines: int
    """How many different lines of memory these are."""
    moved: Moved
    functions: tuple[FunctionShare, ...]
    """Who touches it, most first: stores make it move away, loads fetch it back."""


@dataclass(frozen=True)
class Sharing:
    """What a server makes move."""

    server: str
    transactions_per_connection: int
    windows: tuple[int, int]
    """Transactions of the short and the long window."""
    moved: Moved
    user: Moved
    """The part of `moved` that user code causes."""
    clock: Moved
    """Not in `moved`: what the clock's interrupt causes, which goes with real time."""
    merged: float
    """Read-modify-writes whose load and store count as one transfer; with these added, the count is
    of accesses."""
    unattributed: float
    """Of `moved`, what found no room in the probe's table and is in none of the following."""
    kinds: Mapping[str, Moved]
    functions: tuple[FunctionShare, ...]
    lines: tuple[LineShare, ...]

    @property
    def per_connection(self) -> float:
        """Transfers in the life of a connection."""
        return self.moved.all * self.transactions_per_connection

    @property
    def objects(self) -> dict[str, Moved]:
        """What the lines are part of, most moved first: all lines of all objects of one name."""
        found: dict[str, Moved] = {}
        for line in self.lines:
            sum_ = found.get(line.object, Moved(0.0, 0.0))
            found[line.object] = Moved(
                sum_.loads + line.moved.loads, sum_.stores + line.moved.stores
            )
        return dict(sorted(found.items(), key=lambda item: -item[1].all))


@dataclass
class _Count:
    """Transfers in the short and in the long window."""

    loads: int = 0
    stores: int = 0

    def add(self, loads: int, stores: int) -> None:
        """Add so many of the long window, or take away so many of the short one."""
        self.loads += loads
        self.stores += stores

    def per(self, span: int) -> Moved:
        return Moved(self.loads / span, self.stores / span)


def summarize(
    server: str,
    n: int,
    windows: tuple[int, int],
    short: Transfers,
    long: Transfers,
    functions: Sequence[str],
    things: Mapping[int, Thing],
) -> Sharing:
    """Return what a transaction moves, from the transfers in two windows.

    `functions` names the codes, `things` says of each virtual address in the readings what is
    there. Nothing is left out: rows that are small are there, too, see `Sharing.lines`.
    """
    span = windows[1] - windows[0]
    by_function: dict[str, _Count] = defaultdict(_Count)
    by_kind: dict[str, _Count] = defaultdict(_Count)
    by_thing: dict[Thing, _Count] = defaultdict(_Count)
    by_both: dict[tuple[Thing, str], _Count] = defaultdict(_Count)
    lines: dict[Thing, set[int]] = defaultdict(set)
    for sign, window in ((-1, short), (1, long)):
        for code, line, vaddr, loads, stores in _rows(window):
            function, thing = functions[code], things[vaddr]
            lines[thing].add(line)
            for count in (
                by_function[function],
                by_kind[thing.kind],
                by_thing[thing],
                by_both[thing, function],
            ):
                count.add(sign * loads, sign * stores)
    touching: dict[Thing, list[FunctionShare]] = defaultdict(list)
    for (thing, function), count in by_both.items():
        touching[thing].append(FunctionShare(function, count.per(span)))

    def total(which: str) -> float:
        return float((getattr(long, which) - getattr(short, which)).sum() / span)

    user = Moved(total("user_loads"), total("user_stores"))
    return Sharing(
        server=server,
        transactions_per_connection=n,
        windows=windows,
        moved=Moved(user.loads + total("kernel_loads"), user.stores + total("kernel_stores")),
        user=user,
        clock=Moved(total("clock_loads"), total("clock_stores")),
        merged=total("merged"),
        unattributed=total("overflow"),
        kinds={kind: by_kind[kind].per(span) for kind in KINDS if kind in by_kind},
        functions=_sorted(FunctionShare(f, count.per(span)) for f, count in by_function.items()),
        lines=tuple(
            sorted(
                (
                    LineShare(
                        thing.kind,
                        str(thing),
                        thing.name,
                        len(lines[thing]),
                        count.per(span),
                        _sorted(touching[thing]),
                    )
                    for thing, count in by_thing.items()
                ),
                key=lambda share: -share.moved.all,
            )
        ),
    )


def _rows(window: Transfers) -> Iterable[tuple[int, int, int, int, int]]:
    """Return code, line, virtual address, loads and stores of what moved in a window."""
    moved = (window.row_loads != 0) | (window.row_stores != 0)
    columns = (window.code, window.line, window.vaddr, window.row_loads, window.row_stores)
    return zip(*(column[moved].tolist() for column in columns), strict=True)


def _sorted(shares: Iterable[FunctionShare]) -> tuple[FunctionShare, ...]:
    return tuple(sorted(shares, key=lambda share: -share.moved.all))


def measure_sharing(
    station: Station, server: str, shape: LoadShape, seed: int, windows: int = WINDOWS
) -> Sharing:
    """Run `server` (a command) in a station with a sharing probe, and return what it moves.

    It is counted in windows so many times as long as a bench's. Raises `ExperimentFailed` if the
    server does not get through the load.
    """
    probe = station.sharing
    cell = Cell(station.machine.config.vcpus, shape.size, shape.transactions_per_connection)
    short, long = (windows * length for length in bench.windows(cell, shape.connections))
    readings = []
    with ExitStack() as stack:
        session = stack.enter_context(Session(station, server, shape, seed))
        # A server may have loaded one.
        probe.set_modules(module_symbols(station.machine))
        memory = stack.enter_context(_watched(probe.guest_memory()))
        readings.append(probe.read())
        for transactions in (short, long):
            with probe.recording():
                session.run(transactions)
            readings.append(probe.read())
        # As long as the server and its connections are there: later their memory is something else.
        memory.look()
        moved = readings[1] - readings[0], readings[2] - readings[1]
        addresses = {row[2] for window in moved for row in _rows(window)}
        things = {address: memory.identify(address) for address in addresses}
    n = shape.transactions_per_connection
    return summarize(server, n, (short, long), *moved, probe.functions(), things)


@contextmanager
def _watched(memory: GuestMemory) -> Iterator[GuestMemory]:
    """Look at the memory again and again during the ``with`` block: pages come and go."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            memory.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def as_json(sharing: Sharing, top: int = TOP) -> dict[str, Any]:
    """Return the figures as plain data, with the first `top` functions and lines.

    Counts are per transaction; those in `per_connection` per connection.
    """
    data = asdict(sharing)
    data["per_connection"] = sharing.per_connection
    objects = list(sharing.objects.items())[:top]
    data["objects"] = [{"name": name, "moved": asdict(moved)} for name, moved in objects]
    data["functions"] = data["functions"][:top]
    data["lines"] = data["lines"][:top]
    for line in data["lines"]:
        line["functions"] = line["functions"][:top]
    # JSON has arrays where Python has tuples.
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def run(lab: Lab, grid: Grid, out: Path) -> None:
    """Measure servers in turn, `grid.rounds` times, print tables, write the result to `out`.

    Of the grid, the first number of vCPUs and the first size are used.
    """
    if min(grid.per_connection) < 1:
        raise UsageError("--sharing: transfers are those of connections that end", "leave out 0")
    progress, console = Progress(), bench.wide_console()
    built = build_solution(lab, progress)
    vcpus = grid.vcpus[0]
    found: dict[int, dict[str, list[Sharing]]] = {
        n: {server: [] for server in grid.servers} for n in grid.per_connection
    }
    with progress.phase("sharing"):
        progress.update(f"booting with {vcpus} vCPUs")
        with Station(built, vcpus, counted=False, sharing=True, kernel_args=KERNEL_ARGS) as station:
            machine = station.machine.environment()
            for n, measured in found.items():
                cell = Cell(vcpus, grid.sizes[0], n)
                shape = LoadShape(bench.connections(cell), n, cell.size, mode="rounds")
                for number in range(grid.rounds):
                    for server in grid.servers:
                        progress.update(f"n = {n}, round {number + 1} of {grid.rounds}: {server}")
                        one = measure_sharing(station, SERVERS[server], shape, grid.seed + number)
                        measured[server].append(one)
    for n, measured in found.items():
        console.print(overview(n, measured))
        for server, sharings in measured.items():
            tables(server, sharings[-1], console)
    console.print(EXPLANATION)
    document = {
        "version": VERSION,
        "identity": bench.identity(grid, built),
        "machine": machine,
        "cells": [
            {
                "vcpus": vcpus,
                "size": grid.sizes[0],
                "per_connection": n,
                "servers": {
                    name: [as_json(one) for one in each] for name, each in found[n].items()
                },
            }
            for n in found
        ],
    }
    results.write(out, json.dumps(document, indent=2) + "\n")
    progress.say(f"{out} has the counts. {progress.summary()}")


def read_transfers(path: Path, identity: Mapping[str, Any]) -> dict[Cell, dict[str, float]]:
    """Return the transfers per transaction of each server in a result of `run`, by cell.

    Raises `BadResult` if that is none, or not of the kernel and the module of `identity`.
    """
    try:
        document = json.loads(path.read_text())
        for key in ("kernel_key", "module_key"):
            if document["identity"][key] != identity[key]:
                raise BadResult(
                    f"{path} was measured with another {key.removesuffix('_key')}",
                    "measure again: invoke bench --sharing",
                )
        return {
            Cell(cell["vcpus"], cell["size"], cell["per_connection"]): {
                server: fmean(one["moved"]["loads"] + one["moved"]["stores"] for one in rounds)
                for server, rounds in cell["servers"].items()
            }
            for cell in document["cells"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadResult(
            f"{path} is no result of bench --sharing: {error}", "name another file"
        ) from None


EXPLANATION = (
    "A transfer: a load that finds its line in another CPU's cache and not in its own, or a store "
    "that takes a line away from another's; in a model with caches that hold everything. What the "
    "network card writes is not seen, and vCPUs take turns: this is less than on a real machine. "
    "Those of the clock's interrupt (clock, per transaction) go with real time, and are in no "
    "other column or table; the scheduler's, which also go with time, are more than there."
)


def overview(n: int, measured: Mapping[str, Sequence[Sharing]]) -> Table:
    """Return the servers side by side: the transfers of each round."""
    result = Table(
        box=box.SIMPLE_HEAD,
        title=f"n = {n}: cache lines that move between CPUs, each round",
        title_justify="left",
    )
    result.add_column("server", no_wrap=True)
    for title in ("per transaction", "by loads", "by stores", "per connection", "clock"):
        result.add_column(title, justify="right", no_wrap=True)
    for server, found in measured.items():
        result.add_row(
            server,
            *(
                ", ".join(f"{value:,.1f}" for value in values)
                for values in (
                    [one.moved.all for one in found],
                    [one.moved.loads for one in found],
                    [one.moved.stores for one in found],
                    [one.per_connection for one in found],
                    [one.clock.all for one in found],
                )
            ),
        )
    return result


def tables(server: str, sharing: Sharing, console: Console, top: int = TOP) -> None:
    """Print which functions and which lines: per transaction, the first `top` of each."""
    functions = ((one.name, one.moved) for one in sharing.functions[:top])
    title = f"{server}: functions that fetch lines or take them away; per transaction"
    console.print(_ranking(title, "function", functions))
    title = f"{server}: what the lines that move are part of; per transaction"
    console.print(_ranking(title, "what", list(sharing.objects.items())[:top]))
    lines = Table(
        box=box.SIMPLE_HEAD,
        title=f"{server}: lines that move; per transaction",
        title_justify="left",
    )
    lines.add_column("what", no_wrap=True)
    lines.add_column("kind", no_wrap=True)
    for title in ("lines", "transfers", "by loads", "by stores"):
        lines.add_column(title, justify="right", no_wrap=True)
    lines.add_column("who touches it (r: loads, w: stores)")
    for line in sharing.lines[:top]:
        who = ", ".join(f"{one.name} {_roles(one.moved)}" for one in line.functions[:4])
        lines.add_row(line.name, line.kind, f"{line.lines:,}", *_numbers(line.moved), who)
    console.print(lines)


def _ranking(title: str, column: str, rows: Iterable[tuple[str, Moved]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    result.add_column(column, no_wrap=True)
    for heading in ("transfers", "by loads", "by stores"):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, moved in rows:
        result.add_row(name, *_numbers(moved))
    return result


def _numbers(moved: Moved) -> list[str]:
    return [f"{value + 0.0:,.2f}" for value in (moved.all, moved.loads, moved.stores)]


def _roles(moved: Moved) -> str:
    words = [
        f"{letter} {value:.2f}"
        for letter, value in (("r", moved.loads), ("w", moved.stores))
        if abs(value) >= 0.005
    ]
    return " ".join(words)
