"""All pictures by name: what each is drawn from, and what a reader learns from it.

The notebooks show them and `invoke plot` writes them. Each number that a sentence names is
computed from the data that the picture shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from grader import compare
from grader.checks import Interval
from grader.compare import Measure
from notebooks import material
from notebooks.figures import Curve, Panel
from notebooks.material import Bench

BEST = "BPL"
CORES = "vCPUs of the server"
LIVES = "transactions per connection"
INSTRUCTIONS = "instructions per transaction"
SPEED = "million transactions/s"
SPEED_UP = "speed-up (times one core)"
GAIN = "MegaPipe (times the baseline)"
PAPER = "paper (8 cores)"
HERE = f"here ({material.VCPUS} vCPUs)"
TOGETHER = "all together"
STEPS = {"P": "P: partitioned listener", "B": "B: batching", "L": "L: lwsockets"}
OBJECTS = {
    "file_alloc": "files",
    "inode_alloc": "inodes",
    "dentry_alloc": "dentries",
    "fd_alloc": "descriptors",
}


@dataclass(frozen=True)
class Picture:
    """A picture that can be drawn."""

    name: str
    draw: Callable[[], Figure]
    """Raises `Missing` if the result at hand does not hold what it shows; so does `learned`."""
    learned: Callable[[], str]
    """One sentence: what a reader learns."""
    published: str = ""
    """The paper's figure that all of is in it."""


Pictures = dict[str, Picture]


def named(pictures: Iterable[Picture]) -> Pictures:
    """Return the pictures by their names."""
    return {picture.name: picture for picture in pictures}


def plus_minus(value: Interval, digits: int = 2, unit: str = "") -> str:
    """Return a mean with its 95 % interval for a sentence."""
    return f"{value.mean:z,.{digits}f} ± {value.half:,.{digits}f}{unit}"


def percent_faster(ratio: float) -> str:
    """Return a gain such as 1.29 as ``+29 %``."""
    return f"{100 * (ratio - 1):+,.0f} %"


def place(n: int) -> float:
    """Return where a life of n transactions stands on an axis; 0: the connection stays open."""
    return n or math.inf


def over_lives(bench: Bench, servers: Sequence[str], measure: Measure) -> list[Curve]:
    """Return a line of each server over transactions per connection. Raises `Missing`."""
    return [
        Curve(server, [(place(n), bench.spread(n, server, measure)) for n in bench.lives], server)
        for server in servers
    ]


def instructions(bench: Bench, servers: Sequence[str]) -> Panel:
    """Return the servers' instructions over the lives. Raises `Missing`."""
    drawn = over_lives(bench, servers, compare.instructions)
    return Panel(f"{HERE}: instructions", drawn, LIVES, INSTRUCTIONS, doubling=True)


def calls(bench: Bench, servers: Sequence[str]) -> Panel:
    """Return the servers' system calls over the lives. Raises `Missing`."""
    drawn = over_lives(bench, servers, compare.calls("syscalls"))
    title, unit = f"{HERE}: system calls", "system calls per transaction"
    return Panel(title, drawn, LIVES, unit, doubling=True)


def hundred(share: Interval) -> Interval:
    """Return a share in percent."""
    return Interval(100 * share.mean, 100 * share.half)
