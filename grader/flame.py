"""Flame graphs as self-contained SVG: no part of it is fetched, and a browser zooms on a click.

The width of a box is what a function and everything below it costs, in instructions per
transaction. What runs in a softirq stands on its own (see `at_root`), for it only happened to
interrupt the function below it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from grader.layers import LAYERS, charged, title
from grader.probe.sources import Site
from grader.probe.stacks import CallPath

WIDTH = 1500.0
MARGIN = 12.0
ROW = 17.0
FONT = 11.0
# Of DejaVu Sans Mono and its kin, by the size.
LETTER = 0.61
# Narrower boxes cannot be seen; their width stays with the box below them.
NARROWEST = 0.4
LEGEND_COLUMNS = 5
SOFTIRQ = "handle_softirqs"

# After Okabe and Ito, who chose them to be told apart whatever one's colour vision; where a layer
# shares a hue with another, one of them is much lighter. Every box has its name as well.
COLOURS: Mapping[str, str] = {
    "user": "#bdbdbd",
    "system calls": "#f0e442",
    "interrupts": "#8c8c8c",
    "MegaPipe": "#d55e00",
    "limit": "#f4a582",
    "epoll": "#d55e00",
    "io_uring": "#d55e00",
    "files": "#e69f00",
    "sockets": "#ffd27f",
    "TCP": "#56b4e9",
    "packet buffers": "#b3e0f7",
    "driver": "#3fb68f",
    "IP": "#4a90c4",
    "timers": "#d9d0b4",
    "scheduler": "#a6d96a",
    "security": "#b9a3d6",
    "RCU": "#8e7cc3",
    "allocator": "#cc79a7",
    "memory": "#e8bcd3",
    "clock": "#fff7d6",
    "other": "#eeeeee",
}
# From less to more, through nothing.
LESS, SAME, MORE = (33, 113, 181), (242, 242, 242), (217, 95, 2)


@dataclass
class _Node:
    name: str
    file: str
    layer: str
    depth: int
    own: tuple[float, ...]
    children: dict[Site, _Node] = field(default_factory=dict)

    # Asked for when the tree is complete.
    @functools.cached_property
    def totals(self) -> tuple[float, ...]:
        """The sums over this function and everything that it called, for each server."""
        below = [child.totals for child in self.children.values()]
        return tuple(map(sum, zip(self.own, *below, strict=True)))

    @functools.cached_property
    def width(self) -> float:
        """What is drawn: each part as wide as where it is dearest."""
        return max(0.0, *self.own) + sum(child.width for child in self.children.values())


@dataclass(frozen=True)
class _Box:
    x: float
    width: float
    depth: int
    name: str
    tip: str
    colour: str


def at_root(path: CallPath) -> CallPath:
    """Return a call path without what a softirq has interrupted."""
    for start in range(len(path) - 1, 0, -1):
        if path[start].name == SOFTIRQ:
            return path[start:]
    return path


def graph(heading: str, paths: Mapping[CallPath, float]) -> str:
    """Return the flame graph of one server's instructions per transaction, coloured by layer."""
    root = _tree([paths])
    total = root.width

    def tip(node: _Node) -> str:
        (cost,), (own,) = node.totals, node.own
        return (
            f"{node.name}\n{_place(node)}\n{cost:,.0f} instructions per transaction "
            f"({100 * cost / total:.1f} %), {own:,.0f} of them its own"
        )

    def colour(node: _Node) -> str:
        return COLOURS[node.layer]

    sums = dict.fromkeys(LAYERS, 0.0)
    for path, count in paths.items():
        sums[charged(path)] += count
    legend = [
        (COLOURS[layer], f"{title(layer)}: {sums[layer]:,.0f}")
        for layer in LAYERS
        if sums[layer] >= 0.5
    ]
    subtitle = f"{sum(paths.values()):,.0f} instructions per transaction, each at its call path"
    return _svg(heading, subtitle, _boxes(root, tip, colour), legend)


def difference(
    heading: str,
    before: Mapping[CallPath, float],
    after: Mapping[CallPath, float],
    names: tuple[str, str],
) -> str:
    """Return how one server differs from another; what either of them does has its place."""
    root = _tree([before, after])
    # A twentieth of everything is as much colour as there is.
    strongest = root.width / 20

    def tip(node: _Node) -> str:
        old, new = node.totals
        return (
            f"{node.name}\n{_place(node)}\n{names[0]}: {old:,.0f}, {names[1]}: {new:,.0f} "
            f"instructions per transaction ({new - old:+,.0f})"
        )

    def colour(node: _Node) -> str:
        old, new = node.totals
        return _mixed((new - old) / strongest)

    legend = [
        (_mixed(share), f"{names[1]} {abs(share * strongest):,.0f} {word}")
        for share, word in ((-1.0, "less"), (-0.3, "less"), (0.3, "more"), (1.0, "more"))
    ]
    old, new = sum(before.values()), sum(after.values())
    subtitle = (
        f"{names[1]} {new:,.0f}, {names[0]} {old:,.0f} instructions per transaction "
        f"({new - old:+,.0f}); a box is as wide as the dearer of the two"
    )
    return _svg(heading, subtitle, _boxes(root, tip, colour), legend)


def _place(node: _Node) -> str:
    return f"{title(node.layer)}, {node.file}" if node.file else title(node.layer)


