"""The page of a result: whole, self-contained, and safe whatever a student's text holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grader import page
from grader.checks import Interval
from grader.formats import NO_SCORE
from grader.recorded import Recorded
from grader.tests import documents
from grader.tests.documents import HOSTILE, HOSTILE_SHOWN, STARTER, document, failed

VOID = {"meta", "br", "img", "link", "input", "hr"}
PANIC = document(
    others={
        id: failed(id, "panic", HOSTILE, f"Read the trace.\n{HOSTILE}")
        for id in ("serve-short", "crossings-long")
    }
)
DOCUMENTS = {
    "solution": document(),
    "starter": document(STARTER),
    "panic": PANIC,
    "no-build": documents.all_failed("no-build", HOSTILE, HOSTILE),
    "infra": document(others={"wakeups-long": failed("wakeups-long", "infra", "the host")}),
}
each = pytest.mark.parametrize("result", DOCUMENTS.values(), ids=DOCUMENTS)


class _Reader(HTMLParser):
    """Keeps each element with its attributes, and the text in each <pre>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pre: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "pre" in self.open:
            self.pre[-1] += data


@each
def test_the_page_is_whole_and_fetches_nothing(result: dict[str, Any]) -> None:
    read = _Reader(page.text(result))
    assert read.open == []
    assert {tag for tag, _ in read.elements}.isdisjoint(
        {"script", "iframe", "object", "embed", "link", "img", "form", "base", "foreignobject"}
    )
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None and value.startswith("#"), (tag, name, value)
            assert "url(" not in (value or "").replace("url(#", ""), (tag, name, value)
    policy = next(a for t, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


@each
def test_the_page_is_the_same_each_time(result: dict[str, Any]) -> None:
    assert page.text(result) == page.text(result)


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    text = page.text(PANIC)
    assert all(c in "\n\t" or c.isprintable() for c in text)
    read = _Reader(text)
    assert HOSTILE_SHOWN in read.pre
    assert HOSTILE_SHOWN in read.text
    assert page.text(DOCUMENTS["no-build"]).count("&lt;script&gt;") >= 2


def test_the_page_shows_score_checks_and_plots() -> None:
    result = document((1.27, 1.31, 1.29))
    read = _Reader(page.text(result))
    assert f"{result['score']:g} of 100 points" in read.text
    for check in documents.LAB.checks:
        assert check.title in read.text
    plots = [a["aria-label"] for tag, a in read.elements if tag == "svg"]
    # One for each check that is measured, and the phases.
    assert len(plots) == 3 + 2 + 1
    assert "2.10 ms" in read.text and "34.50 ms" in read.text
    for label in ("4 points", "12 points", "20 points", "syscalls per transaction"):
        assert label in read.text


def test_a_dot_is_drawn_for_each_round_and_a_line_for_each_step() -> None:
    result = document((1.27, 1.31, 1.29))
    rows = {row["id"]: row for row in result["table"]["checks"]}
    check = next(check for check in result["checks"] if check["id"] == "crossings-long")
    svg = page.comparison(check, rows["crossings-long"], None)
    plot = _Reader(svg)
    groups = [a.get("id") or "" for tag, a in plot.elements if tag == "g"]
    assert sum(group.startswith("PathCollection") for group in groups) == 3
    marks = [a for tag, a in plot.elements if tag == "use" and "fill" in (a.get("style") or "")]
    assert sum("stroke: #1f4e79" in (a.get("style") or "") for a in marks) == 3
    assert svg.count(" points<") == 3
    assert ">limit<" not in svg
    limit = Recorded(Interval(0.01, 0.001), "2026-11-26T12:00:00Z")
    assert page.comparison(check, rows["crossings-long"], limit).count(">limit<") == 1


def test_what_is_to_be_done_about_several_checks_is_said_once() -> None:
    text = _Reader(page.text(DOCUMENTS["starter"])).text
    assert text.count("Points count once check crossings-long") == 1
    assert _Reader(page.text(DOCUMENTS["no-build"])).pre == [HOSTILE_SHOWN]


def test_a_grade_that_could_not_be_made_shows_no_score() -> None:
    text = _Reader(page.text(DOCUMENTS["infra"])).text
    assert NO_SCORE in text
    assert "of 100 points" not in text
    assert "– / 20" in text


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    page.write(PANIC, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.text(PANIC)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_where_the_instructions_went_is_shown_for_each_run() -> None:
    read = _Reader(page.text(document()))
    assert "Where the instructions went" in read.text
    assert "system calls, all" in read.text
    # A function that was not entered, or not counted, has no row.
    assert "epoll_ctl" not in read.text
    nothing = documents.all_failed("no-build", "it does not compile")
    assert "Where the instructions went" not in page.text(nothing)
