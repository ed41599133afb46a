"""What messages' sizes and more cores do to the gain: the paper's figures, beside exact mode."""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from grader.compare import BASELINE
from notebooks import figures
from notebooks.figures import Panel, curve
from notebooks.material import SIZE, Sizes, life
from notebooks.pictures import BEST, CORES, GAIN, PAPER, SPEED, Picture, Pictures, named
from notebooks.pictures.paper import both, gain_panel, pairs
from notebooks.published import Published

MESSAGE = "bytes of a message"


def sizes_pictures(published: Published, sizes: Sizes) -> Pictures:
    """Return the paper's figures over sizes and cores, beside the instructions counted here."""
    return named(
        Picture(name, partial(draw, published, sizes), partial(learned, published, sizes), of)
        for name, draw, learned, of in (
            ("paper-fig1b", _fig1b, _fig1b_learned, "fig1b"),
            ("paper-fig1c", _fig1c, _fig1c_learned, "fig1c"),
            ("paper-fig4", _fig4, _fig4_learned, "fig4"),
        )
    )


def gains(sizes: Sizes, size: int) -> dict[int, float]:
    """Return how many times as many instructions epoll executes as BPL, by vCPUs."""
    return sizes.gain(size, BEST, BASELINE)


def _most(sizes: Sizes) -> int:
    """Return the most vCPUs; a bench measures each size with all of them."""
    return max(gains(sizes, SIZE))


def _fig1b(published: Published, sizes: Sizes) -> Figure:
    gained = published.gain("fig1b", "megapipe", "baseline", "gbit_per_s")
    most = _most(sizes)
    here = [(float(size), gains(sizes, size)[most]) for size in sizes.sizes]
    return figures.lines(
        Panel(
            f"{PAPER}: throughput",
            both(published, "fig1b", "gbit_per_s"),
            MESSAGE,
            "Gbit/s",
            doubling=True,
        ),
        Panel(
            f"{PAPER}: how busy they are",
            both(published, "fig1b", "cpu_percent"),
            MESSAGE,
            "processor time (%)",
            doubling=True,
        ),
        gain_panel(
            MESSAGE,
            curve("paper, throughput (link full from 2 K on)", gained, "MegaPipe"),
            curve(f"here, instructions, {most} vCPUs", here, "here"),
        ),
    )


def _fig1b_learned(published: Published, sizes: Sizes) -> str:
    speed = {
        name: {p.x: p.y for p in points}
        for name, points in published.series("fig1b", "gbit_per_s").items()
    }
    busy = published.series("fig1b", "cpu_percent")
    gain = speed["megapipe"][64] / speed["baseline"][64]
    full = next(x for x, y in sorted(speed["baseline"].items()) if y > 9)
    most = _most(sizes)
    small, large = (gains(sizes, size)[most] for size in (sizes.sizes[0], sizes.sizes[-1]))
    return (
        f"Small messages are limited by the processors and large ones by the link: at 64 bytes "
        f"the baseline moves {speed['baseline'][64]:.2f} Gbit/s and MegaPipe {gain:.1f} times as "
        f"much, from {full:,.0f} bytes on both fill the link, and what MegaPipe saves shows as "
        f"idle processors ({busy['megapipe'][-1].y:g} % busy at "
        f"{busy['megapipe'][-1].x / 1024:g} K, the baseline's {busy['baseline'][-1].y:g} %); here, "
        f"where no link fills, what it saves is ever less of what a message costs, {small:.2f} "
        f"times at {sizes.sizes[0]} bytes and {large:.2f} times at {sizes.sizes[-1]:,}."
    )


def _fig1c(published: Published, sizes: Sizes) -> Figure:
    gained = published.gain("fig1c", "megapipe", "baseline", "million_transactions_per_s")
    here = [(float(vcpus), gain) for vcpus, gain in gains(sizes, SIZE).items()]
    return figures.lines(
        Panel(
            "paper: throughput",
            both(published, "fig1c", "million_transactions_per_s"),
            "cores",
            SPEED,
        ),
        Panel(
            "paper: efficiency of each core",
            both(published, "fig1c", "per_core_efficiency_percent"),
            "cores",
            "of one core alone (%)",
        ),
        Panel(
            "what MegaPipe gains",
            [
                curve("paper, throughput", gained, "MegaPipe"),
                curve(f"here, instructions, {life(sizes.life)}", here, "here"),
            ],
            "cores",
            GAIN,
            least=0.9,
            level=1.0,
        ),
    )


def _fig1c_learned(published: Published, sizes: Sizes) -> str:
    efficiency = published.series("fig1c", "per_core_efficiency_percent")
    theirs = dict(published.gain("fig1c", "megapipe", "baseline", "million_transactions_per_s"))
    here, most = gains(sizes, SIZE), _most(sizes)
    return (
        f"With eight cores each of the baseline's does {efficiency['baseline'][-1].y:g} % of what "
        f"one does alone, each of MegaPipe's {efficiency['megapipe'][-1].y:g} %: so of the "
        f"{theirs[8]:.2f} times that MegaPipe gains on eight cores, {theirs[1]:.2f} times are "
        f"there on one already, and the rest is what the baseline loses between cores, which "
        f"instructions do not show: they are {here[1]:.2f} times fewer on one vCPU and "
        f"{here[most]:.2f} times on {most}."
    )


def _fig4(published: Published, sizes: Sizes) -> Figure:
    theirs = {_bytes(name): pairs(points) for name, points in published.series("fig4").items()}
    here = {
        size: [(float(v), 100 * (gain - 1)) for v, gain in gains(sizes, size).items()]
        for size in sizes.sizes
        if size in theirs
    }
    return figures.lines(
        *(
            Panel(
                title,
                [curve(f"{size} B", found[size]) for size in sorted(found)],
                x,
                "over the baseline (%)",
            )
            for title, x, found in (
                ("paper: throughput", "cores", theirs),
                (f"here: instructions, {life(sizes.life)}", CORES, here),
            )
        )
    )


def _bytes(name: str) -> int:
    return int(name.partition(" ")[0])


def _fig4_learned(published: Published, sizes: Sizes) -> str:
    def small(cores: int) -> float:
        return published.at("fig4", "64 B messages", cores)

    most = _most(sizes)
    largest = max(size for size in sizes.sizes if size <= 4096)

    def here(size: int) -> str:
        gained = gains(sizes, size)
        return " and ".join(f"{100 * (gained[vcpus] - 1):.0f} %" for vcpus in (1, most))

    return (
        f"With messages of 64 bytes MegaPipe gains {small(1):g} % on one core, {small(4):g} % on "
        f"four and {small(8):g} % on eight, with 4,096 bytes nothing from three cores on, where "
        f"the link is full; here, in instructions on one vCPU and on {most}, it is "
        f"{here(SIZE)} with {SIZE} bytes and {here(largest)} with {largest:,}: what grows with "
        f"the cores is the waiting."
    )
