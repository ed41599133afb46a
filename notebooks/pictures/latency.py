"""What batching does to the time of a reply: exact mode, in virtual time."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from grader.latency import Row
from notebooks import figures
from notebooks.figures import Curve, Panel, curve
from notebooks.material import Latencies
from notebooks.pictures import Picture, Pictures, named

THRESHOLD = "threshold (requests)"
MICROSECONDS = "latency (virtual µs)"


def latency_pictures(found: Latencies) -> Pictures:
    """Return how long replies take, by the threshold and the load."""
    return named([Picture("latency", lambda: _latency(found), lambda: _learned(found))])


def _latency(found: Latencies) -> Figure:
    def each(value: Callable[[Row], float]) -> list[Curve]:
        return [
            curve(_load(load), [(row.threshold, value(row)) for row in found.of(load)])
            for load in found.loads
        ]

    def panel(title: str, y: str, value: Callable[[Row], float], *, log: bool) -> Panel:
        return Panel(title, each(value), THRESHOLD, y, doubling=True, log=log)

    return figures.lines(
        panel("half of the replies within", MICROSECONDS, lambda row: row.latency.p50, log=True),
        panel("99 % of the replies within", MICROSECONDS, lambda row: row.latency.p99, log=True),
        panel("what it saves", "system calls per transaction", _calls, log=False),
    )


def _calls(row: Row) -> float:
    return row.system_calls


def _load(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def _learned(found: Latencies) -> str:
    few, many = found.of(found.loads[0]), found.of(found.loads[-1])
    first, last = many[0], many[-1]
    medians = [row.latency.p50 for row in few]
    return (
        f"With {_load(first.connections)} half of the replies come within "
        f"{first.latency.p50:,.0f} virtual microseconds at a threshold of {first.threshold} and "
        f"within {last.latency.p50:,.0f} at {last.threshold}, with {first.system_calls:.2f} and "
        f"{last.system_calls:.2f} system calls per transaction; 99 % come within "
        f"{first.latency.p99:,.0f} and {last.latency.p99:,.0f}: who comes first waits for the "
        f"batch. With {_load(few[0].connections)} it is {min(medians):,.1f} to "
        f"{max(medians):,.1f}: nobody waits for requests that do not come."
    )
