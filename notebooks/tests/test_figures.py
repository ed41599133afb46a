"""The pictures: whole, labelled, readable without colours; and what is said of bad input."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from grader import compare
from grader.checks import Interval
from grader.errors import UserError
from grader.lab import known_labs, load_lab
from grader.progress import Progress
from grader.tests import documents
from notebooks import figures, material, published, run
from notebooks.figures import Bars, Curve, Panel, curve
from notebooks.material import Bench, Missing
from notebooks.pictures import Picture
from notebooks.pictures.grades import grade_pictures
from notebooks.pictures.labs import lab_pictures
from notebooks.pictures.paper import paper_pictures

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The recorded bench, with transfers that are made up."""
    plain = material.bench()
    moved = {"servers": {}}  # type: dict[str, dict[str, Any]]
    for number, server in enumerate(plain.servers()):
        rounds = [{"moved": {"loads": 10.0 * number + r, "stores": 5.0}} for r in range(3)]
        moved["servers"][server] = rounds
    cell = {"vcpus": material.VCPUS, "size": material.SIZE, "per_connection": 1, **moved}
    path = tmp_path_factory.mktemp("sharing") / "sharing.json"
    path.write_text(json.dumps({"identity": plain.document["identity"], "cells": [cell]}))
    return material.bench(material.BENCH, path)


@pytest.fixture(scope="module")
def everything(bench: Bench) -> dict[str, Picture]:
    """Every picture there is."""
    found = {picture.name: picture for picture in run.all_pictures()}
    found |= paper_pictures(published.read(), bench)
    for lab in known_labs():
        found |= lab_pictures(lab, bench)
    found |= grade_pictures(documents.document())
    answered = {
        **documents.document(),
        "lab": "0-measure",
        "checks": [_answer("syscalls-long", 2.02, "pass"), _answer("transfers", 900.0, "fail")],
    }
    return found | grade_pictures(answered)


def _answer(id: str, given: float, verdict: str) -> dict[str, Any]:
    return {
        "id": id,
        "verdict": verdict,
        "points": 1.0,
        "max_points": 2.0,
        "measured": {"answer": given},
        "compared_with": {"mean": 2.0, "half_width": 0.1, "low": 1.9, "high": 2.1},
        "samples": {},
    }


@pytest.fixture(scope="module")
def drawn(everything: dict[str, Picture]) -> dict[str, Figure]:
    return {name: picture.draw() for name, picture in everything.items()}


def _used(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison]


def test_axes_say_what_they_show_and_in_what_unit(drawn: dict[str, Figure]) -> None:
    # What can stand on an axis: a count of something, or a measure with its unit.
    units = (
        *("transaction", "connection", "point", "student", "cores", "server", "bytes"),
        *("/s", "µs", "%", "times", "parts", "whose files", "allocated", "requests"),
    )
    for name, figure in drawn.items():
        assert _used(figure), name
        for axes in _used(figure):
            for axis, ticks in ((axes.xaxis, axes.get_xticks()), (axes.yaxis, axes.get_yticks())):
                label = axis.get_label_text()
                names = [text.get_text() for text in axis.get_ticklabels()]
                # Rows with names need no unit.
                if not label:
                    assert len(names) == len(ticks) and all(names), name
                else:
                    assert any(unit in label for unit in units), f"{name}: {label}"
            assert axes.get_title(loc="left"), name


def test_every_line_and_bar_is_in_a_legend(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
        texts = {text.get_text() for one in legends if one for text in one.get_texts()}
        for axes in _used(figure):
            _, labels = axes.get_legend_handles_labels()
            assert labels and set(labels) <= texts, name


def _written(figure: Figure) -> Iterator[float]:
    """Yield every height of a line's dot or a bar."""
    for axes in figure.axes:
        for line in axes.get_lines():
            yield from np.asarray(line.get_ydata(), dtype=float)
        yield from (bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle))


def test_every_number_of_the_papers_is_in_its_picture(
    everything: dict[str, Picture], drawn: dict[str, Figure]
) -> None:
    papers = published.read()
    by_figure = {one.published: one.name for one in everything.values() if one.published}
    assert {point.figure for point in papers.points} == set(by_figure)
    for figure, name in by_figure.items():
        there = np.sort(np.fromiter(_written(drawn[name]), dtype=float))
        for point in papers.points:
            if point.figure == figure:
                assert np.isclose(there, point.y).any(), f"{name} lacks {point}"


def test_a_picture_fits_its_sheet(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        image = matplotlib.image.imread(io.BytesIO(run.png(figure)))[:, :, :3]
        edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edge == 1).all(), f"{name} is cut off"


def test_what_is_told_apart_by_colour_is_told_apart_without(bench: Bench) -> None:
    marks = figures._MARKS
    for one, other in itertools.combinations(set(marks.values()), 2):
        assert (one.marker, one.line) != (other.marker, other.line)
    # Bars that stand side by side: by hatch, or by how light they are.
    for one, other in itertools.combinations([marks[name] for name in ("P", "B", "L")], 2):
        assert one.hatch != other.hatch
        assert to_rgb(one.colour) != to_rgb(other.colour)
    many = [curve(f"n = {n}", [(1, n), (2, n)]) for n in range(8)]
    figure = figures.lines(Panel("", many, "cores", "times"))
    looks = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) >= len(many)


def test_spread_is_drawn_as_it_was_measured() -> None:
    dots = [(1.0, Interval(10.0, 2.0)), (2.0, Interval(5.0, 1.0))]
    figure = figures.lines(Panel("", [Curve("a", dots)], "cores", "times"))
    (container,) = figure.axes[0].containers
    assert isinstance(container, ErrorbarContainer)
    (bars,) = container.lines[2]
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [(8.0, 12.0), (4.0, 6.0)]
    figure = figures.bars(Bars("", ["x", "y"], [Curve("a", [(0, dots[0][1])])], "x", "y"))
    (bar,) = figure.axes[0].patches
    assert isinstance(bar, Rectangle)
    assert bar.get_height() == 10.0


