from __future__ import annotations

from pathlib import Path

import pytest

from grader import variant
from grader.errors import UserError
from grader.submission import SubmissionError

SOLVED = """\
#include "batch.h"

/* STUDENT: take everything in one crossing. */
static u32 drain(struct mp_channel *ch)
{
	/* BEGIN SOLUTION */
	u32 taken = mp_all(ch); /* secret */

	return taken;
	/* ELSE STARTER */
	//| /* TODO: one at a time is slow */
	//|
	//| 	return mp_one(ch); // for now
	/* END SOLUTION */
}
/* BEGIN SOLUTION */
static int helper;
/* END SOLUTION */
"""

STARTER = """\
#include "batch.h"

/* STUDENT: take everything in one crossing. */
static u32 drain(struct mp_channel *ch)
{
	/* TODO: one at a time is slow */

		return mp_one(ch); // for now
}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    folder = tmp_path / "labs" / "1-test"
    folder.mkdir(parents=True)
    (folder / "lab.toml").write_text('files = ["a.c", "b.c"]\n')
    (folder / "a.c").write_text(SOLVED)
    (folder / "b.c").write_text("int b;\n")
    return folder


def test_the_starter_has_the_starter_lines_in_place_of_the_solution() -> None:
    assert variant.starter_text(SOLVED) == STARTER


def test_the_regions_are_the_solved_lines_only() -> None:
    first, second = variant.solution_regions(SOLVED)
    assert first == "\tu32 taken = mp_all(ch); /* secret */\n\n\treturn taken;"
    assert second == "static int helper;"
    assert not any(region in variant.starter_text(SOLVED) for region in (first, second))


@pytest.mark.parametrize("text", ["", "\n", "no newline at the end", STARTER, "a\r\n\fb\v\n\n"])
def test_a_text_without_markers_comes_back_unchanged(text: str) -> None:
    assert variant.starter_text(text) == text
    assert variant.solution_regions(text) == []


BEGIN, ELSE, END = "/* BEGIN SOLUTION */", "/* ELSE STARTER */", "/* END SOLUTION */"


@pytest.mark.parametrize(
    ("lines", "at", "problem"),
    [
        ([BEGIN, "x"], 1, "without END"),
        ([BEGIN, BEGIN, END, END], 2, "BEGIN SOLUTION inside a solution"),
        ([BEGIN, ELSE, BEGIN, END], 3, "BEGIN SOLUTION inside an ELSE"),
        ([BEGIN, ELSE, ELSE, END], 3, "ELSE STARTER inside an ELSE"),
        ([ELSE], 1, "outside"),
        (["x", END], 2, "outside"),
        ([BEGIN, ELSE, "x", END], 3, "without //|"),
        ([BEGIN, ELSE, "", END], 3, "without //|"),
        (["//| x"], 1, "//| line outside"),
        ([BEGIN, "//| x", END], 2, "//| line inside a solution"),
        ([BEGIN, ELSE, "//| #define X \\", END], 3, "backslash"),
        (["/* Begin Solution */", END], 1, "not quite"),
        (["/*BEGIN SOLUTION*/", END], 1, "not quite"),
        (["// BEGIN SOLUTION", END], 1, "not quite"),
        ([BEGIN, "x; " + END], 2, "not quite"),
        ([BEGIN, "/* SOLUTION END */"], 2, "not quite"),
    ],
)
def test_a_marker_out_of_place_is_named_with_its_line(
    lines: list[str], at: int, problem: str
) -> None:
    with pytest.raises(variant.MarkerError, match=r"f\.c:") as error:
        variant.starter_text("\n".join(lines), "f.c")
    assert error.value.line == at
    assert problem in error.value.problem


SOLVED_TOML = """\
# STUDENT: how many?
# BEGIN SOLUTION
# As measured.
many = 7.1
# ELSE STARTER
#| many = "?"
# END SOLUTION
c-comment = "/* BEGIN SOLUTION */ and //| are text here"
"""


def test_a_toml_file_has_the_markers_in_its_own_comments() -> None:
    starter = variant.starter_text(SOLVED_TOML, "a.toml")
    assert starter == '# STUDENT: how many?\nmany = "?"\n' + SOLVED_TOML.splitlines(True)[-1]
    assert variant.solution_regions(SOLVED_TOML, "a.toml") == ["# As measured.\nmany = 7.1"]


@pytest.mark.parametrize(
    ("lines", "at", "problem"),
    [
        (["# BEGIN SOLUTION", "x = 1"], 1, "without END"),
        (["# BEGIN SOLUTION", "# ELSE STARTER", "x = 1", "# END SOLUTION"], 3, "without #|"),
        (["#| x = 1"], 1, "#| line outside"),
        (["x = 1 # END SOLUTION"], 1, "not quite"),
        (["#BEGIN SOLUTION"], 1, "not quite"),
    ],
)
def test_so_are_its_mistakes(lines: list[str], at: int, problem: str) -> None:
    with pytest.raises(variant.MarkerError, match=r"f\.toml:") as error:
        variant.starter_text("\n".join(lines), "f.toml")
    assert error.value.line == at
    assert problem in error.value.problem
    assert "# BEGIN SOLUTION, # ELSE STARTER (with #| lines)" in error.value.todo


def test_the_solution_stands_for_itself(lab: Path) -> None:
    made = variant.solution(lab)
    assert made.name == "solution"
    assert dict(made.files) == {"a.c": lab / "a.c", "b.c": lab / "b.c"}


def test_the_starter_is_generated(lab: Path) -> None:
    made = variant.starter(lab)
    assert made.files["a.c"].read_text() == STARTER
    assert made.files["b.c"].read_text() == "int b;\n"
    assert made.key != variant.solution(lab).key
    assert variant.starter(lab) == made


def test_the_key_is_that_of_the_contents(lab: Path, tmp_path: Path) -> None:
    handed_in = tmp_path / "mine"
    assert [path.name for path in variant.write_starter(lab, handed_in)] == ["a.c", "b.c"]
    (handed_in / "notes.txt").write_text("hello")
    made = variant.submission(lab, handed_in)
    assert made.key == variant.starter(lab).key
    assert made.ignored == ("notes.txt",)
    (handed_in / "b.c").write_text("int c;\n")
    assert variant.submission(lab, handed_in).key != made.key
    assert made.files["b.c"].read_text() == "int b;\n", "a submission is a copy"


def test_a_missing_file_is_named(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.c").write_text("int a;\n")
    with pytest.raises(SubmissionError, match=r"lacks b\.c"):
        variant.submission(lab, tmp_path / "mine")


def test_the_starter_is_never_written_over_a_students_work(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "b.c").write_text("my work\n")
    with pytest.raises(UserError, match="there already"):
        variant.write_starter(lab, tmp_path)
    assert (tmp_path / "b.c").read_text() == "my work\n"
    assert not (tmp_path / "a.c").exists()


@pytest.mark.parametrize(
    "files", ["", "files = []", 'files = "a.c"', 'files = ["../a.c"]', 'files = ["a.c", "a.c"]']
)
def test_a_wrong_list_of_files_is_refused(lab: Path, files: str) -> None:
    (lab / "lab.toml").write_text(files + "\n")
    with pytest.raises(UserError, match=r"lab\.toml"):
        variant.lab_files(lab)


def test_an_unknown_lab_names_the_known_ones(lab: Path) -> None:
    with pytest.raises(UserError) as error:
        variant.lab_files(lab.parent / "9-nothing")
    assert "1-test" in error.value.todo
