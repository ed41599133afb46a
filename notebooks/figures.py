"""Data -> pictures: pure functions, one look.

Whatever is told by a colour is told by a marker, a line's pattern or a hatch as well, so that a
picture can be read in grey and by those who do not tell colours apart (the colours are those of
Okabe and Ito). Letters stay readable at half the size. A bar or a dot that was measured several
times has its 95 % interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from grader.checks import Interval, interval

_STYLE: Any = {
    "font.size": 12.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 12.5,
    "legend.fontsize": 12,
    "lines.linewidth": 1.8,
    "lines.markersize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.8,
}
_WIDTH, _HEIGHT = 10.5, 4.4
"""Inches, of two panels side by side."""
_P = ParamSpec("_P")


@dataclass(frozen=True)
class _Mark:
    colour: str
    marker: str
    line: Any
    hatch: str = ""


_MARKS: Mapping[str, _Mark] = {
    "baseline": _Mark("#D55E00", "s", "--", "//"),
    "MegaPipe": _Mark("#0072B2", "o", "-"),
    "SO_REUSEPORT": _Mark("#009E73", "^", "-.", ".."),
    "io_uring": _Mark("#CC79A7", "D", (0, (1, 1)), "xx"),
    "limit": _Mark("#000000", "x", (0, (4, 1, 1, 1)), "\\\\"),
    "P": _Mark("#E69F00", "v", "-.", ".."),
    "B": _Mark("#56B4E9", "P", "--", "//"),
    "L": _Mark("#009E73", "X", ":", "xx"),
    "BP": _Mark("#CC79A7", "D", "-.", "\\\\"),
    "plain": _Mark("#777777", "d", ":", "--"),
    "mTCP": _Mark("#CC79A7", "*", "-"),
    "all together": _Mark("#444444", "D", "-"),
    "here": _Mark("#000000", "D", (0, (3, 1, 1, 1, 1, 1))),
    "here, model": _Mark("#000000", "*", ":"),
}
# The same thing has the same look under every name that papers and results give it.
_SAME = {
    "epoll": "baseline",
    "linux 3.10": "baseline",
    "BPL": "MegaPipe",
    "megapipe": "MegaPipe",
    "epoll-reuseport": "SO_REUSEPORT",
    "linux 3.10 SO_REUSEPORT": "SO_REUSEPORT",
    "mtcp": "mTCP",
}
_MARKERS = "osD^vPX*"
# Of these so little is filled that they look smaller than they are.
_SLIM = "PX*"
_HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
_GREY = "#555555"


@dataclass(frozen=True)
class Curve:
    """What one line or one row of bars shows."""

    label: str
    dots: Sequence[tuple[float, float | Interval]]
    """x and y; an x that is infinite is a connection that stays open."""
    like: str = ""
    """Whose look it has; without: that of `label`."""


def curve(label: str, points: Sequence[tuple[float, float]], like: str = "") -> Curve:
    """Return the curve of plain numbers."""
    return Curve(label, tuple(points), like)


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines."""

    title: str
    curves: Sequence[Curve]
    x: str
    """The label of the axis, with its unit."""
    y: str
    doubling: bool = False
    """Whether x grows by factors of two; an x that is infinite then stands beyond the others."""
    log: bool = False
    """Whether y grows by factors."""
    least: float | None = 0.0
    """Where y begins."""
    level: float | None = None
    """A thin line, for example where nothing is gained."""


def _look(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @functools.wraps(draw)
    def drawn(*arguments: _P.args, **named: _P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*arguments, **named)

    return drawn


# --------------------------------------------------------------------------------------- lines


@_look
def lines(*panels: Panel) -> Figure:
    """Return a picture of one to four panels with lines; one legend for all of them."""
    figure, axes, legend = _axes(len(panels))
    for each, panel in zip(axes, panels, strict=True):
        known = list(dict.fromkeys(one.label for other in panels for one in other.curves))
        _panel(each, panel, known)
    _legend(figure, axes, legend)
    return figure


def _axes(count: int) -> tuple[Figure, list[Axes], Axes | None]:
    """Return a figure, its axes, and the axes in which there is room for a legend, if any."""
    if count == 1:
        figure = Figure(figsize=(0.72 * _WIDTH, _HEIGHT + 0.5), layout="constrained")
        return figure, [figure.add_subplot()], None
    rows = math.ceil(count / 2)
    figure = Figure(figsize=(_WIDTH, rows * _HEIGHT), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)  # type: ignore[union-attr,call-arg]
    axes = [figure.add_subplot(rows, 2, number + 1) for number in range(count)]
    if count % 2 == 0:
        return figure, axes, None
    free = figure.add_subplot(rows, 2, count + 1)
    free.set_axis_off()
    return figure, axes, free


def _legend(figure: Figure, axes: Sequence[Axes], free: Axes | None) -> None:
    shown: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            # The line alone: how long an interval is, is seen where it stands.
            line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
            shown.setdefault(label, line)
    where: dict[str, Any] = {"frameon": False, "handlelength": 3.2}
    if free is not None:
        free.legend(shown.values(), shown.keys(), loc="center", **where)
    else:
        columns = _columns(list(shown), figure.get_figwidth())
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=columns, **where
        )