def test_the_gain_is_the_ratio_round_by_round(bench: Bench) -> None:
    n = next(iter(bench.lives))
    samples = bench.lives[n].samples
    each = [
        base.costs.work / mine.costs.work
        for base, mine in zip(samples["epoll"], samples["BPL"], strict=True)
    ]
    assert bench.gain(n, "BPL", "epoll").mean == pytest.approx(np.mean(each))
    saved = bench.at(n).saved("BPL", compare.instructions)
    assert saved is not None
    assert saved.mean == pytest.approx(bench.spread(n, "epoll").mean - bench.spread(n, "BPL").mean)


def test_sentences_have_the_numbers_of_their_pictures(everything: dict[str, Picture]) -> None:
    for name, picture in everything.items():
        text = picture.learned()
        assert text.endswith(".") and "\n" not in text, name
        assert any(sign.isdigit() for sign in text), name
    assert "6.8 times" in everything["paper-fig1a"].learned()
    assert "1 of the 2 numbers" in everything["grade0-answers"].learned()


def test_pictures_are_written_as_svg_and_png_and_are_the_same_again(
    tmp_path: Path, everything: dict[str, Picture]
) -> None:
    few = [everything[name] for name in ("paper-fig5", "class-scores")]
    first = {path.name: path.read_bytes() for path in run.plot(few, tmp_path / "a", QUIET)}
    assert set(first) == {f"{one.name}.{kind}" for one in few for kind in ("svg", "png")}
    again = {path.name: path.read_bytes() for path in run.plot(few, tmp_path / "b", QUIET)}
    assert first == again
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_result_lacks_is_named_and_the_rest_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(material.BENCH.read_text())
    document["samples"] = [s for s in document["samples"] if s["server"] != "BPL"]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    bench = material.bench(path)
    with pytest.raises(Missing, match="has not BPL at n = 1") as caught:
        bench.gain(1, "BPL", "epoll")
    assert "invoke bench --servers BPL" in caught.value.todo
    few = paper_pictures(published.read(), bench)
    written = run.plot([few["paper-fig1a"], few["paper-fig5"]], tmp_path / "out", Progress())
    assert {path.stem for path in written} == {"paper-fig5"}
    assert "not drawn, paper-fig1a" in capsys.readouterr().err


def test_cores_are_read_from_exact_results_only(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="exact mode"):
        material.cores(material.BENCH)
    cores = material.cores()
    assert cores.vcpus[0] == 1 and cores.vcpus == sorted(cores.vcpus)
    speed = cores.speed(1, "BPL")
    assert speed[0] == (1, 1.0) and 1 < speed[-1][1] <= speed[-1][0]
    with pytest.raises(Missing, match="has not nobody") as caught:
        cores.of(1, "nobody")
    assert "invoke bench --exact --sharing --servers nobody" in caught.value.todo


def test_sizes_are_laid_beside_each_other_where_both_servers_were_measured(
    tmp_path: Path,
) -> None:
    with pytest.raises(Missing, match="exact mode"):
        material.sizes(material.BENCH)
    sizes = material.sizes()
    assert sizes.life == 10 and sizes.sizes == sorted(sizes.sizes)
    gain = sizes.gain(64, "BPL", "epoll")
    assert list(gain) == [1, 2, 4, 8] and all(one > 1 for one in gain.values())
    assert sizes.gain(64, "epoll", "epoll") == dict.fromkeys(gain, 1.0)
    with pytest.raises(Missing, match="has not nobody beside epoll at n = 10, 64 B") as caught:
        sizes.gain(64, "nobody", "epoll")
    assert "--servers epoll,nobody" in caught.value.todo
    document = json.loads(material.SIZES.read_text())
    for name, other in (("vcpus", 1), ("size", 64)):
        kept = [s for s in document["samples"] if s[name] != other]
        path = tmp_path / "sizes.json"
        path.write_text(json.dumps({**document, "samples": kept}))
        with pytest.raises(Missing, match="has not 64 B on one vCPU"):
            material.sizes(path)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (material.bench, "no result of a bench"),
        (material.cores, "no result of a bench"),
        (material.sizes, "no result of a bench"),
        (material.grade, "cannot be read"),
        (material.graded_class, "no summary of a class"),
        (run.read, "no notebook"),
    ],
)
@pytest.mark.parametrize("content", ["", "student,id\nAda,1\n", b"\xff\x00"])
def test_a_file_that_is_something_else_is_an_error(
    tmp_path: Path, read: Any, text: str, content: str | bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in caught.value.problem and text in caught.value.problem
    assert caught.value.todo
    with pytest.raises(UserError):
        read(tmp_path / "absent")


def test_a_grade_of_another_lab_is_an_error() -> None:
    path = material.recorded_grade("1-batching", "starter")
    with pytest.raises(UserError, match="not of 3-lwsocket"):
        material.grade(path, "3-lwsocket")


def test_published_numbers_that_are_damaged_are_an_error(tmp_path: Path) -> None:
    for name in published.FILES:
        (tmp_path / name).write_text("figure,series\nfig1a,baseline\n")
    with pytest.raises(UserError, match="its columns are not"):
        published.read(tmp_path)
    assert published.read().at("fig1a", "baseline", 1) == 0.072


def test_the_recorded_class_is_of_the_lab_that_it_is_named_after() -> None:
    students = material.graded_class(material.CLASS)
    ids = {check.id for check in load_lab(material.CLASS_LAB).checks}
    assert {name for student in students for name in student.checks} == ids