def _mixed(share: float) -> str:
    """Return the colour for -1 (less) to 1 (more); the root spreads what is near nothing."""
    end = MORE if share > 0 else LESS
    amount = min(1.0, abs(share)) ** 0.5
    mixed = (round(a + (b - a) * amount) for a, b in zip(SAME, end, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _tree(servers: Sequence[Mapping[CallPath, float]]) -> _Node:
    root = _Node("all", "", "other", 0, (0.0,) * len(servers))
    for number, paths in enumerate(servers):
        for whole, count in paths.items():
            node = root
            path = at_root(whole)
            for depth, site in enumerate(path, 1):
                if site not in node.children:
                    layer = charged(path[:depth])
                    node.children[site] = _Node(
                        site.name, site.file, layer, depth, (0.0,) * len(servers)
                    )
                node = node.children[site]
            own = list(node.own)
            own[number] += count
            node.own = tuple(own)
    return root


def _boxes(
    root: _Node, tip: Callable[[_Node], str], colour: Callable[[_Node], str]
) -> Iterable[_Box]:
    scale = (WIDTH - 2 * MARGIN) / root.width
    waiting = [(root, MARGIN)]
    while waiting:
        node, x = waiting.pop()
        width = node.width * scale
        if width < NARROWEST:
            continue
        name = node.name
        yield _Box(x, width, node.depth, name, tip(node), colour(node))
        for site in sorted(node.children):
            child = node.children[site]
            waiting.append((child, x))
            x += child.width * scale


def _svg(
    heading: str,
    subtitle: str,
    boxes: Iterable[_Box],
    legend: Sequence[tuple[str, str]],
) -> str:
    found = list(boxes)
    rows = 1 + max(box.depth for box in found)
    legend_rows = -(-len(legend) // LEGEND_COLUMNS)
    top = 58 + legend_rows * 18
    height = top + rows * ROW + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="DejaVu Sans Mono, monospace" '
        f'font-size="{FONT}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="24" font-size="16" font-weight="bold">{escape(heading)}</text>',
        f'<text x="{MARGIN}" y="44">{escape(subtitle)}</text>',
        f'<text id="all" x="{WIDTH - MARGIN}" y="24" text-anchor="end" visibility="hidden" '
        'fill="#0b5394" style="cursor:pointer">show everything</text>',
    ]
    for number, (colour, text) in enumerate(legend):
        x = MARGIN + (number % LEGEND_COLUMNS) * (WIDTH - 2 * MARGIN) / LEGEND_COLUMNS
        y = 56.0 + number // LEGEND_COLUMNS * 18
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="12" height="12" fill="{colour}" stroke="#666" '
            f'stroke-width="0.5"/><text x="{x + 17:.1f}" y="{y + 10}">{escape(text)}</text>'
        )
    for box in found:
        y = top + (rows - 1 - box.depth) * ROW
        label = escape(_label(box))
        lines.append(
            f'<g class="f" data-n={quoteattr(box.name)}><title>{escape(box.tip)}</title>'
            f'<rect x="{box.x:.2f}" y="{y:.1f}" width="{box.width:.2f}" height="{ROW - 1}" '
            f'fill="{box.colour}" stroke="#ffffff" stroke-width="0.4"/>'
            f'<text x="{box.x + 3:.2f}" y="{y + 12:.1f}" fill="{_ink(box.colour)}">{label}</text>'
            "</g>"
        )
    lines += [f"<script><![CDATA[{_ZOOM}]]></script>", "</svg>"]
    return "\n".join(lines) + "\n"


def _ink(paper: str) -> str:
    """Return black or white, whichever is read better on a colour."""
    red, green, blue = (int(paper[at : at + 2], 16) for at in (1, 3, 5))
    return "#000000" if 299 * red + 587 * green + 114 * blue > 118_000 else "#ffffff"


def _label(box: _Box) -> str:
    letters = int((box.width - 6) / (FONT * LETTER))
    if letters >= len(box.name):
        return box.name
    return f"{box.name[: letters - 1]}…" if letters >= 4 else ""


# A click makes the box as wide as the picture, with what is above it; what it stands on stays.
_ZOOM = f"""
const left = {MARGIN}, wide = {WIDTH - 2 * MARGIN}, letter = {FONT * LETTER};
const all = document.getElementById("all");
const frames = [...document.querySelectorAll("g.f")].map(g => {{
  const r = g.querySelector("rect"), t = g.querySelector("text");
  return {{g, r, t, x: +r.getAttribute("x"), w: +r.getAttribute("width"),
          y: +r.getAttribute("y"), n: g.dataset.n}};
}});
function show(to) {{
  const k = to ? wide / to.w : 1, x0 = to ? to.x : left;
  for (const f of frames) {{
    const under = to && f.y > to.y && f.x <= to.x + 0.01 && f.x + f.w >= to.x + to.w - 0.01;
    const inside = !to || (f.y <= to.y && f.x >= to.x - 0.01 && f.x + f.w <= to.x + to.w + 0.01);
    f.g.style.display = under || inside ? "" : "none";
    const x = under ? left : left + (f.x - x0) * k, w = under ? wide : f.w * k;
    f.r.setAttribute("x", x);
    f.r.setAttribute("width", w);
    f.r.style.opacity = under ? 0.5 : 1;
    f.t.setAttribute("x", x + 3);
    const fit = Math.floor((w - 6) / letter);
    f.t.textContent = fit >= f.n.length ? f.n : fit >= 4 ? f.n.slice(0, fit - 1) + "…" : "";
  }}
  all.setAttribute("visibility", to ? "visible" : "hidden");
}}
for (const f of frames) f.g.addEventListener("click", () => show(f));
all.addEventListener("click", () => show(null));
"""
