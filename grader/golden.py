"""Golden costs: what each function on a server's path costs, to the last instruction.

One vCPU for the server, exact mode: as long as nothing that is measured changes, neither does any
number, so a number that has changed is a change of the project. `measure` counts; `compare` says
which functions have become dearer than what was accepted. Numbers hold for one kernel, one QEMU
and one CPU model only: with another there is nothing to compare.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grader import exact, results
from grader.bench import SERVERS
from grader.errors import UserError
from grader.exact import Setting
from grader.lab import LoadShape
from grader.machine import CPU_MODEL, qemu_version
from grader.probe import sources
from grader.probe.sources import Site
from grader.probe.stacks import StackReading
from grader.progress import Progress
from grader.samples import Cell
from grader.station import Built, Station, module_sections

ACCEPTED = Path(__file__).with_name("recorded") / "golden.json"
VERSION = 1
# Each with the transactions of a connection.
MEASURED = (("epoll", 1), ("BPL", 1), ("BPL", 10), ("limit", 1))
SETTING = Setting(turn=0)
# A function is dearer when one of its calls costs so many instructions more, and so much of what it
# cost. What is less comes of batches and lists that have become longer or shorter with something
# else: the same functions, called with other things to do.
LEAST_INSTRUCTIONS, LEAST_SHARE = 0.9, 0.01
# Or when a transaction calls it so much more often, and by so much of what it did: of the
# allocator's ten frees a third of one goes with the image's layout, and who calls one more is
# dearer himself. What not even every second transaction calls is the scheduler's, the allocator's,
# or done for many at a time: it goes with the moment, and of it only the sum is compared.
LEAST_CALLS, LEAST_CALLS_SHARE, OFTEN = 0.25, 0.05, 0.5
# Compared only with the sum: the scheduler's load averages, of which one call costs the more, the
# more time has passed since the last; the memory cgroup's part of a free, which does something
# only for objects in slabs that have ever held a charged one, and which these are goes with the
# image's layout, as the allocator's own work does; and charging a connection with what another
# has left, which costs nothing if none has ended yet: at a window's edge.
UNSTEADY = (
    "kernel/sched/pelt.c: ",
    "mm/memcontrol.c: __memcg_slab_free_hook",
    "net/ipv4/inet_connection_sock.c: inet_csk_charge",
)
ALL = "all functions together"


class NoGolden(UserError):
    """There are no accepted costs that these can be compared with."""


@dataclass(frozen=True)
class Cost:
    """What one function costs a number of transactions."""

    calls: int
    instructions: int
    """Of itself, without what it calls."""

    def per_call(self) -> float:
        """Return the instructions of one call."""
        return self.instructions / self.calls


@dataclass(frozen=True)
class Road:
    """What a transaction of one server costs, function by function."""

    server: str
    per_connection: int
    transactions: int
    functions: Mapping[str, Cost]
    """By ``file: name``."""

    @property
    def total(self) -> float:
        """Instructions of a transaction, user space included."""
        return sum(cost.instructions for cost in self.functions.values()) / self.transactions


@dataclass(frozen=True)
class Dearer:
    """A function that costs more than accepted."""

    server: str
    per_connection: int
    function: str
    what: str
    """Instructions or calls, and per what."""
    accepted: float
    now: float

    def __str__(self) -> str:
        life = f"n = {self.per_connection}"
        return (
            f"{self.server}, {life}: {self.function}: {self.what} {self.accepted:,.2f} -> "
            f"{self.now:,.2f}"
        )


def measure(
    built: Built, measured: Sequence[tuple[str, int]] = MEASURED, progress: Progress | None = None
) -> list[Road]:
    """Return what each function costs, for servers and transactions per connection.

    Raises `ExperimentFailed`.
    """
    progress = progress or Progress(quiet=True)
    with exact.machines() as (pool, stop):
        # Where the modules lie only the guest can say, and only when it is over: but then it lies
        # there the next time, too.
        progress.update("where the modules lie")
        _, functions = _play(built, measured[0][0], LoadShape(1, 1, mode="rounds"), (), stop)
        running = [pool.submit(_road, built, *one, functions, stop) for one in measured]
        roads = []
        for (server, per_connection), future in zip(measured, running, strict=True):
            progress.update(f"{server}, n = {per_connection}")
            roads.append(future.result())
    return roads


def _road(
    built: Built,
    server: str,
    per_connection: int,
    functions: Sequence[sources.Function],
    stop: threading.Event,
) -> Road:
    load = exact.shape(Cell(1, 64, per_connection))
    readings, found = _play(built, server, load, functions, stop)
    if found != functions:
        readings, _ = _play(built, server, load, found, stop)
    _, short, long = exact.windows(load)
    return Road(server, per_connection, long - short, _slope(readings))


def _play(
    built: Built,
    server: str,
    load: LoadShape,
    functions: Sequence[sources.Function],
    stop: threading.Event,
) -> tuple[list[StackReading], Sequence[sources.Function]]:
    """Return what was counted at each mark, and where the modules' functions lay.

    Calls are named by `functions`, where they are thought to lie.
    """
    script = exact.script(SERVERS[server], load, 1, SETTING, exact.image(built))
    station = Station(built, 2, memory_mib=exact.MEMORY_MIB, stacks=True, script=script)
    with exact.playing(station):
        station.stacks.set_modules(functions)
        readings = [station.stacks.read() for _ in station.marks(len(exact.windows(load)), stop)]
        with station:
            exact.check(station.machine.run(exact.OUTCOME).text, 1)
            found = [
                function
                for module in (built.module, built.limit)
                for function in sources.of_module(
                    module.ko, module_sections(station.machine, module.ko.stem)
                )
            ]
    return readings, found


def _slope(readings: Sequence[StackReading]) -> Mapping[str, Cost]:
    first, second = readings[1] - readings[0], readings[2] - readings[1]
    return {
        _name(site): Cost(calls, instructions)
        for site, (calls, instructions) in sorted((second - first).functions().items())
        if instructions or calls
    }


def _name(site: Site) -> str:
    return f"{site.file}: {site.name}" if site.file else site.name


# --- what was accepted --------------------------------------------------------------------------


def identity(built: Built) -> dict[str, str]:
    """Return what the costs hold for; of the project, nothing but the kernel."""
    return {
        "kernel": built.kernel.release,
        "kernel_key": built.kernel.key,
        "qemu": qemu_version(),
        "cpu_model": CPU_MODEL,
    }


def as_json(built: Built, roads: Sequence[Road]) -> dict[str, Any]:
    """Return measured costs as plain data: for each function, its calls and its instructions."""
    return {
        "version": VERSION,
        "identity": identity(built),
        "module_key": built.module.key,
        "image_key": exact.image(built).key,
        "servers": [
            {
                "server": road.server,
                "per_connection": road.per_connection,
                "transactions": road.transactions,
                "functions": {
                    name: [cost.calls, cost.instructions] for name, cost in road.functions.items()
                },
            }
            for road in roads
        ],
    }


def read(path: Path, built: Built) -> list[Road]:
    """Return the accepted costs. Raises `NoGolden` if there are none for what is at hand."""
    try:
        document = json.loads(path.read_text())
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']}")
        roads = [
            Road(
                one["server"],
                one["per_connection"],
                one["transactions"],
                {name: Cost(*numbers) for name, numbers in one["functions"].items()},
            )
            for one in document["servers"]
        ]
        accepted = document["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoGolden(f"{path} has no accepted costs: {error}", ACCEPT) from None
    here = identity(built)
    if other := [key for key, value in here.items() if accepted.get(key) != value]:
        raise NoGolden(f"{path} was accepted with another {', '.join(other)}", ACCEPT)
    return roads


ACCEPT = "`invoke golden --accept` measures and accepts; look at the difference in git"


def compare(accepted: Road, now: Road) -> list[Dearer]:
    """Return the functions on the path that cost more than accepted, dearest first."""
    found = []

    def judge(name: str, what: str, before: float, after: float, times: float) -> None:
        more = after - before
        if more > LEAST_INSTRUCTIONS and more > LEAST_SHARE * before:
            dearer = Dearer(now.server, now.per_connection, name, what, before, after)
            found.append((more * times, dearer))

    for name, cost in now.functions.items():
        before = accepted.functions.get(name, Cost(0, 0))
        calls, calls_before = cost.calls / now.transactions, before.calls / accepted.transactions
        if calls < OFTEN or name.startswith(UNSTEADY):
            continue
        if calls - calls_before > max(LEAST_CALLS, LEAST_CALLS_SHARE * calls_before):
            dearer = Dearer(
                now.server, now.per_connection, name, "calls per transaction", calls_before, calls
            )
            found.append(((calls - calls_before) * cost.per_call(), dearer))
        elif before.calls:
            judge(name, "instructions per call", before.per_call(), cost.per_call(), calls)
    judge(ALL, "instructions per transaction", accepted.total, now.total, 1)
    return [dearer for _, dearer in sorted(found, key=lambda pair: -pair[0])]


def run(built: Built, progress: Progress, accept: bool, path: Path = ACCEPTED) -> list[Dearer]:
    """Measure, and compare with what was accepted, or accept. Raises `NoGolden`."""
    accepted = [] if accept else read(path, built)
    with progress.phase("golden"):
        roads = measure(built, progress=progress)
    if accept:
        text = json.dumps(as_json(built, roads), indent=1)
        # A line for each function, as its change is to be read.
        results.write(path, re.sub(r"\[\s+(-?\d+),\s+(-?\d+)\s+\]", r"[\1, \2]", text) + "\n")
    by_name = {(road.server, road.per_connection): road for road in accepted}
    return [
        dearer
        for road in roads
        for before in [by_name.get((road.server, road.per_connection))]
        if before is not None
        for dearer in compare(before, road)
    ]
