"""What a bench has to say to each lab."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from grader import compare
from grader.checks import Interval
from grader.compare import BASELINE, LIMIT, Measure
from grader.samples import Sample
from notebooks import figures
from notebooks.figures import Bars, Curve, curve
from notebooks.material import Bench, at_life, life
from notebooks.pictures import (
    BEST,
    HERE,
    INSTRUCTIONS,
    LIVES,
    OBJECTS,
    Picture,
    Pictures,
    calls,
    instructions,
    named,
    plus_minus,
)

# In the order in which a server of the lab makes them.
CALLS = ("epoll_wait", "read", "write", "accept", "epoll_ctl", "close")


def lab_pictures(lab: str, bench: Bench) -> Pictures:
    """Return what a bench has to say to a lab (the name of its folder)."""
    found = {
        "0-measure": (
            Picture("lab0-costs", lambda: _lab0(bench), lambda: _lab0_learned(bench)),
            Picture("lab0-calls", lambda: _named_calls(bench), lambda: _calls_learned(bench)),
            Picture(
                "lab0-objects",
                lambda: _objects(bench, (BASELINE, "io_uring", LIMIT)),
                lambda: _objects_learned(bench, BASELINE),
            ),
        ),
        "1-batching": (Picture("lab1-costs", lambda: _lab1(bench), lambda: _lab1_learned(bench)),),
        "2-partitioning": (
            Picture("lab2-costs", lambda: _lab2(bench), lambda: _lab2_learned(bench)),
        ),
        "3-lwsocket": (
            Picture(
                "lab3-objects",
                lambda: _objects(bench, ("BP", BEST, LIMIT)),
                lambda: _objects_learned(bench, "BP", BEST),
            ),
            Picture("lab3-saved", lambda: _lab3(bench), lambda: _lab3_learned(bench)),
        ),
    }
    pictures = named(found.get(lab, ()))
    if bench.transfers and lab in ("0-measure", "2-partitioning"):
        name = f"lab{lab[0]}-transfers"
        pictures[name] = Picture(name, lambda: _transfers(bench), lambda: _transfers_learned(bench))
    return pictures


def _places(bench: Bench) -> list[str]:
    return [f"{n}" if n else "stays open" for n in bench.lives]


def _grouped(bench: Bench, server: str, measure: Measure, label: str = "") -> Curve:
    dots = [(float(i), bench.spread(n, server, measure)) for i, n in enumerate(bench.lives)]
    return Curve(label or server, dots, server)


def _lab0(bench: Bench) -> Figure:
    return figures.bars(
        Bars(
            f"{HERE}: 64-byte messages",
            _places(bench),
            [_grouped(bench, server, compare.instructions) for server in (BASELINE, LIMIT)],
            LIVES,
            INSTRUCTIONS,
            digits=0,
        )
    )


def _lab0_learned(bench: Bench) -> str:
    short, open_ = bench.shortest, next(reversed(list(bench.lives)))
    one, other = (bench.spread(n, BASELINE).mean for n in (short, open_))
    above = bench.spread(short, BASELINE).mean - bench.spread(short, LIMIT).mean
    return (
        f"A transaction with a connection of its own takes {one / other:.2f} times as many "
        f"instructions as one {at_life(open_)}, and {above:,.0f} of them are above the limit."
    )


def _named_calls(bench: Bench) -> Figure:
    found = []
    for name in CALLS:
        dots = [
            (float(i), max(0.0, bench.spread(n, BASELINE, compare.calls(name)).mean))
            for i, n in enumerate(bench.lives)
        ]
        found.append(curve(name, dots))
    return figures.bars(
        Bars(
            f"{HERE}, epoll: which system calls",
            _places(bench),
            found,
            LIVES,
            "system calls per transaction",
            stacked=True,
            sums=[bench.spread(n, BASELINE, _sum_of_named) for n in bench.lives],
            digits=2,
        )
    )


def _sum_of_named(sample: Sample) -> float:
    return sum(sample.costs.calls[name] for name in CALLS)


def _calls_learned(bench: Bench) -> str:
    short, long = bench.shortest, next(reversed(list(bench.lives)))
    each = [bench.spread(n, BASELINE, compare.calls("syscalls")) for n in (short, long)]
    return (
        f"In all {plus_minus(each[0])} system calls per transaction {at_life(short)} and "
        f"{plus_minus(each[1])} {at_life(long)}: a read and a write are there always, the rest "
        f"belongs to the connection."
    )


def _objects(bench: Bench, servers: Sequence[str]) -> Figure:
    short = bench.shortest
    there = bench.at(short, *servers)

    def per_connection(server: str, name: str) -> Interval:
        one = there.spread(server, compare.calls(name))
        return Interval(max(one.mean, 0.0) * max(short, 1), one.half * max(short, 1))

    return figures.bars(
        Bars(
            f"{HERE}: {life(short)}",
            list(OBJECTS.values()),
            [
                Curve(
                    server,
                    [(float(i), per_connection(server, name)) for i, name in enumerate(OBJECTS)],
                    server,
                )
                for server in servers
            ],
            "what is allocated",
            "per connection",
            digits=2,
        )
    )


def _objects_learned(bench: Bench, server: str, without: str = LIMIT) -> str:
    short = bench.shortest
    total = {
        one: sum(bench.spread(short, one, compare.calls(name)).mean for name in OBJECTS)
        * max(short, 1)
        for one in (server, without)
    }
    return (
        f"{server} allocates {total[server]:.2f} files, inodes, dentries and descriptors for each "
        f"connection, {without} {max(total[without], 0):.2f}."
    )


def _lab1(bench: Bench) -> Figure:
    there = bench.servers("plain", "B", BASELINE, "io_uring", LIMIT)
    return figures.lines(calls(bench, there), instructions(bench, there))


def _lab1_learned(bench: Bench) -> str:
    short, long = bench.shortest, bench.longest
    calls = [
        bench.spread(long, server, compare.calls("syscalls")).mean for server in ("plain", "B")
    ]
    saved = [
        bench.at(n, "plain", "B").saved("B", compare.instructions, "plain") for n in (short, long)
    ]
    shares = [
        one.mean / bench.spread(n, "plain").mean
        for n, one in zip((short, long), saved, strict=True)
        if one is not None
    ]
    return (
        f"Batching takes {calls[0]:.2f} system calls per transaction down to {calls[1]:.2f} "
        f"{at_life(long)}, and with them {shares[1]:.0%} of the instructions there and "
        f"{shares[0]:.0%} {at_life(short)}, where most of the work is the connection's."
    )


def _lab2(bench: Bench) -> Figure:
    there = bench.servers("B", "BP", BASELINE, "epoll-reuseport", LIMIT)
    return figures.lines(instructions(bench, there), calls(bench, there))


def _lab2_learned(bench: Bench) -> str:
    short = bench.shortest
    saved = bench.at(short, "B", "BP").saved("BP", compare.instructions, "B")
    assert saved is not None
    known = "do tell" if abs(saved.mean) > saved.half else "do not tell"
    return (
        f"Partitioning changes the instructions of a transaction by {-saved.mean:+,.0f} ± "
        f"{saved.half:,.0f} {at_life(short)}, which these rounds {known} from nothing: what it "
        f"saves is waiting for memory and for each other, and instructions do not count that."
    )


def _lab3(bench: Bench) -> Figure:
    ns = [n for n in bench.lives if n]
    dots, each = [], []
    for place, n in enumerate(ns):
        one = bench.at(n, "BP", BEST).saved(BEST, compare.instructions, "BP")
        assert one is not None
        dots.append((float(place), one))
        each.append((float(place), Interval(one.mean * n, one.half * n)))
    places = [f"{n}" for n in ns]
    return figures.bars(
        Bars("per transaction", places, [Curve("BP -> BPL", dots, BEST)], LIVES,
             "instructions fewer\nper transaction"),
        Bars("per connection", places, [Curve("BP -> BPL", each, BEST)], LIVES,
             "instructions fewer\nper connection"),
    )  # fmt: skip


def _lab3_learned(bench: Bench) -> str:
    short, long = bench.shortest, bench.longest
    each = [bench.at(n, "BP", BEST).saved(BEST, compare.instructions, "BP") for n in (short, long)]
    assert each[0] is not None and each[1] is not None
    share = each[0].mean / bench.spread(short, "BP").mean
    return (
        f"lwsockets save {plus_minus(each[0], 0)} instructions per transaction {at_life(short)}, "
        f"{share:.0%} of all, and {plus_minus(each[1], 0)} {at_life(long)}: it is saved once for "
        f"each connection, and there it is shared by {long}."
    )


def _transfers(bench: Bench) -> Figure:
    n = next(iter(bench.transfers))
    moved = bench.transfers[n]
    # Most first, so that the picture is read from left to right.
    servers = sorted(moved, key=lambda server: -moved[server].mean)
    return figures.bars(
        Bars(
            f"{HERE}: {life(n)}",
            [server.replace("-", "-\n") for server in servers],
            [
                Curve(
                    "cache lines", [(float(i), moved[s]) for i, s in enumerate(servers)], "MegaPipe"
                )
            ],
            "server",
            "lines that move between\nprocessors, per transaction",
            digits=0,
        )
    )


def _transfers_learned(bench: Bench) -> str:
    n = next(iter(bench.transfers))
    words = ", ".join(
        f"{server} {plus_minus(bench.transfers[n][server], 0)}"
        for server in (BASELINE, "epoll-reuseport", "BP", BEST, LIMIT)
        if server in bench.transfers[n]
    )
    return f"Cache lines that move between processors for a transaction {at_life(n)}: {words}."
