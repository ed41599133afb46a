"""Where the instructions go: what a transaction costs, layer by layer, servers side by side.

Every instruction of the guest is counted at its call path, outside the guest (`StackProbe`). As
with all costs, a number per transaction is the slope between a short and a long window, over all
vCPUs; only the distribution is new. A function is charged to its layer (`grader.layers`) with
what it executes itself, not with what it calls.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from grader import bench, flame, results
from grader.checks import Interval, interval
from grader.errors import UsageError
from grader.experiment import Session
from grader.lab import Lab, LoadShape
from grader.layers import LAYERS, OTHER, charged, layer_of, title
from grader.probe import Total
from grader.probe.sources import Site
from grader.probe.stacks import CallPath, StackReading
from grader.progress import Progress
from grader.samples import Cell
from grader.station import Station, build_solution

SEED = 1
# Reading takes some milliseconds, and an idle guest still has its clocks: so often it is tried
# to have no more than so many instructions meanwhile.
READINGS = 20
IDLE_INSTRUCTIONS = 20_000
FUNCTIONS = 25

Paths = Mapping[CallPath, float]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Profile:
    """One server at one number of transactions per connection."""

    server: str
    command: str
    cell: Cell
    rounds: tuple[Paths, ...]
    """Of each round: call path -> instructions per transaction of its last function itself."""
    counted: tuple[float, ...]
    """Of each round: instructions per transaction as the standard probe counts them."""

    @functools.cached_property
    def paths(self) -> Paths:
        """The mean over all rounds."""
        return _mean(self.rounds)

    def layer(self, name: str) -> Interval:
        """Return a layer's instructions per transaction: mean and 95 % interval."""
        return interval([layers(paths).get(name, 0.0) for paths in self.rounds])

    @property
    def total(self) -> Interval:
        """All instructions per transaction."""
        return interval([sum(paths.values()) for paths in self.rounds])

    def functions(self) -> dict[Site, float]:
        """Return function -> instructions per transaction of itself, most first."""
        found = _by(self.paths, lambda path: path[-1])
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def per_connection(self) -> int:
        """Transactions of a connection."""
        return self.cell.per_connection

    def record(self) -> dict[str, Any]:
        """Return this as plain data, in instructions per transaction."""
        by_layer = [layers(paths) for paths in self.rounds]
        return {
            "server": self.server,
            "command": self.command,
            **asdict(self.cell),
            "instructions": [round(sum(paths.values()), 1) for paths in self.rounds],
            "counted_by_probe": [round(count, 1) for count in self.counted],
            "layers": {
                name: [round(one.get(name, 0.0), 1) for one in by_layer]
                for name in LAYERS
                if any(name in one for one in by_layer)
            },
            "functions": [
                {"name": site.name, "file": site.file, "instructions": round(count, 1)}
                for site, count in self.functions().items()
                if abs(count) >= 1
            ],
        }


def layers(paths: Paths) -> dict[str, float]:
    """Return layer -> instructions per transaction."""
    return _by(paths, charged)


def _by(paths: Paths, key: Callable[[CallPath], Key]) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for path, count in paths.items():
        group = key(path)
        found[group] = found.get(group, 0.0) + count
    return found


def _mean(rounds: Sequence[Paths]) -> Paths:
    mean: dict[CallPath, float] = {}
    for paths in rounds:
        for path, count in paths.items():
            mean[path] = mean.get(path, 0.0) + count / len(rounds)
    return mean


def slope(first: StackReading, second: StackReading, span: int) -> Paths:
    """Return the instructions per transaction of `second` that `first` does not have."""
    return {path: count / span for path, count in (second - first).paths().items()}


def measure(
    station: Station,
    cell: Cell,
    rounds: int,
    progress: Progress,
    servers: Sequence[str],
) -> list[Profile]:
    """Measure the servers (names of `bench.SERVERS`) in turn. Raises `ExperimentFailed`."""
    found: dict[str, list[tuple[Paths, float]]] = {name: [] for name in servers}
    for number in range(rounds):
        for name in servers:
            progress.update(f"n = {cell.per_connection}, round {number + 1} of {rounds}: {name}")
            found[name].append(measure_once(station, name, cell, SEED + number))
    return [
        Profile(
            server=name,
            command=bench.SERVERS[name],
            cell=cell,
            rounds=tuple(paths for paths, _ in found[name]),
            counted=tuple(count for _, count in found[name]),
        )
        for name in servers
    ]


