"""Samples -> what can be said: means, ratios and taxes, each with its 95 % interval.

Servers are measured in turn, so the r-th sample of each was taken under about the same load of
the host. Ratios and differences are therefore taken round by round, and their interval is that
of these, not of two independent means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grader.checks import Interval, spread
from grader.samples import Cell, Sample

BASELINE = "epoll"
LIMIT = "limit"
Measure = Callable[[Sample], float]


def instructions(sample: Sample) -> float:
    """Return user and kernel instructions per transaction, without the clock's interrupt.

    Its ticks come with real time, and a guest that is emulated gets tens of times as many of them
    for the same work as one that runs on a processor.
    """
    return sample.costs.work


def clock(sample: Sample) -> float:
    """Return the instructions of the clock's interrupt per transaction."""
    return sample.costs.clock_instructions


def calls(name: str) -> Measure:
    """Return the measure that gives the entries of a counted function per transaction."""
    return lambda sample: sample.costs.calls[name]


@dataclass(frozen=True)
class Comparison:
    """The servers of one cell side by side."""

    cell: Cell
    samples: dict[str, list[Sample]]
    """By server, in the order of the rounds."""

    def spread(self, server: str, measure: Measure) -> Interval:
        """Return a server's mean per transaction."""
        return spread([measure(sample) for sample in self.samples[server]])

    def ratio(self, server: str, measure: Measure, base: str = BASELINE) -> Interval | None:
        """Return a server's cost as a share of that of `base`; None if that was not measured."""
        return self._paired([server, base], measure, lambda mine, other: mine / other)

    def saved(self, server: str, measure: Measure, base: str = BASELINE) -> Interval | None:
        """Return what a server costs less than `base`; None if that was not measured."""
        return self._paired([server, base], measure, lambda mine, other: other - mine)

    def tax(self, server: str, measure: Measure) -> Interval | None:
        """Return what a server costs above the limit, as a share of the limit."""
        return self._paired([server, LIMIT], measure, lambda mine, limit: (mine - limit) / limit)

    def removed(self, server: str, measure: Measure) -> Interval | None:
        """Return how much of the baseline's tax a server removes: 1 is all of it."""
        return self._paired(
            [server, BASELINE, LIMIT],
            measure,
            lambda mine, base, limit: (base - mine) / (base - limit),
        )

    def _paired(
        self, servers: Sequence[str], measure: Measure, combine: Callable[..., float]
    ) -> Interval | None:
        if not all(server in self.samples for server in servers):
            return None
        rounds = zip(*(self.samples[server] for server in servers), strict=True)
        try:
            values = [combine(*map(measure, samples)) for samples in rounds]
        except ZeroDivisionError:
            return None
        return spread(values)


def compare(samples: Sequence[Sample], least: int = 2) -> list[Comparison]:
    """Group samples by cell and server, each server's in the order of the rounds.

    A round that not every server of the cell has gone through (the bench was interrupted) is
    left out, and so is a cell with fewer than `least` whole rounds.
    """
    cells: dict[Cell, dict[str, dict[int, Sample]]] = {}
    for sample in samples:
        servers = cells.setdefault(sample.cell, {})
        servers.setdefault(sample.server, {})[sample.round] = sample
    comparisons = []
    for cell, servers in cells.items():
        whole = sorted(set.intersection(*(set(rounds) for rounds in servers.values())))
        if len(whole) >= least:
            comparisons.append(
                Comparison(
                    cell,
                    {name: [rounds[r] for r in whole] for name, rounds in servers.items()},
                )
            )
    return comparisons