def _columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns of a legend fit into so many inches."""
    longest = max(map(len, labels), default=1)
    fitting = int(width / (0.095 * longest + 0.9))
    rows = math.ceil(len(labels) / max(1, fitting))
    return max(1, math.ceil(len(labels) / max(1, rows)))


def _panel(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    longest = _longest([x for one in panel.curves for x, _ in one.dots])
    for one in panel.curves:
        mark = _mark(one, labels)
        xs = [_place(x, panel.doubling, longest) for x, _ in one.dots]
        ys = [y.mean if isinstance(y, Interval) else y for _, y in one.dots]
        halves = [y.half if isinstance(y, Interval) else 0.0 for _, y in one.dots]
        axes.errorbar(
            xs,
            ys,
            yerr=halves if any(halves) else None,
            color=mark.colour,
            marker=mark.marker,
            linestyle=mark.line if len(xs) > 1 else "none",
            markeredgecolor=mark.colour if mark.marker == "x" else "white",
            markeredgewidth=2 if mark.marker == "x" else 0.5,
            markersize=11 if mark.marker in _SLIM else 7.5,
            capsize=4,
            label=one.label,
        )
    if panel.level is not None:
        axes.axhline(panel.level, color=_GREY, lw=1, zorder=1)
    _scale(axes, panel, longest)
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)


def _scale(axes: Axes, panel: Panel, longest: float) -> None:
    xs = sorted({x for one in panel.curves for x, _ in one.dots})
    if not panel.doubling:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        # Of two that would touch each other, the power of two stays.
        there = [x for x in xs if math.isinf(x) or _alone(x, xs)]
        axes.set_xticks(
            [_place(x, panel.doubling, longest) for x in there], [_tick(x) for x in there]
        )
        if len(there) > 9:
            axes.tick_params(axis="x", labelsize=11)
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10.0**decade for decade in decades for step in (1, 1.5, 2, 3, 5, 7)]
        axes.set_yticks(ticks, [f"{t:,g}" for t in ticks])
        axes.set_ylim(low, high)
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.least is not None:
        axes.set_ylim(bottom=panel.least)
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _thousands(value: float, _: object) -> str:
    return f"{value:,.10g}"


def _longest(xs: Collection[float]) -> float:
    return max((x for x in xs if not math.isinf(x)), default=1.0)


def _place(x: float, doubling: bool, longest: float) -> float:
    """Return where on the axis x stands."""
    if not doubling:
        return x
    return math.log2(longest) + 1.5 if math.isinf(x) else math.log2(x)


def _alone(x: float, xs: Sequence[float]) -> bool:
    return math.log2(x).is_integer() or all(
        abs(math.log2(x / other)) > 0.5 for other in xs if other != x and not math.isinf(other)
    )


def _tick(x: float) -> str:
    if math.isinf(x):
        return "stays\nopen"
    return f"{x / 1024:g} K" if x >= 1024 else f"{x:g}"


def _mark(one: Curve, labels: Sequence[str]) -> _Mark:
    name = one.like or one.label
    name = _SAME.get(name, name)
    if name in _MARKS:
        return _MARKS[name]
    others = [label for label in labels if _SAME.get(label, label) not in _MARKS]
    index = others.index(one.label)
    # Dark to light, for those that have an order.
    shade = mpl.colormaps["cividis"](0.85 * index / max(1, len(others) - 1))
    patterns = ("-", "--", "-.", ":")
    return _Mark(
        mpl.colors.to_hex(shade),
        _MARKERS[index % len(_MARKERS)],
        patterns[index % len(patterns)],
        _HATCHES[index % len(_HATCHES)],
    )


# ---------------------------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Bars:
    """One pair of axes with bars: a group for each place, in it a bar of each curve."""

    title: str
    places: Sequence[str]
    curves: Sequence[Curve]
    """Their x are 0, 1, 2, ...: the places' numbers."""
    x: str
    y: str
    stacked: bool = False
    sums: Sequence[Interval] = ()
    """Of stacked bars that were measured several times: each place's sum, for its spread."""
    digits: int | None = None
    """How many digits of a bar's height are written at it; None: it is not written."""


