"""Results that the tree keeps, to lay others beside them: what a bench of this tree measured.

``recorded/bench.json`` is what ``invoke bench --servers all --per-connection 0,1,10,32`` wrote;
with which kernel, module and image, when, and on what, it says itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grader import samples
from grader.bench import connections
from grader.checks import Interval, interval
from grader.samples import Cell, Sample

BENCH = Path(__file__).with_name("recorded") / "bench.json"


@dataclass(frozen=True)
class Recorded:
    """A count per transaction from a recorded bench."""

    count: Interval
    time: str
    """When it was measured."""


@functools.cache
def _bench(path: Path) -> tuple[str, list[Sample]]:
    document, found = samples.read(path)
    return document["environment"]["time"], found


def limit(load: Mapping[str, Any], metric: str, vcpus: int, path: Path = BENCH) -> Recorded | None:
    """Return what the limit costs under this load, as a result file has it; None: not measured.

    The limit is an echo inside the kernel; `metric` is one of `grader.lab.METRICS`.
    """
    cell = Cell(vcpus, load["size"], load.get("transactions_per_connection", 0))
    if load["mode"] != "rounds" or load["connections"] != connections(cell):
        return None
    time, found = _bench(path)
    mine = [sample.costs for sample in found if (sample.server, sample.cell) == ("limit", cell)]
    if len(mine) < 2 or not (metric == "instructions" or metric in mine[0].calls):
        return None
    return Recorded(interval([costs.metric(metric) for costs in mine]), time)
