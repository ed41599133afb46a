"""What becomes of a transaction as cores grow: exact mode, beside the paper's cores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure

from grader import exact
from grader.compare import BASELINE, LIMIT
from notebooks import figures
from notebooks.figures import Panel, curve
from notebooks.material import Cores, at_life, life
from notebooks.pictures import (
    BEST,
    CORES,
    GAIN,
    INSTRUCTIONS,
    SPEED_UP,
    Picture,
    Pictures,
    named,
)
from notebooks.published import Published

SERVERS = (BASELINE, "epoll-reuseport", "io_uring", BEST, LIMIT)
SHORT, LONG = 1, 10


def cores_pictures(published: Published, cores: Cores) -> Pictures:
    """Return what was counted as the vCPUs grew, and what the model makes of it."""
    return named(
        Picture(name, partial(draw, published, cores), partial(learned, published, cores))
        for name, draw, learned in (
            ("cores-counts", _counts, _counts_learned),
            ("cores-model", _model, _model_learned),
        )
    )


def _panel(title: str, cores: Cores, n: int, y: str, what: str) -> Panel:
    lines = [
        curve(server, cores.counts(n, server, what), server)
        for server in cores.servers(n, *SERVERS)
    ]
    return Panel(title, lines, CORES, y, doubling=True)


def _counts(_: Published, cores: Cores) -> Figure:
    worked = [
        curve(server, cores.instructions(SHORT, server), server)
        for server in cores.servers(SHORT, *SERVERS)
    ]
    return figures.lines(
        Panel(f"instructions, {life(SHORT)}", worked, CORES, INSTRUCTIONS, doubling=True),
        _panel(
            f"lines that move, {life(SHORT)}",
            cores,
            SHORT,
            "transfers per transaction",
            exact.TRANSFERS,
        ),
        _panel(
            f"locks that change hands, {life(SHORT)}",
            cores,
            SHORT,
            "hand-overs per transaction",
            exact.HANDOVERS,
        ),
    )


def _ends(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return points[0][1], points[-1][1]


def _counts_learned(_: Published, cores: Cores) -> str:
    shared = _ends(cores.counts(SHORT, BASELINE, exact.TRANSFERS))
    own = _ends(cores.counts(SHORT, BEST, exact.TRANSFERS))
    locks = _ends(cores.counts(SHORT, BASELINE, exact.HANDOVERS))
    mine = _ends(cores.counts(SHORT, BEST, exact.HANDOVERS))
    most = cores.vcpus[-1]
    return (
        f"From one vCPU to {most} the lines that a short connection moves grow from "
        f"{shared[0]:.0f} to {shared[1]:.0f} with one listener for all, and from {own[0]:.0f} to "
        f"{own[1]:.0f} with MegaPipe; of them the locks' from {locks[0]:.0f} to {locks[1]:.0f} and "
        f"from {mine[0]:.0f} to {mine[1]:.0f}. With one vCPU it is the packets, which come from "
        f"the client's CPU."
    )


def _model(published: Published, cores: Cores) -> Figure:
    ideal = curve("ideal", [(float(vcpus), float(vcpus)) for vcpus in cores.vcpus], "plain")
    gained = published.gain("fig1c", "megapipe", "baseline", "million_transactions_per_s")
    speeds = [
        curve(server, cores.speed(SHORT, server), server)
        for server in cores.servers(SHORT, *SERVERS)
    ]
    gains = [
        curve(f"model, {life(n)}", cores.gain(n, BEST, BASELINE), look)
        for n, look in ((SHORT, "here, model"), (LONG, "here"))
        if n in cores.lives
    ]
    return figures.lines(
        Panel(f"model: speed-up, {life(SHORT)}", [*speeds, ideal], CORES, SPEED_UP, doubling=True),
        Panel(
            "what MegaPipe gains",
            [curve("paper, throughput, about n = 10", gained, "MegaPipe"), *gains],
            "cores, or vCPUs of the server",
            GAIN,
            doubling=True,
            least=0.9,
            level=1.0,
        ),
    )


def _model_learned(published: Published, cores: Cores) -> str:
    gains = dict(published.gain("fig1c", "megapipe", "baseline", "million_transactions_per_s"))
    first, last = _ends(cores.gain(SHORT, BEST, BASELINE))
    most = cores.vcpus[-1]
    return (
        f"By the model's cycles MegaPipe gains {first:.2f} times {at_life(SHORT)} on one vCPU and "
        f"{last:.2f} times on {most}: moving lines makes the shared listener dearer as cores grow. "
        f"The paper's gain grows from {gains[1]:.2f} to {gains[8]:.2f} times on eight cores. "
        f"{_waits(cores)}"
    )


def _waits(cores: Cores) -> str:
    """Say what of it is waiting for locks, by the model's queueing."""
    if not cores.followed_locks:
        return "Cores also wait for locks there, which were not followed here."
    shared, own = (cores.waited(SHORT, server)[-1][1] for server in (BASELINE, BEST))
    return (
        f"It is not the locks: on {cores.vcpus[-1]} the model has {shared:.2%} of a transaction "
        f"wait for them with one listener for all, and {own:.2%} with MegaPipe."
    )