def measure_once(station: Station, server: str, cell: Cell, seed: int) -> tuple[Paths, float]:
    """Return one round: instructions by call path, and all that the standard probe counts.

    Both are per transaction. Raises `ExperimentFailed`.
    """
    shape = LoadShape(bench.connections(cell), cell.per_connection, cell.size, mode="rounds")
    with Session(station, bench.SERVERS[server], shape, seed) as session:
        # A server may have brought its module.
        station.name_modules()
        return _costs(station, session, *bench.windows(cell))


def _costs(station: Station, session: Session, short: int, long: int) -> tuple[Paths, float]:
    readings: list[tuple[StackReading, Total]] = [_read(station)]
    for transactions in (short, long):
        session.run(transactions)
        readings.append(_read(station))
    stacks = [stacks for stacks, _ in readings]
    counts = [total.instructions for _, total in readings]
    span = long - short
    paths = slope(stacks[1] - stacks[0], stacks[2] - stacks[1], span)
    return paths, (counts[2] - 2 * counts[1] + counts[0]) / span


def _read(station: Station) -> tuple[StackReading, Total]:
    """Read both probes while the guest does nothing, or next to nothing."""
    tries = []
    for _ in range(READINGS):
        before = station.probe.read().total
        stacks = station.stacks.read()
        between = station.probe.read().total.instructions - before.instructions
        tries.append((between, stacks, before))
        if between < IDLE_INSTRUCTIONS:
            break
    _, stacks, before = min(tries, key=lambda one: one[0])
    return stacks, before


# --- for people -------------------------------------------------------------------------------


def layers_table(profiles: Sequence[Profile]) -> Table:
    """Return instructions per transaction by layer, and how each differs from the first."""
    first = profiles[0]
    result = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    result.title = f"instructions per transaction, n = {first.per_connection}"
    result.add_column("layer", no_wrap=True)
    for profile in profiles:
        result.add_column(profile.server, justify="right", no_wrap=True)
        if profile is not first:
            result.add_column(f"- {first.server}", justify="right", no_wrap=True)

    def add(name: str, spreads: Sequence[Interval]) -> None:
        cells = [_cell(spreads[0])]
        for spread in spreads[1:]:
            cells += [_cell(spread), f"{spread.mean - spreads[0].mean:+,.0f}"]
        result.add_row(name, *cells)

    for layer in LAYERS:
        spreads = [profile.layer(layer) for profile in profiles]
        if any(abs(spread.mean) >= 0.5 for spread in spreads):
            add(title(layer), spreads)
    result.add_section()
    totals = [profile.total for profile in profiles]
    add("all", totals)
    shares = (
        f"{100 * profile.layer(OTHER).mean / total.mean:.1f} % of {profile.server}"
        for profile, total in zip(profiles, totals, strict=True)
    )
    result.caption = f"in no layer (other): {', '.join(shares)}"
    return result


def _cell(spread: Interval) -> str:
    return f"{spread.mean + 0.0:,.0f} ± {spread.half:,.0f}"


def functions_table(profile: Profile, limit: int = FUNCTIONS) -> Table:
    """Return the functions that execute most themselves."""
    result = Table(box=box.SIMPLE_HEAD, title_justify="left")
    result.title = f"{profile.server}, n = {profile.per_connection}: functions, without callees"
    result.add_column("instructions", justify="right", no_wrap=True)
    result.add_column("function", no_wrap=True)
    result.add_column("layer", no_wrap=True)
    result.add_column("file", no_wrap=True)
    for site, count in list(profile.functions().items())[:limit]:
        layer = layer_of(site)
        result.add_row(
            f"{count:,.0f}", site.name, title(layer) if layer else "(its caller's)", site.file
        )
    return result


