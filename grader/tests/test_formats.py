"""Each format against the fields that its documentation names; see `grader.formats` for where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from grader import formats
from grader.errors import UserError
from grader.tests import documents
from grader.tests.documents import HOSTILE, HOSTILE_SHOWN, STARTER, document, failed

MIXED = document(
    (1.27, 1.31, 1.29),
    {
        "serve-one": failed("serve-one", "hang", HOSTILE, HOSTILE),
        "serve-many": failed("serve-many", "panic", "it fell", "look\n" + HOSTILE),
    },
)
INFRA = document(others={"wakeups-long": failed("wakeups-long", "infra", "the host is gone")})
DOCUMENTS = {
    "solution": document(),
    "starter": document(STARTER),
    "mixed": MIXED,
    "no-build": documents.all_failed("no-build", HOSTILE, HOSTILE),
    "infra": INFRA,
}
each = pytest.mark.parametrize("result", DOCUMENTS.values(), ids=DOCUMENTS)

# junit-10.xsd: element -> its attributes (those required first), and what may be in it.
JUNIT = {
    "testsuites": ((), ("name", "time", "tests", "failures", "errors"), ("testsuite",)),
    "testsuite": (
        ("name", "tests", "failures", "errors"),
        ("group", "time", "skipped", "timestamp", "hostname", "id", "package", "file"),
        ("testsuite", "properties", "testcase", "system-out", "system-err"),
    ),
    "testcase": (
        ("name",),
        ("time", "classname", "group"),
        ("skipped", "error", "failure", "system-out", "system-err"),
    ),
    "properties": ((), (), ("property",)),
    "property": (("name", "value"), (), ()),
    "failure": ((), ("type", "message"), ()),
    "error": ((), ("type", "message"), ()),
    "skipped": ((), ("type", "message"), ()),
    "system-out": ((), (), ()),
}
_VISIBILITY = {"enum": ["hidden", "after_due_date", "after_published", "visible"]}
_TEXT = {"enum": ["text", "html", "simple_format", "md", "ansi"]}
_STRING, _NUMBER = {"type": "string"}, {"type": "number"}
GRADESCOPE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "score": _NUMBER,
        "execution_time": _NUMBER,
        "output": _STRING,
        "output_format": _TEXT,
        "test_output_format": _TEXT,
        "test_name_format": _TEXT,
        "visibility": _VISIBILITY,
        "stdout_visibility": _VISIBILITY,
        "extra_data": {"type": "object"},
        "leaderboard": {"type": "array"},
        "tests": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "score": _NUMBER,
                    "max_score": _NUMBER,
                    "status": {"enum": ["passed", "failed"]},
                    "name": _STRING,
                    "name_format": _TEXT,
                    "number": _STRING,
                    "output": _STRING,
                    "output_format": _TEXT,
                    "tags": {"type": "array"},
                    "visibility": _VISIBILITY,
                    "extra_data": {"type": "object"},
                },
            },
        },
    },
}
PRAIRIELEARN = {
    "type": "object",
    "additionalProperties": False,
    "if": {"properties": {"gradable": {"const": True}}},
    "then": {"required": ["score"]},
    "properties": {
        "gradable": {"type": "boolean"},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "message": _STRING,
        "output": _STRING,
        "format_errors": {"type": "array", "items": _STRING},
        "images": {"type": "array"},
        "tests": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "name": _STRING,
                    "description": _STRING,
                    "points": _NUMBER,
                    "max_points": _NUMBER,
                    "message": _STRING,
                    "output": _STRING,
                    "images": {"type": "array"},
                },
            },
        },
    },
}
AUTOLAB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["scores"],
    "properties": {
        "scores": {"type": "object", "additionalProperties": _NUMBER},
        "scoreboard": {"type": "array"},
    },
}


def _fits(element: ElementTree.Element) -> None:
    required, optional, children = JUNIT[element.tag]
    assert set(required) <= set(element.attrib) <= {*required, *optional}
    for child in element:
        assert child.tag in children
        _fits(child)


@each
def test_junit_fits_its_schema_and_counts_what_it_holds(result: dict[str, Any]) -> None:
    root = ElementTree.fromstring(formats.junit(result).encode())
    _fits(root)
    assert root.tag == "testsuites"
    assert [suite.get("name") for suite in root] == [
        "echo.correctness",
        "echo.performance",
    ]
    for suite in root:
        cases = suite.findall("testcase")
        assert suite.get("tests") == str(len(cases))
        for attribute, tag in [("failures", "failure"), ("errors", "error")]:
            assert suite.get(attribute) == str(sum(c.find(tag) is not None for c in cases))
        assert suite.get("skipped") == str(sum(c.find("skipped") is not None for c in cases))


def test_junit_tells_verdicts_and_points_apart() -> None:
    root = ElementTree.fromstring(formats.junit(MIXED))
    found = {case.get("name"): next(iter(case)) for case in root.iter("testcase")}
    kinds = {name: child.tag for name, child in found.items()}
    assert kinds["serve-short"] == "system-out"
    assert kinds["crossings-long"] == "failure"
    assert found["crossings-long"].text is not None
    assert found["crossings-long"].text.startswith("fail, 12 of 20 points: ")
    assert (kinds["serve-one"], found["serve-one"].get("type")) == ("error", "hang")
    scores = {suite.get("name"): suite.find("properties/property[@name='score']") for suite in root}
    assert {name: p is not None and p.get("value") for name, p in scores.items()} == {
        "echo.correctness": "20",
        "echo.performance": "22",
    }


def test_hostile_text_comes_out_of_xml_as_it_went_in_but_for_control_characters() -> None:
    root = ElementTree.fromstring(formats.junit(MIXED).encode())
    error = root.find(".//testcase[@name='serve-one']/error")
    assert error is not None
    assert error.get("message") == HOSTILE_SHOWN
    assert error.text == f"hang, 0 of 10 points: {HOSTILE_SHOWN}\n{HOSTILE_SHOWN}"


@each
def test_gradescope_has_documented_fields_only(result: dict[str, Any]) -> None:
    whole = json.loads(formats.gradescope(result))
    jsonschema.validate(whole, GRADESCOPE)
    # Its default for the whole would render a student's text as HTML.
    assert whole["output_format"] == "text"
    assert whole["execution_time"] == 31
    if "tests" in whole:
        assert whole["score"] == sum(test["score"] for test in whole["tests"]) == result["score"]
        assert sum(test["max_score"] for test in whole["tests"]) == result["max_score"]


@each
def test_prairielearn_has_documented_fields_only(result: dict[str, Any]) -> None:
    text = formats.prairielearn(result)
    whole = json.loads(text)
    jsonschema.validate(whole, PRAIRIELEARN)
    # The limit on the file's size.
    assert len(text) < 1_000_000
    if whole["gradable"]:
        assert whole["score"] == result["score"] / result["max_score"]
        assert sum(test["points"] for test in whole["tests"]) == result["score"]


@each
def test_autolab_is_one_line_with_a_score_for_each_rubric(result: dict[str, Any]) -> None:
    text = formats.autolab(result)
    assert text.count("\n") == 1
    whole = json.loads(text)
    jsonschema.validate(whole, AUTOLAB)
    if result is not INFRA:
        assert list(whole["scores"]) == ["correctness", "performance"]
        assert sum(whole["scores"].values()) == result["score"]


def test_no_score_is_made_of_a_grade_that_could_not_be_made() -> None:
    root = ElementTree.fromstring(formats.junit(INFRA))
    assert not root.findall(".//properties")
    assert [c.get("name") for c in root.findall(".//testcase[skipped]")] == ["wakeups-long"]
    assert not root.findall(".//error") and not root.findall(".//failure")
    gradescope = json.loads(formats.gradescope(INFRA))
    assert not gradescope.keys() & {"score", "tests"}
    assert gradescope["output"] == formats.NO_SCORE
    prairielearn = json.loads(formats.prairielearn(INFRA))
    assert prairielearn["gradable"] is False
    assert not prairielearn.keys() & {"score", "tests"}
    assert json.loads(formats.autolab(INFRA)) == {"scores": {}}


def test_control_characters_are_written_out_and_lines_kept() -> None:
    assert formats.clean(HOSTILE) == HOSTILE_SHOWN


def test_what_does_not_compile_is_a_score_of_0() -> None:
    result = DOCUMENTS["no-build"]
    assert json.loads(formats.gradescope(result))["score"] == 0
    assert json.loads(formats.prairielearn(result))["score"] == 0
    assert json.loads(formats.autolab(result))["scores"] == {"correctness": 0, "performance": 0}
    suites = ElementTree.fromstring(formats.junit(result))
    assert [suite.get("errors") for suite in suites] == ["3", "3"]


def test_reports_are_checked_before_the_work_and_written_after_it(tmp_path: Path) -> None:
    for option in ("junit", "junit=", "word=x", f"junit={tmp_path / 'missing' / 'x.xml'}"):
        with pytest.raises(UserError):
            formats.chosen([option])
    options = [f"{name}={tmp_path / name}" for name in formats.FORMATS]
    formats.write(MIXED, formats.chosen(options))
    for name, form in formats.FORMATS.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == form(MIXED)
