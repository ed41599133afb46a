"""What was published: the figures and tables of two papers as data, see ``paper/README.md``."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grader.errors import UserError

FOLDER = Path(__file__).with_name("paper")
# What figures are called here: those of two papers must not be mixed up.
FILES = {"megapipe-osdi12.csv": "", "mtcp-nsdi14.csv": "mtcp "}
COLUMNS = ("figure", "series", "x_name", "x", "y_name", "y", "reading")


@dataclass(frozen=True)
class Point:
    """One number of a figure or a table."""

    figure: str
    series: str
    x_name: str
    x: float
    """In the unit that `x_name` names; infinite: the connection stays open."""
    y_name: str
    y: float
    """In the unit that `y_name` names."""
    reading: str
    """``printed`` in the paper, or ``digitised`` from its figure."""


@dataclass(frozen=True)
class Published:
    """All that was read."""

    points: tuple[Point, ...]

    def series(self, figure: str, y_name: str = "") -> dict[str, list[Point]]:
        """Return a figure's points by series, in the file's order.

        `y_name` chooses among the panels of a figure that has several. Raises KeyError for what
        the papers do not have.
        """
        found: dict[str, list[Point]] = {}
        for point in self.points:
            if point.figure == figure and y_name in ("", point.y_name):
                found.setdefault(point.series, []).append(point)
        if not found:
            raise KeyError(f"{figure} {y_name}")
        return found

    def at(self, figure: str, series: str, x: float, y_name: str = "") -> float:
        """Return one number; raises KeyError if the papers do not have it."""
        for point in self.series(figure, y_name)[series]:
            if point.x == x:
                return point.y
        raise KeyError(f"{figure} {series} at {x:g}")

    def gain(
        self, figure: str, series: str, base: str, y_name: str = ""
    ) -> list[tuple[float, float]]:
        """Return x, and how many times as much `series` has there as `base`; where both have."""
        lines = self.series(figure, y_name)
        beside = {point.x: point.y for point in lines[base]}
        return [(p.x, p.y / beside[p.x]) for p in lines[series] if p.x in beside]


def read(folder: Path = FOLDER) -> Published:
    """Read the files of a folder. Raises `UserError` if one is not what it should be."""
    points: list[Point] = []
    for name, prefix in FILES.items():
        points += _points(folder / name, prefix)
    return Published(tuple(points))


def _points(path: Path, prefix: str) -> Sequence[Point]:
    restore = "git checkout -- notebooks/paper brings the project's own back"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            points = [
                Point(
                    prefix + row["figure"],
                    row["series"],
                    row["x_name"],
                    float(row["x"]),
                    row["y_name"],
                    float(row["y"]),
                    row["reading"],
                )
                for row in rows
            ]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}", restore) from None
    if not points or any(math.isnan(point.x) or math.isnan(point.y) for point in points):
        raise UserError(f"{path} holds no numbers", restore)
    return points
