"""The figures of two papers, beside what is measured here on the same axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure

from grader import compare
from grader.compare import BASELINE, LIMIT, Measure
from grader.contributions import IN_ORDER
from notebooks import figures
from notebooks.figures import Bars, Curve, Panel, curve
from notebooks.material import Bench, at_life, life
from notebooks.pictures import (
    BEST,
    GAIN,
    HERE,
    LIVES,
    PAPER,
    SPEED,
    SPEED_UP,
    STEPS,
    TOGETHER,
    Picture,
    Pictures,
    calls,
    hundred,
    instructions,
    named,
    percent_faster,
    place,
    plus_minus,
)
from notebooks.published import Point, Published


def paper_pictures(published: Published, bench: Bench) -> Pictures:
    """Return the papers' figures, beside what is measured here on the same axes."""
    from_both = (
        ("paper-fig1a", _fig1a, _fig1a_learned, "fig1a"),
        ("paper-fig3", _fig3, _fig3_learned, "fig3"),
        ("paper-table3", _table3, _table3_learned, "table3"),
        ("paper-fig5", _fig5, _fig5_learned, "fig5"),
        ("paper-fig7", _fig7, _fig7_learned, "fig7"),
        ("mtcp-fig8", _fig8, _fig8_learned, "mtcp fig8"),
        ("mtcp-messages", _messages, _messages_learned, "mtcp messages per connection"),
        ("here-costs", _costs, _costs_learned, ""),
        ("here-steps", _steps, _steps_learned, ""),
    )
    return named(
        Picture(name, partial(draw, published, bench), partial(learned, published, bench), of)
        for name, draw, learned, of in from_both
    )


