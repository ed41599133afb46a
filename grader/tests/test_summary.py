"""The class as CSV and as a page: the numbers, and names that mean no good."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grader import summary
from grader.batch import GradedClass
from grader.progress import Progress
from grader.submission import shown
from grader.tests.course import LAB, Course

pytest_plugins = ("grader.tests.course",)

QUIET = Progress(quiet=True)
OWN = """
static int fold(const char *bytes, int length)
{
	int sum = 5381;

	for (int i = 0; i < length; i++)
		sum = ((sum << 5) + sum) ^ bytes[i];
	return sum & 0xffff;
}
"""


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name in ("href", "src")]


def _lines(graded: GradedClass, name: str = "summary.csv") -> list[dict[str, str]]:
    with (graded.folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _page(graded: GradedClass) -> Page:
    return Page((graded.folder / "summary.html").read_text())


def test_the_table_has_points_per_rubric_and_check_and_none_without_a_grade(
    course: Course,
) -> None:
    for name, word in (("ann", "full"), ("bob", "half"), ("cyd", "infra"), ("dan", "full")):
        course.hand_in(name, word)
    (course.source / "eve.zip").write_bytes(b"PK\3\4")
    graded = course.grade()
    summary.write(graded, QUIET)
    lines = {line["student"]: line for line in _lines(graded)}
    ann, bob, cyd, dan, eve = (lines[name] for name in ("ann", "bob", "cyd", "dan", "eve"))
    assert float(ann["score"]) == float(ann["max"]) == LAB.max_score
    document = json.loads((graded.folder / bob["result"]).read_text())
    assert float(bob["score"]) == document["score"] > 0
    for check in document["checks"]:
        assert float(bob[f"check:{check['id']}"]) == check["points"]
    assert sum(float(bob[f"rubric:{rubric}"]) for rubric in LAB.rubrics) == document["score"]
    failed = sum(check["verdict"] == "fail" for check in document["checks"])
    assert bob["verdicts"] == f"{len(LAB.checks) - failed} pass, {failed} fail"
    assert dan["note"] == "the same files as ann"
    assert (ann["key"], ann["result"]) == (dan["key"], dan["result"])
    for line, status in ((cyd, "no grade"), (eve, "unreadable")):
        assert line["status"] == status and line["note"]
        assert line["score"] == line["result"] == line["verdicts"] == ""
        assert not any(value for name, value in line.items() if name.startswith("check:"))


def test_the_page_shows_rates_links_and_reasons(course: Course) -> None:
    for name, word in (("ann", "full"), ("bob", "half"), ("cyd", "crash")):
        course.hand_in(name, word)
    (course.source / "notes.txt").write_text("")
    graded = course.grade()
    summary.write(graded, QUIET)
    page = _page(graded)
    assert "With a grade: 2; without a grade because of the machine: 1, grade" in page.text
    assert "notes.txt: neither a folder nor an archive" in page.text
    assert "ended with status -6" in page.text
    assert page.text.count("50 %") >= 3 and "svg" in page.tags
    assert sorted(page.links()) == sorted(line["result"] for line in _lines(graded)[:2])
    assert all((graded.folder / link).is_file() for link in page.links())


def test_the_rates_say_which_step_the_class_missed(course: Course) -> None:
    for name, word in (("ann", "full"), ("bob", "full"), ("cyd", "half"), ("dan", "nothing")):
        course.hand_in(name, word, more=f"int {name};\n")
    documents = [row.outcome.document for row in course.grade().rows if row.outcome.document]
    (stepped,) = (c for c in documents[2]["checks"] if c["id"] == "crossings-long")
    (number,) = (i for i, check in enumerate(LAB.checks) if check.id == "crossings-long")
    first, second, third = (step.points for step in LAB.checks[number].steps)
    # cyd reached the second step only.
    stepped.update(points=second, verdict="fail")
    rates = summary.check_rates(LAB, documents)
    assert [rate.title for rate in rates] == [check.title for check in LAB.checks]
    assert rates[number].steps == ((first, 0.75), (second, 0.75), (third, 0.5))
    assert (rates[number].full, rates[number].mean) == (0.5, (2 * third + second) / 4)
    assert rates[number].verdicts == "2 pass, 2 fail"
    assert rates[0].steps == () and rates[0].full == 0.5
    assert summary.check_rates(LAB, []) == []


def test_students_pages_are_theirs_even_where_the_result_is_shared(course: Course) -> None:
    course.hand_in("ann", "full")
    course.hand_in("bob", "full")
    course.hand_in("cyd", "half")
    (course.source / "bob" / "notes.txt").write_text("")
    graded = course.grade()
    written: dict[str, Mapping[str, object]] = {}

    def write_page(document: Mapping[str, object], path: Path) -> None:
        if document["score"] != LAB.max_score:
            raise ZeroDivisionError
        written[path.name] = document
        path.write_text("page")

    summary.write(graded, QUIET, write_page)
    assert [document["ignored"] for document in written.values()] == [[], ["notes.txt"]]
    # cyd's page could not be made: the result file stands for it, and the others are there.
    assert sorted(_page(graded).links()) == sorted(
        [*(f"pages/{name}" for name in written), _lines(graded)[2]["result"]]
    )


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)<|script>",
        '"><img src=x onerror=alert(1)>',
        "{{ 7 * 7 }}{% raw %}",
        "javascript:alert(1)",
        "<|svg><|style>",
        "\u202eevil\x1b[31m",
        "&lt;b&gt;",
    ],
)
def test_a_hostile_name_is_text(course: Course, name: str) -> None:
    course.hand_in(f"{name}_5_assignsubmission_file_", "full")
    course.hand_in("plain", "full")
    (course.source / f"{name}.txt").write_text("")
    graded = course.grade()
    summary.write(graded, QUIET)
    page, text = _page(graded), (graded.folder / "summary.html").read_text()
    (row,) = [row for row in graded.rows if row.student.id == "5"]
    assert row.student.name in page.text and row.student.name.isprintable()
    assert not {"script", "img", "iframe"} & page.tags
    assert not any(attribute.startswith("on") for attribute, _ in page.attributes)
    assert text.count("</svg>") == 1 and text.count("</style>") == text.count("<style")
    assert all(re.fullmatch(r"results/[0-9a-f]+\.json", link) for link in page.links())
    assert re.fullmatch(r"[A-Za-z0-9-]+", row.name)


@pytest.mark.parametrize(
    "name", ["=1+1", "+49 30", "-2", "@SUM(A1)", "\t=1", "\uff1d1+1", " =cmd|'|c calc'!A0"]
)
def test_no_name_is_a_formula(course: Course, name: str) -> None:
    course.hand_in(name, "full")
    course.hand_in(f"x, {name}", "full", more="int other;\n")
    graded = course.grade()
    summary.write(graded, QUIET)
    for line in _lines(graded):
        for cell in line.values():
            assert not cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d"))
    # One that merely holds such a sign is left alone.
    assert f"x, {shown(name)}" in [line["student"] for line in _lines(graded)]


def test_similar_submissions_are_listed_and_groups_are_not_pairs(course: Course) -> None:
    disguised = OWN.replace("sum", "h").replace("bytes", "p").replace("\t", "  ")
    for name, more in (("ann", OWN), ("bob", disguised), ("cyd", ""), ("dan", OWN)):
        course.hand_in(name, "full", more=more)
    graded = course.grade()
    summary.write(graded, QUIET)
    pairs = _lines(graded, "similar.csv")
    assert [(pair["first"], pair["second"]) for pair in pairs] == [
        ("ann", "dan"),
        ("ann; dan", "bob"),
    ]
    assert pairs[0]["first lines"] == "the same files"
    # bob has all of it, too.
    assert pairs[0]["nowhere else"] == "0" < pairs[0]["common"]
    assert float(pairs[1]["share"]) > 0.8 and int(pairs[1]["nowhere else"]) > 10
    assert pairs[1]["second lines"].startswith("mp_batch.c: ")
    assert "Pairs to look at, not a verdict" in _page(graded).text


def test_a_class_without_a_grade_has_its_page_too(course: Course) -> None:
    (course.source / "eve.zip").write_bytes(b"PK\3\4")
    graded = course.grade()
    assert len(summary.write(graded, QUIET)) == 3
    page = _page(graded)
    assert "With a grade: 0; with what cannot be read: 1." in page.text
    assert "svg" not in page.tags
    assert _lines(graded, "similar.csv") == []


def test_the_same_class_gives_the_same_files(course: Course) -> None:
    for name in ("ann", "bob"):
        course.hand_in(name, "half", more=f"int {name};\n")
    files = [
        {path.name: path.read_bytes() for path in summary.write(course.grade(), QUIET)}
        for _ in range(2)
    ]
    assert files[0] == files[1]