@_look
def bars(*panels: Bars) -> Figure:
    """Return a picture of one to four panels with bars; one legend for all of them."""
    figure, axes, legend = _axes(len(panels))
    labels = list(dict.fromkeys(one.label for panel in panels for one in panel.curves))
    for each, panel in zip(axes, panels, strict=True):
        _bars(each, panel, labels)
    _legend(figure, axes, legend)
    return figure


def _bars(axes: Axes, panel: Bars, labels: Sequence[str]) -> None:
    width = 0.72 if panel.stacked else 0.8 / len(panel.curves)
    floor = np.zeros(len(panel.places))
    for number, one in enumerate(panel.curves):
        mark = _mark(one, labels)
        places = np.array([x for x, _ in one.dots])
        heights = np.array([y.mean if isinstance(y, Interval) else y for _, y in one.dots])
        halves = [y.half if isinstance(y, Interval) else 0.0 for _, y in one.dots]
        shift = 0.0 if panel.stacked else (number - (len(panel.curves) - 1) / 2) * width
        at = places.astype(int)
        drawn = axes.bar(
            places + shift,
            heights,
            width,
            bottom=floor[at] if panel.stacked else None,
            color=mark.colour,
            edgecolor="white",
            linewidth=0.6,
            hatch=mark.hatch,
            yerr=halves if any(halves) else None,
            error_kw={"capsize": 3, "ecolor": "black", "lw": 1.3},
            label=one.label,
        )
        if panel.stacked:
            floor[at] += heights
        elif panel.digits is not None:
            texts = [f"{height:z,.{panel.digits}f}" for height in heights]
            axes.bar_label(drawn, texts, padding=2, fontsize=10)
    for place, total in enumerate(panel.sums):
        axes.errorbar(place, total.mean, yerr=total.half, color="black", capsize=4, lw=1.3)
    if panel.digits is not None and panel.stacked:
        for place, height in enumerate(floor):
            axes.annotate(
                f"{height:,.{panel.digits}f}",
                (place, height + (panel.sums[place].half if panel.sums else 0)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=10.5,
            )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(panel.places)), panel.places)
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.margins(y=0.1)


# -------------------------------------------------------------------------------------- grades


@dataclass(frozen=True)
class Row:
    """A bar with a name: what was reached of what can be."""

    name: str
    value: float
    most: float
    note: str


@_look
def reached(title: str, rows: Sequence[Row], x: str, labels: tuple[str, str]) -> Figure:
    """Return bars inside bars: `value` of `most`, with the note beside it.

    `labels` say what the inner and the outer bars are.
    """
    figure = Figure(figsize=(_WIDTH, 1.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = [row.name for row in rows]
    most, values = [row.most for row in rows], [row.value for row in rows]
    axes.barh(names, most, color="white", edgecolor=_GREY, hatch="..", height=0.7, label=labels[1])
    axes.barh(names, values, color="#0072B2", edgecolor="black", height=0.7, label=labels[0])
    for height, row in enumerate(rows):
        axes.annotate(
            row.note,
            (max(row.most, row.value), height),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=11.5,
        )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    # The room at the right is for the notes.
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= max(most)])
    axes.set_xlabel(x)
    axes.set_title(title, loc="left", fontweight="bold")
    _legend(figure, [axes], None)
    return figure


@dataclass(frozen=True)
class Judged:
    """A count that gives points: of whom it is what, and where the points begin."""

    title: str
    x: str
    values: Mapping[str, Sequence[float]]
    """By name, one for each round; the names are those of `_JUDGED`."""
    steps: Sequence[tuple[float, str]]
    """Where on the axis a step is, and what it gives."""
    limit: Interval | None = None
    """What an echo in the kernel costs, if that was measured."""


