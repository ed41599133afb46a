"""Latency under batching: how long replies take, by the batch threshold and the load, exactly.

One vCPU serves, another is the client, and time is the number of instructions that the two have
executed together, one nanosecond each: neither is what a processor would need, but both are the
same in each run, so whatever differs between two rows comes of the threshold or the load. Every
connection sends its next message when its reply is in.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from grader import bench, exact, results
from grader.errors import UsageError
from grader.lab import Lab, LoadShape
from grader.load import Latency, summarize
from grader.progress import Progress
from grader.station import Built, Station, build_solution
from images.build import Image

THRESHOLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONNECTIONS = (1, 8, 64, 256)
SIZE = 64
VERSION = 1
SCHEMA = Path(__file__).with_name("latency.schema.json")
SERVER = "mp-server --batch --partition --lwsocket --threshold"
_SAMPLES = "/tmp/latency"
# Eight bytes each, of the two windows together.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One threshold under one load."""

    threshold: int
    connections: int
    latency: Latency
    """In microseconds of virtual time."""
    system_calls: float
    """Of the server, per transaction."""


def numbers(option: str, given: Sequence[int], usual: Sequence[int]) -> Sequence[int]:
    """Return what was given, or what is usual; `UsageError` beyond what can be."""
    if any(not 1 <= number <= max(usual) for number in given):
        raise UsageError(f"{option}: numbers from 1 to {max(usual)}", "see --help latency")
    return given or usual


def measure(
    built: Built, made: Image, threshold: int, connections: int, stop: threading.Event
) -> Row:
    """Measure one threshold (1 to 256) under one load. Raises `ExperimentFailed`."""
    load = LoadShape(connections, 0, SIZE)
    script = exact.script(
        f"{SERVER} {threshold}", load, 1, exact.Setting(), made, "--latency-file", _SAMPLES
    )
    _, short, long = exact.windows(load)
    station = Station(built, 2, memory_mib=exact.MEMORY_MIB, script=script)
    with exact.playing(station):
        readings = [station.probe.read() for _ in station.marks(3, stop)]
        with station:
            exact.check(station.machine.run(exact.OUTCOME).text, 1)
            samples = station.machine.run(f"cat {_SAMPLES}", cap=_MOST_BYTES).output
    latency = summarize(np.frombuffer(samples, "<u8")[-long:])
    assert latency is not None
    calls = [int(each.functions["syscalls"][0]) for each in readings]
    per_transaction = (calls[2] - 2 * calls[1] + calls[0]) / (long - short)
    return Row(threshold, connections, latency, per_transaction)


def run(lab: Lab, thresholds: Sequence[int], connections: Sequence[int], out: Path) -> None:
    """Measure all, print the table, write the result to `out`."""
    progress = Progress()
    built = build_solution(lab, progress)
    made = exact.image(built)
    rows: list[Row] = []
    with progress.phase("latency"), exact.machines() as (pool, stop):
        pending = [
            pool.submit(measure, built, made, threshold, load, stop)
            for load in connections
            for threshold in thresholds
        ]
        for one in pending:
            progress.update(f"{len(rows)} of {len(pending)}")
            rows.append(one.result())
    document = results.checked(as_json(built, made, rows), SCHEMA)
    results.write(out, json.dumps(document, indent=1) + "\n")
    console = bench.wide_console()
    report(rows, console)
    progress.say(f"{out} has the numbers. {progress.summary()}")


def as_json(built: Built, made: Image, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the result as plain data."""
    return {
        "version": VERSION,
        "identity": {
            "server": SERVER,
            "size": SIZE,
            "kernel_key": built.kernel.key,
            "module_key": built.module.key,
            "image_key": made.key,
            "exact": asdict(exact.Setting()),
        },
        "environment": bench.environment(),
        "rows": [asdict(row) for row in rows],
    }


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return a result file's content and its rows. Raises `UserError`."""
    found = results.read(path, SCHEMA, "invoke latency")
    return found, [
        Row(
            row["threshold"],
            row["connections"],
            Latency(**row["latency"]),
            row["system_calls"],
        )
        for row in found["rows"]
    ]


def report(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each load."""
    for load in dict.fromkeys(row.connections for row in rows):
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"{load} connection{'s' if load > 1 else ''}, {SIZE} B, one vCPU; "
            "virtual microseconds",
            title_justify="left",
        )
        table.add_column("threshold", justify="right")
        for title in ("median", "90 %", "99 %", "longest", "system calls"):
            table.add_column(title, justify="right")
        for row in rows:
            if row.connections == load:
                found = row.latency
                table.add_row(
                    str(row.threshold),
                    *(f"{value:,.1f}" for value in (found.p50, found.p90, found.p99, found.max)),
                    f"{row.system_calls:.2f}",
                )
        console.print(table)
