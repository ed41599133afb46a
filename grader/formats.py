"""Result document -> the formats of other tools: pure functions, one for each format.

Each takes a document as result.schema.json has it, uses nothing that its format's documentation
does not name, and never makes a score of a grade that could not be made (`judged`): what stands in
its place is said with each.

All texts may come from a student: a compiler's message, a console. They go through `clean`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from grader import results
from grader.errors import UsageError

Document = Mapping[str, Any]
NO_SCORE = (
    "Some checks could not be judged, for the machine failed and not the submission. "
    "This is not a score: grade again."
)


def clean(text: str) -> str:
    """Return text with control characters and reordering marks written out, but lines kept."""
    return "".join(c if c in "\n\t" or c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def judged(document: Document) -> bool:
    """Whether every check could be judged; if not, there is no score."""
    return all(check["verdict"] != "infra" for check in document["checks"])


def junit(document: Document) -> str:
    """Return JUnit XML as Jenkins' xUnit plugin defines it: a suite for each rubric.

    A check that passes has no child but its output; ``fail`` is a <failure>, the other verdicts
    are an <error>, and ``infra`` is <skipped>, which no tool counts against anybody. Points are
    properties of the suite, which has none while a check of any rubric is ``infra``.

    https://github.com/jenkinsci/xunit-plugin, src/main/resources/org/jenkinsci/plugins/xunit/
    types/model/xsd/junit-10.xsd
    """
    root = ElementTree.Element("testsuites", name=document["lab"])
    for rubric in document["table"]["rubrics"]:
        checks = [check for check in document["checks"] if check["rubric"] == rubric]
        verdicts = [check["verdict"] for check in checks]
        passed, failed, skipped = (verdicts.count(v) for v in ("pass", "fail", "infra"))
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{document['lab']}.{rubric}",
            tests=str(len(checks)),
            failures=str(failed),
            errors=str(len(checks) - passed - failed - skipped),
            skipped=str(skipped),
        )
        if time := document["environment"].get("time"):
            # Without a zone, as in the format's examples; it is UTC.
            suite.set("timestamp", time.removesuffix("Z"))
        if judged(document):
            properties = ElementTree.SubElement(suite, "properties")
            for name, key in (("score", "points"), ("max_score", "max_points")):
                total = sum(check[key] for check in checks)
                ElementTree.SubElement(properties, "property", name=name, value=f"{total:g}")
        for check in checks:
            _junit_case(suite, check)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _junit_case(suite: ElementTree.Element, check: Document) -> None:
    name = suite.get("name", "")
    case = ElementTree.SubElement(suite, "testcase", classname=name, name=check["id"])
    kinds = {"pass": "system-out", "fail": "failure", "infra": "skipped"}
    child = ElementTree.SubElement(case, kinds.get(check["verdict"], "error"))
    if check["verdict"] == "pass":
        child.text = _told(check)
    else:
        child.set("type", check["verdict"])
        child.set("message", clean(check["reason"]))
        child.text = _told(check)


def gradescope(document: Document) -> str:
    """Return Gradescope's results.json.

    Without a grade it has neither a score nor tests, of which Gradescope requires one: it reports
    that the autograder failed to execute correctly, and gives no points for it.

    https://gradescope-autograders.readthedocs.io/en/latest/specs/
    """
    # Gradescope renders the text of a whole submission as HTML unless told otherwise.
    whole: dict[str, Any] = {"output": _summary(document), "output_format": "text"}
    if seconds := document["environment"].get("seconds"):
        whole["execution_time"] = round(seconds)
    if judged(document):
        whole["score"] = document["score"]
        whole["visibility"] = "visible"
        whole["tests"] = [
            {
                "name": f"{check['id']}: {clean(check['title'])}",
                "score": check["points"],
                "max_score": check["max_points"],
                "status": "passed" if check["verdict"] == "pass" else "failed",
                "output": _told(check),
                "output_format": "text",
                "visibility": "visible",
            }
            for check in document["checks"]
        ]
    return _json(whole)


def prairielearn(document: Document) -> str:
    """Return PrairieLearn's /grade/results/results.json.

    Without a grade it is not gradable: no points are awarded or lost, and no attempt is used up.
    What does not compile is graded, as everywhere here.

    https://prairielearn.readthedocs.io/en/latest/externalGrading/
    """
    whole: dict[str, Any] = {"gradable": judged(document), "message": _summary(document)}
    if not judged(document):
        return _json({**whole, "format_errors": [NO_SCORE]})
    whole["score"] = document["score"] / document["max_score"]
    whole["tests"] = [
        {
            "name": check["id"],
            "description": clean(check["title"]),
            "points": check["points"],
            "max_points": check["max_points"],
            "message": clean(f"{check['verdict']}: {check['reason']}"),
            "output": clean(check["next_step"]),
        }
        for check in document["checks"]
    ]
    return _json(whole)


def autolab(document: Document) -> str:
    """Return Autolab's autoresult, the last line of an autograder's output.

    Its problems are the lab's rubrics. Without a grade it names no problem, so it changes no score
    that Autolab has; but Autolab knows no submission without a score, and shows 0 and an error for
    a first one. So an autograde-Makefile should grade again when `invoke grade` ends with status 3.

    https://docs.autolabproject.com/lab/#writing-autograders, and for no problem
    https://github.com/autolab/Autolab/pull/895
    """
    scores = dict.fromkeys(document["table"]["rubrics"], 0.0) if judged(document) else {}
    for check in document["checks"] if scores else ():
        scores[check["rubric"]] += check["points"]
    return json.dumps({"scores": scores}) + "\n"


def html(document: Document) -> str:
    """Return the page of `grader.page`."""
    # Its libraries take longer to load than everything else here.
    from grader import page  # noqa: PLC0415

    return page.text(document)


FORMATS: Mapping[str, Callable[[Document], str]] = {
    "junit": junit,
    "gradescope": gradescope,
    "prairielearn": prairielearn,
    "autolab": autolab,
    "html": html,
}


def chosen(options: Sequence[str]) -> list[tuple[str, Path]]:
    """Return formats and files of options ``FORMAT=PATH``; raises `UserError` before the work."""
    found = []
    for option in options:
        name, separator, path = option.partition("=")
        if name not in FORMATS or not separator or not path:
            raise UsageError(f"--report {option}", f"FORMAT=PATH, with {', '.join(FORMATS)}")
        results.check_writable(Path(path), "--report")
        found.append((name, Path(path)))
    return found


def write(document: Document, reports: Sequence[tuple[str, Path]]) -> None:
    """Write a result in the formats that `chosen` gave."""
    for name, path in reports:
        results.write(path, FORMATS[name](document))


def _summary(document: Document) -> str:
    if not judged(document):
        return NO_SCORE
    text = f"{document['score']:g} of {document['max_score']:g} points"
    if document["ignored"]:
        text += f"; ignored in the submission: {', '.join(document['ignored'])}"
    return clean(text)


def _told(check: Document) -> str:
    given = f", {check['points']:g} of {check['max_points']:g} points"
    if check["verdict"] == "infra":
        given = ""
    lines = [f"{check['verdict']}{given}: {check['reason']}", check["next_step"]]
    return clean("\n".join(line for line in lines if line))


def _json(document: object) -> str:
    return json.dumps(document, indent=2) + "\n"