_JUDGED = {
    "starter": ("white", "#D55E00", "s"),
    "solution": ("#009E73", "#009E73", "D"),
    "submission": ("#0072B2", "#0072B2", "o"),
}


@_look
def judged(found: Sequence[Judged]) -> Figure:
    """Return a panel for each count: a dot for each round, mean with its interval, the steps."""
    figure = Figure(figsize=(_WIDTH, 0.7 + 2.25 * len(found)), layout="constrained")
    axes = [figure.add_subplot(len(found), 1, number + 1) for number in range(len(found))]
    for each, one in zip(axes, found, strict=True):
        _judged(each, one)
    _legend(figure, axes, None)
    return figure


def _judged(axes: Axes, one: Judged) -> None:
    names = list(one.values)
    for height, name in enumerate(reversed(names)):
        fill, edge, marker = _JUDGED[name]
        values = np.array(one.values[name])
        # The first round on top, so that equal counts do not hide each other.
        heights = np.linspace(height + 0.2, height - 0.2, len(values))
        axes.scatter(values, heights, s=48, c=fill, edgecolors=edge, marker=marker, zorder=3)
        seen = interval(one.values[name])
        axes.errorbar(
            seen.mean,
            height,
            xerr=seen.half,
            color="black",
            marker="|",
            markersize=14,
            capsize=5,
            zorder=4,
            linestyle="none",
            label="mean, with 95 % interval",
        )
    # Steps may lie close together.
    for level, (x, text) in enumerate(reversed(one.steps)):
        label = "points from here on, to the left"
        axes.axvline(x, color="black", lw=1, ls=(0, (4, 2)), zorder=1, label=label)
        axes.text(
            x,
            1.0 + 0.14 * level,
            text,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=11,
        )
    if one.limit is not None:
        axes.axvline(
            one.limit.mean, color="black", lw=1.6, ls=":", zorder=1, label="the limit (bench)"
        )
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_ylim(-0.55, len(names) - 0.45)
    axes.set_xlabel(one.x)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    above = 22 + 14 * max(0, len(one.steps) - 1)
    axes.set_title(one.title, loc="left", fontweight="bold", pad=above if one.steps else 6)


@dataclass(frozen=True)
class Answer:
    """An answer beside what the grader has measured, both in parts of the latter's mean."""

    name: str
    given: float
    low: float
    high: float
    """What is accepted."""
    right: bool
    note: str


@_look
def answers(found: Sequence[Answer]) -> Figure:
    """Return the answers that are numbers, each with the band of what is accepted."""
    figure = Figure(figsize=(_WIDTH, 1.9 + 0.42 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for height, one in enumerate(found):
        axes.barh(
            height,
            one.high - one.low,
            left=one.low,
            height=0.6,
            color="#dddddd",
            edgecolor=_GREY,
            hatch="..",
            label="accepted",
        )
        axes.plot(
            one.given,
            height,
            "o" if one.right else "X",
            color="#0072B2" if one.right else "#D55E00",
            markersize=10,
            label="your answer, accepted" if one.right else "your answer, not accepted",
        )
    axes.axvline(1, color="black", lw=1, label="what the grader measured")
    axes.set_yticks(range(len(found)), [f"{one.name}\n{one.note}" for one in found], fontsize=11)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    # Otherwise nothing is left of a band that begins farthest left.
    axes.use_sticky_edges = False
    axes.margins(x=0.06)
    axes.set_xlabel("answer, in parts of what the grader measured (1 = the same)")
    axes.set_title("Your numbers beside the grader's", loc="left", fontweight="bold")
    _legend(figure, [axes], None)
    return figure


@_look
def histogram(scores: Sequence[float], most: float, without: int) -> Figure:
    """Return how many students have how many points; `without` is the number of those with none."""
    figure = Figure(figsize=(0.8 * _WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        scores,
        bins=20,
        range=(0, most),
        color="#56B4E9",
        edgecolor="black",
        hatch="//",
        label=f"students with a grade ({len(scores)})",
    )
    if scores:
        middle = float(np.median(scores))
        axes.axvline(middle, color="black", lw=2, ls="--", label=f"median: {middle:g} points")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"points of {most:g}")
    axes.set_ylabel("number of students")
    title = f"Points; {without} without a grade" if without else "Points"
    axes.set_title(title, loc="left", fontweight="bold")
    _legend(figure, [axes], None)
    return figure
