"""Points computed anew from a result file, without a machine."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grader import formats, points, regrade, report, setup
from grader.errors import UserError
from grader.lab import Check, Lab, Step, load_lab
from grader.tests import documents
from grader.tests.documents import LAB, STARTER, document, failed

# 70 % of the way.
MIDDLE = (1.27, 1.31, 1.29)


def _changed(id: str, /, **changes: Any) -> Lab:
    checks = [replace(check, **changes) if check.id == id else check for check in LAB.checks]
    return replace(LAB, checks=tuple(checks))


def _check(id: str) -> Check:
    return next(check for check in LAB.checks if check.id == id)


@pytest.mark.parametrize(
    "before",
    [
        document(),
        document(MIDDLE),
        document(STARTER),
        document(
            MIDDLE,
            {
                "serve-one": failed("serve-one", "panic", "it fell", "read this\ntrace"),
                "wakeups-long": failed("wakeups-long", "infra", "the host"),
            },
        ),
        documents.all_failed("no-build", "x.c:1: error: y", "the whole output"),
    ],
    ids=["solution", "middle", "starter", "panic and infra", "no-build"],
)
def test_the_same_table_gives_the_same_result(before: dict[str, Any]) -> None:
    graded = regrade.regrade(before, LAB)
    after = report.as_json(graded)
    assert after["environment"].pop("regraded")
    assert after == before
    assert regrade.changes(before, graded) == []


def test_a_remark_about_the_run_stays_with_its_check() -> None:
    graded = documents.grade(STARTER)
    remark = "; a first machine was lost here (it fell), a second was not"
    inactive = "; no points yet, for the optimisation is not active"
    first, *others = graded.checks
    assert first.reason.endswith(inactive)
    first = replace(first, reason=first.reason.removesuffix(inactive) + remark + inactive)
    before = report.as_json(replace(graded, checks=(first, *others)))
    assert regrade.regrade(before, LAB).checks[0].reason == first.reason


def test_a_step_that_moves_gives_other_points_and_says_so() -> None:
    before = document(MIDDLE)
    assert _points(before)["crossings-long"] == 12
    lab = _changed("crossings-long", steps=(Step(0.30, 4), Step(0.65, 18), Step(0.90, 20)))
    graded = regrade.regrade(before, lab)
    assert {r.id: r.points for r in graded.checks} == {**_points(before), "crossings-long": 18}
    assert graded.score == before["score"] + 6
    assert regrade.changes(before, graded) == [
        "the table of points: crossings-long: 4 from 30%, 18 from 65%, 20 from 90%, "
        "no longer 4 from 30%, 12 from 60%, 20 from 90%",
        "crossings-long: 18 of 20 points, no longer 12 of 20",
        f"score {graded.score:g} of 100, no longer {before['score']:g} of 100",
    ]


def test_the_share_from_which_points_count_may_move() -> None:
    before = document(MIDDLE)
    graded = regrade.regrade(before, replace(LAB, active_share=0.95))
    assert graded.score == 0
    assert "points count once there is crossings-long at 95%" in regrade.changes(before, graded)[0]


def test_other_words_change_no_points() -> None:
    before = document(MIDDLE)
    graded = regrade.regrade(before, _changed("serve-one", hint="other", why="because", title="T"))
    assert graded.score == before["score"]
    assert graded.checks[1].title == "T"
    assert regrade.changes(before, graded) == []


def test_a_check_that_is_no_longer_asked_for_is_left_out() -> None:
    before = document()
    lab = replace(LAB, checks=tuple(c for c in LAB.checks if c.id != "serve-many"))
    graded = regrade.regrade(before, lab)
    assert (graded.score, graded.max_score) == (90, 90)
    assert "the table of points: serve-many: no longer asked for" in regrade.changes(before, graded)


def test_a_result_of_some_checks_is_worth_those() -> None:
    some = LAB.only(["serve-one", "crossings-long"])
    before = report.as_json(documents.grade(MIDDLE, lab=some))
    with pytest.raises(UserError, match="no evidence for what serve-short, serve-many"):
        regrade.regrade(before, LAB)
    graded = regrade.regrade(before, some)
    assert (graded.score, graded.max_score) == (22, 30)
    assert regrade.changes(before, graded) == []


@pytest.mark.parametrize(
    "lab",
    [
        _changed("serve-one", id="serve-two"),
        _changed("serve-one", transactions=151),
        _changed("serve-one", load=replace(_check("serve-one").load, size=65)),
        _changed("crossings-short", metric="wakeups"),
    ],
    ids=["new", "more transactions", "another load", "another count"],
)
def test_what_was_not_measured_cannot_be_judged(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"no evidence for what (serve-|crossings-short)"):
        regrade.regrade(document(), lab)


def test_what_lab_toml_could_not_ask_for_then_was_not_asked_for() -> None:
    assert "transactions" not in _row("crossings-long")["experiment"]
    assert "pause_us" not in _row("serve-short")["experiment"]["load"]
    assert _row("serve-one")["experiment"]["load"]["pause_us"] == 2000


def _row(id: str) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in points.table(LAB)["checks"] if row["id"] == id)
    return row


def test_the_table_is_the_labs() -> None:
    table = points.table(LAB)
    assert sum(row["max_points"] for row in table["checks"]) == LAB.max_score
    assert points.not_measured(table, table) == []
    assert points.changes(table, table) == []


def test_only_a_result_of_this_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(UserError, match="cannot be read"):
        report.read(path)
    for text, problem in [
        ("{", "cannot be read"),
        ("[]", "no result of a grade: the file"),
        (json.dumps({**document(), "version": 1}), "format 1, not 2"),
        (json.dumps({**document(), "score": "full"}), "score is wrong"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            report.read(path)
    report.write_json(documents.grade(), path)
    assert report.read(path) == document()


def test_the_verb_prints_the_table_and_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    result, again = tmp_path / "result.json", tmp_path / "again.json"
    report.write_json(documents.grade(MIDDLE, lab=load_lab("1-batching")), result)
    options = [f"--json={again}", f"--report=junit={tmp_path / 'x.xml'}", "--explain"]
    options += [f"--report=autolab={tmp_path / 'line'}"]
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "regrade", str(result), *options],
        cwd=setup.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"score {report.read(result)['score']:g} of 100" in done.stdout
    assert "nothing has changed" in done.stdout
    assert "step         12 points from 60% on" in done.stdout
    assert report.read(again)["checks"] == report.read(result)["checks"]
    assert (tmp_path / "line").read_text() == formats.autolab(report.read(result))
    assert (tmp_path / "x.xml").is_file()


def _points(result: dict[str, Any]) -> dict[str, float]:
    return {check["id"]: check["points"] for check in result["checks"]}


def test_some_checks_alone_stay_alone() -> None:
    whole = document()
    alone = {
        **whole,
        "environment": {**whole["environment"], "only": ["serve-one"]},
        "checks": [row for row in whole["checks"] if row["id"] == "serve-one"],
        "table": points.table(LAB.only(["serve-one"])),
    }
    again = regrade.regrade(alone, LAB)
    assert [result.id for result in again.checks] == ["serve-one"]
    assert again.score == again.max_score == _check("serve-one").max_points