def differences_table(before: Profile, after: Profile, limit: int = FUNCTIONS) -> Table:
    """Return the functions in which two servers differ most, in either direction."""
    result = Table(box=box.SIMPLE_HEAD, title_justify="left")
    result.title = (
        f"n = {after.per_connection}: where {after.server} differs most from {before.server}"
    )
    result.add_column("difference", justify="right", no_wrap=True)
    result.add_column(before.server, justify="right", no_wrap=True)
    result.add_column(after.server, justify="right", no_wrap=True)
    result.add_column("function", no_wrap=True)
    result.add_column("file", no_wrap=True)
    old, new = before.functions(), after.functions()
    delta = {site: new.get(site, 0.0) - old.get(site, 0.0) for site in {**old, **new}}
    ordered = sorted(delta, key=lambda site: (-abs(delta[site]), site))
    for site in ordered[:limit]:
        cells = [f"{costs.get(site, 0.0) + 0.0:,.0f}" for costs in (old, new)]
        result.add_row(f"{delta[site]:+,.0f}", *cells, site.name, site.file)
    return result


# --- the whole --------------------------------------------------------------------------------


def run(
    lab: Lab,
    servers: Sequence[str],
    per_connection: Sequence[int],
    rounds: int,
    folder: Path,
    vcpus: int = 4,
    size: int = 64,
) -> None:
    """Boot the solution, measure, print the tables, and write them and the graphs to `folder`.

    ``profile.json`` holds the numbers; ``<server>-<n>.svg`` are flame graphs,
    ``difference-<server>-<n>.svg`` those against the first server, ``<server>-<n>.folded`` the
    call paths for other tools, ``profile.txt`` the tables. Raises `ExperimentFailed`.
    """
    if rounds < 2 or not per_connection or min(per_connection) < 1 or not servers:
        raise UsageError(
            "profile needs 2 or more rounds, and numbers of transactions from 1",
            "see --help profile",
        )
    results.make_folder(folder)
    progress = Progress()
    built = build_solution(lab, progress)
    found: list[list[Profile]] = []
    with progress.phase("profile"), Station(built, vcpus, stacks=True) as station:
        environment = station.machine.environment()
        for n in per_connection:
            found.append(measure(station, Cell(vcpus, size, n), rounds, progress, servers))
    everything = {
        "rounds": rounds,
        "environment": environment,
        "profiles": [profile.record() for profiles in found for profile in profiles],
    }
    results.write(folder / "profile.json", json.dumps(everything, indent=1) + "\n")
    plain = Console(file=io.StringIO(), width=160)
    console = bench.wide_console()
    for profiles in found:
        for table in tables_of(profiles):
            plain.print(table)
            console.print(table)
    assert isinstance(plain.file, io.StringIO)
    results.write(folder / "profile.txt", plain.file.getvalue())
    for profiles in found:
        write_graphs(profiles, folder)
    progress.say(
        f"{vcpus} vCPUs, {size} B, {rounds} rounds; ± is the 95 % interval of the mean. "
        f"Flame graphs: {folder}. {progress.summary()}"
    )


def tables_of(profiles: Sequence[Profile]) -> list[Table]:
    """Return all tables for the servers at one number of transactions per connection."""
    tables = [layers_table(profiles), *map(functions_table, profiles)]
    return tables + [differences_table(profiles[0], other) for other in profiles[1:]]


def folded(paths: Paths) -> str:
    """Return call paths as other tools read them, in instructions per 1,000 transactions."""
    counts = _by(paths, lambda path: ";".join(site.name for site in path))
    return "".join(f"{path} {1000 * n:.0f}\n" for path, n in sorted(counts.items()) if n >= 0.001)


def write_graphs(profiles: Sequence[Profile], folder: Path) -> None:
    """Write each server's flame graph, its call paths, and its difference from the first."""
    first = profiles[0]
    for profile in profiles:
        name, n = profile.server, profile.per_connection
        results.write(folder / f"{name}-{n}.folded", folded(profile.paths))
        graph = flame.graph(f"{name}, n = {n}", profile.paths)
        results.write(folder / f"{name}-{n}.svg", graph)
        if profile is not first:
            graph = flame.difference(
                f"{name} against {first.server}, n = {n}",
                first.paths,
                profile.paths,
                (first.server, name),
            )
            results.write(folder / f"difference-{name}-{n}.svg", graph)