def pairs(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the points of a published line."""
    return [(point.x, point.y) for point in points]


def both(published: Published, figure: str, y_name: str = "") -> list[Curve]:
    """Return the lines of the paper's baseline and of MegaPipe."""
    lines = published.series(figure, y_name)
    names = {"baseline": "baseline", "megapipe": "MegaPipe"}
    return [curve(shown, pairs(lines[name])) for name, shown in names.items()]


def gain_panel(x: str, *curves: Curve) -> Panel:
    """Return what MegaPipe gains, by factors, over what grows by factors of two."""
    return Panel("what MegaPipe gains", curves, x, GAIN, doubling=True, log=True, level=1.0)


def _gains(bench: Bench, server: str, base: str) -> list[Curve]:
    """Return what is gained here over the lives: in instructions, and in the model's cycles."""
    dots = [(place(n), bench.gain(n, server, base)) for n in bench.lives]
    found = [Curve("here, instructions", dots, "here")]
    cycles = [(place(n), bench.model_gain(n, server, base)) for n in bench.lives]
    known = [(x, y) for x, y in cycles if y is not None]
    if known:
        found.append(Curve("here, model with moved lines", known, "here, model"))
    return found


def _fig1a(published: Published, bench: Bench) -> Figure:
    gained = published.gain("fig1a", "megapipe", "baseline")
    return figures.lines(
        Panel(f"{PAPER}: throughput", both(published, "fig1a"), LIVES, SPEED, doubling=True),
        gain_panel(
            LIVES, curve("paper, throughput", gained, "MegaPipe"), *_gains(bench, BEST, BASELINE)
        ),
    )


def _fig1a_learned(published: Published, bench: Bench) -> str:
    gains = dict(published.gain("fig1a", "megapipe", "baseline"))
    short, long = bench.shortest, bench.longest
    here = [bench.gain(n, BEST, BASELINE) for n in (short, long)]
    return (
        f"The shorter connections live, the more MegaPipe gains: in the paper "
        f"{gains[1]:.1f} times the throughput at n = 1 and {gains[128]:.2f} times at n = 128, here "
        f"{plus_minus(here[0])} times as many transactions per instruction {at_life(short)} and "
        f"{plus_minus(here[1])} times {at_life(long)}."
    )


def _fig3(published: Published, _: Bench) -> Figure:
    lines = published.series("fig3")
    ideal = curve("ideal", [(float(cores), float(cores)) for cores in range(1, 9)], "limit")
    panels, on_eight = [], []
    for whose, title in (("baseline", "baseline"), ("megapipe", "MegaPipe")):
        mine = {
            int(name.partition(", ")[2].partition(" ")[0]): points
            for name, points in lines.items()
            if name.startswith(whose)
        }
        curves = [curve(life(n), pairs(mine[n])) for n in sorted(mine)]
        panels.append(Panel(f"paper: {title}", [*curves, ideal], "cores", SPEED_UP))
        on_eight.append(curve(title, [(float(n), mine[n][-1].y) for n in sorted(mine)]))
    return figures.lines(
        *panels, Panel("paper: on 8 cores", on_eight, LIVES, SPEED_UP, doubling=True)
    )


def _fig3_learned(published: Published, _: Bench) -> str:
    name = "{}, {} transactions per connection"

    def at(whose: str, n: int) -> float:
        return published.at("fig3", name.format(whose, n), 8)

    best = max(published.series("fig3")[name.format("baseline", 1)], key=lambda point: point.y)
    return (
        f"With one transaction per connection the baseline is fastest on {best.x:g} cores and gets "
        f"no further ({at('baseline', 1):g} times one core on eight), while MegaPipe reaches "
        f"{at('megapipe', 1):g} times; at 128 the two are alike ({at('baseline', 128):g} and "
        f"{at('megapipe', 128):g})."
    )


def _table3(published: Published, bench: Bench) -> Figure:
    lines = published.series("table3")
    ns = [point.x for point in lines["total"]]
    names = {"+P": "P", "P+B": "B", "PB+L": "L"}
    names["total"] = TOGETHER
    panels = [
        Bars(
            f"{PAPER}: throughput",
            [f"{n:g}" for n in ns],
            [
                curve(STEPS.get(what, what), [(i, p.y) for i, p in enumerate(lines[name])], what)
                for name, what in names.items()
            ],
            LIVES,
            "percentage points\nover the baseline",
        ),
        _points_here(bench, list(bench.lives), moved=False),
    ]
    if bench.transfers:
        panels.append(
            _points_here(bench, [n for n in bench.lives if n in bench.transfers], moved=True)
        )
    return figures.bars(*panels)


def _points_here(bench: Bench, ns: Sequence[int], *, moved: bool) -> Bars:
    each = [bench.contributions(n, with_transfers=moved) for n in ns]
    found = [
        curve(STEPS[what], [(i, one[step].points) for i, one in enumerate(each)], what)
        for step, (what, _, _) in enumerate(IN_ORDER)
    ]
    total = [(i, sum(c.points for c in one)) for i, one in enumerate(each)]
    found.append(curve(TOGETHER, total))
    title = "model, with moved lines" if moved else "model, without moved lines"
    return Bars(
        f"here: {title}",
        [f"{n}" if n else "stays open" for n in ns],
        found,
        LIVES,
        "percentage points\nover epoll",
        digits=0,
    )


def _table3_learned(published: Published, bench: Bench) -> str:
    short = bench.shortest
    counted = short in bench.transfers
    here = {one.what: one.points for one in bench.contributions(short, with_transfers=counted)}

    def theirs(series: str) -> float:
        return published.at("table3", series, 1)

    return (
        f"At n = 1 the paper has {theirs('+P'):g} percentage points for P, {theirs('P+B'):g} for B "
        f"and {theirs('PB+L'):g} for L; here it is, by the model "
        f"{'with' if counted else 'without'} the cache lines that move, {here['P']:.0f}, "
        f"{here['B']:.0f} and {here['L']:.0f} {at_life(short)}: batching saves work, which one "
        f"core sees as well as eight, and the other two ended a fight between cores."
    )


def _fig5(published: Published, _: Bench) -> Figure:
    lines = published.series("fig5")
    panels = []
    for title, suffix in (
        ("as it is", ""),
        ("without its global lock", " without the global lock"),
    ):
        panels.append(
            Panel(
                f"paper: memcached {title}",
                [
                    curve("baseline", pairs(lines[f"baseline{suffix}"])),
                    curve("MegaPipe", pairs(lines[f"megapipe{suffix}"])),
                ],
                "requests per connection",
                "thousand requests/s",
                doubling=True,
            )
        )
    return figures.lines(*panels)


def _fig5_learned(published: Published, _: Bench) -> str:
    plain = dict(published.gain("fig5", "megapipe", "baseline"))
    free = dict(
        published.gain(
            "fig5", "megapipe without the global lock", "baseline without the global lock"
        )
    )
    return (
        f"memcached does {plain[1]:.1f} times as many requests with MegaPipe at one request per "
        f"connection and {plain[math.inf]:.2f} times on connections that stay open; there its own "
        f"global lock is the limit, and without that lock it is {free[math.inf]:.2f} times."
    )


def _fig7(published: Published, _: Bench) -> Figure:
    lines = published.series("fig7")
    return figures.lines(
        *(
            Panel(
                f"paper: nginx, {work}",
                [
                    curve("baseline", pairs(lines[f"baseline, {work}"])),
                    curve("MegaPipe", pairs(lines[f"megapipe, {work}"])),
                ],
                "cores",
                "Gbit/s",
            )
            for work in ("SpecWeb", "Yahoo", "Yahoo/2")
        )
    )


def _fig7_learned(published: Published, _: Bench) -> str:
    gains = {
        work: dict(published.gain("fig7", f"megapipe, {work}", f"baseline, {work}"))
        for work in ("SpecWeb", "Yahoo", "Yahoo/2")
    }
    return (
        f"nginx gains on one core {percent_faster(gains['SpecWeb'][1])} (SpecWeb), "
        f"{percent_faster(gains['Yahoo'][1])} (Yahoo) and {percent_faster(gains['Yahoo/2'][1])} "
        f"(Yahoo/2), on eight {percent_faster(gains['SpecWeb'][8])}, "
        f"{percent_faster(gains['Yahoo'][8])} and {percent_faster(gains['Yahoo/2'][8])}: in a "
        f"whole server much of the gain is there on one core already, and with Yahoo's load it "
        f"shrinks from five cores on, where MegaPipe gets no faster."
    )


def _fig8(published: Published, _: Bench) -> Figure:
    lines = published.series("mtcp fig8")
    labels = {
        "linux 3.10": "Linux 3.10",
        "linux 3.10 SO_REUSEPORT": "Linux 3.10, SO_REUSEPORT",
        "megapipe": "MegaPipe",
        "mtcp": "mTCP",
    }
    return figures.lines(
        Panel(
            "mTCP's paper: one message per connection",
            [curve(label, pairs(lines[name]), name) for name, label in labels.items()],
            "cores",
            "hundred thousand messages/s",
        )
    )


def _fig8_learned(published: Published, _: Bench) -> str:
    def at(series: str, cores: int = 8) -> float:
        return published.at("mtcp fig8", series, cores)

    reuse = "linux 3.10 SO_REUSEPORT"
    return (
        f"Measured by others: on one core MegaPipe and SO_REUSEPORT are alike "
        f"({at('megapipe', 1):g} and {at(reuse, 1):g} hundred thousand messages per second), on "
        f"eight MegaPipe does {at('megapipe') / at(reuse):.1f} times as many, and a stack "
        f"in user space (mTCP) {at('mtcp') / at('megapipe'):.1f} times as many again."
    )


def _messages(published: Published, bench: Bench) -> Figure:
    figure = "mtcp messages per connection"
    lines = published.series(figure)
    reuse = "linux 3.10 SO_REUSEPORT"
    gained = published.gain(figure, "megapipe", reuse)
    return figures.lines(
        Panel(
            "mTCP's paper: 8 cores, throughput",
            [
                curve("Linux 3.10, SO_REUSEPORT", pairs(lines[reuse]), reuse),
                curve("MegaPipe", pairs(lines["megapipe"])),
            ],
            LIVES,
            "hundred thousand messages/s",
            doubling=True,
        ),
        Panel(
            "MegaPipe over SO_REUSEPORT",
            [
                curve("mTCP's paper, throughput", gained, "MegaPipe"),
                *_gains(bench, BEST, "epoll-reuseport"),
            ],
            LIVES,
            "MegaPipe\n(times SO_REUSEPORT)",
            doubling=True,
            least=0.0,
            level=1.0,
        ),
    )


def _messages_learned(published: Published, bench: Bench) -> str:
    gains = dict(
        published.gain("mtcp messages per connection", "megapipe", "linux 3.10 SO_REUSEPORT")
    )
    short, long = bench.shortest, bench.longest
    here = [bench.gain(n, BEST, "epoll-reuseport") for n in (short, long)]
    crossed = max(n for n, gain in gains.items() if gain > 1)
    return (
        f"Against SO_REUSEPORT MegaPipe (Linux 3.1) is {gains[1]:.1f} times as fast at n = 1 and "
        f"loses somewhere beyond n = {crossed:g} ({gains[128]:.2f} times at n = 128) to a newer "
        f"Linux; here, both in one kernel, it is {plus_minus(here[0])} times {at_life(short)} and "
        f"{plus_minus(here[1])} times {at_life(long)} in instructions."
    )


def _costs(_: Published, bench: Bench) -> Figure:
    servers = [BASELINE, "epoll-reuseport", "io_uring", BEST, LIMIT]
    there = bench.servers(*servers)
    return figures.lines(instructions(bench, there), calls(bench, there))


def _costs_learned(_: Published, bench: Bench) -> str:
    short, long = bench.shortest, bench.longest
    said = []
    for n in (short, long):
        tax = {
            server: bench.at(n, server, LIMIT).tax(server, compare.instructions)
            for server in (BASELINE, BEST)
        }
        words = [
            f"{server} {plus_minus(hundred(one), 1, ' %')}"
            for server, one in tax.items()
            if one is not None
        ]
        said.append(f"{' and '.join(words)} {at_life(n)}")
    return (
        f"Of what a transaction costs, most is TCP/IP that no interface takes away; above the "
        f"limit, an echo in the kernel without any interface, is {said[0]}, {said[1]}."
    )


def _steps(_: Published, bench: Bench) -> Figure:
    ns = list(bench.lives)

    def saved(measure: Measure) -> list[Curve]:
        found = []
        for what, before, after in IN_ORDER:
            dots = []
            for number, n in enumerate(ns):
                one = bench.at(n, before, after).saved(after, measure, before)
                assert one is not None
                dots.append((float(number), one))
            found.append(Curve(STEPS[what], dots, what))
        return found

    places = [f"{n}" if n else "stays open" for n in ns]
    return figures.bars(
        Bars(f"{HERE}: instructions", places, saved(compare.instructions), LIVES,
             "instructions fewer\nper transaction"),
        Bars(f"{HERE}: system calls", places, saved(compare.calls("syscalls")), LIVES,
             "system calls fewer\nper transaction"),
    )  # fmt: skip


def _steps_learned(_: Published, bench: Bench) -> str:
    short = bench.shortest
    found = {
        what: bench.at(short, before, after).saved(after, compare.instructions, before)
        for what, before, after in IN_ORDER
    }
    words = ", ".join(
        f"{what} {plus_minus(one, 0)}" for what, one in found.items() if one is not None
    )
    return (
        f"Instructions that each optimisation saves, added in the paper's order, {at_life(short)}: "
        f"{words}; where a bar is below zero it costs some."
    )
