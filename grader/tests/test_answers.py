"""Answers: what counts as one, what is accepted, what is measured for it; and the lab itself."""

from __future__ import annotations

import io
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grader import answers, bench, explain, points, regrade, report, variant
from grader import checks as judge
from grader import grade as grading
from grader.answers import Reading
from grader.experiment import ExperimentFailed, Failure
from grader.lab import ANSWERS, Check, LabError, Run, load_lab
from grader.probe.counted import EVENTS
from grader.progress import Progress
from grader.tests.results import ENVIRONMENT
from kernel.build import Kernel

LAB = load_lab("0-measure")
BY_ID = {check.id: check for check in LAB.checks}
NUMBER = BY_ID["syscalls-short"]
RATIO = BY_ID["four-to-one"]
NAME = BY_ID["layer-most"]
SOLVED = answers.read(LAB.folder / "answers.toml")
QUIET = Progress(quiet=True)


def test_the_lab_asks_for_what_can_be_measured() -> None:
    assert LAB.max_score == 100
    assert {check.evidence for check in LAB.checks} == {"probe"}
    assert set(answers.INSTRUMENTS) == set(ANSWERS)
    assert {run.server for run in answers.runs_of(LAB.checks)} <= set(bench.SERVERS)
    assert set(answers.OBJECTS) <= {counted.name for counted in EVENTS}
    # Everything that can be asked for is, or the rest has never been tried.
    assert {check.metric for check in LAB.checks} == set(ANSWERS)
    for check in LAB.checks:
        assert check.hint
        if check.metric in ("transfers", "layer", "function", "object"):
            assert check.run and check.run.per_connection >= 1


def test_the_solution_answers_everything_and_the_starter_nothing() -> None:
    assert set(SOLVED) == set(BY_ID)
    assert {answers.problem(check, SOLVED) for check in LAB.checks} == {""}
    (file,) = variant.starter(LAB.folder).files.values()
    starter = answers.read(file)
    assert list(starter) == list(SOLVED)
    assert {answers.problem(check, starter) for check in LAB.checks} == {"no answer yet"}


def test_the_starter_does_not_give_an_answer_away() -> None:
    (file,) = variant.starter(LAB.folder).files.values()
    text = file.read_text()
    regions = variant.solution_regions((LAB.folder / "answers.toml").read_text(), "answers.toml")
    assert len(regions) > len(LAB.checks), "one for each answer, and where they come from"
    assert not any(region in text for region in regions)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('metric = "user"', 'metric = "luck"', "metric is none of syscalls"),
        ("tolerance = 0.04\n", "", "a tolerance between 0 and 1"),
        (
            "tolerance = 0.04\n",
            "tolerance = 0.04\nsteps = []\nkills = 1\n",
            "no key of another kind",
        ),
        ("per_connection = 0 }", "transactions = 0 }", "missing or unknown key"),
        ("versus = { server", "versus = { servers", "missing or unknown key"),
        ('files = ["answers.toml"]', 'files = ["answers.toml", "b.toml"]', "has one file"),
        ("[[rubric]]", "[active]\nshare = 1\n[[rubric]]", "no active"),
    ],
)
def test_mistakes_in_the_lab_are_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    text = (LAB.folder / "lab.toml").read_text()
    assert old in text
    folder = tmp_path / "0-measure"
    folder.mkdir()
    (folder / "lab.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(LabError, match=re.escape(complaint)):
        load_lab("0-measure", tmp_path)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("?", "no answer yet"),
        ("7.1", "'7.1' is no answer: a number without quotes is wanted"),
        (True, "a number without quotes"),
        ([7.1], "a number without quotes"),
        (float("nan"), "a number without quotes"),
        (float("inf"), "a number without quotes"),
        (10**400, "a number without quotes"),
        ({"a": 1}, "a number without quotes"),
        ("\x1b[2J" * 50, "\\x1b"),
    ],
)
def test_what_is_no_number_is_said_to_be_none(said: Any, complaint: str) -> None:
    problem = answers.problem(NUMBER, {NUMBER.id: said})
    assert complaint in problem
    assert problem.isprintable() and len(problem) < 200


def test_what_is_no_name_is_said_to_be_none() -> None:
    assert "a name in quotes" in answers.problem(NAME, {NAME.id: 3})
    assert "no answer yet" in answers.problem(NAME, {NAME.id: "?"})
    assert answers.problem(NAME, {NAME.id: "TCP"}) == ""
    assert "the file has no line   layer-most = ..." in answers.problem(NAME, {})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"syscalls-long = 7,1", id="a comma"),
        pytest.param(b"a = 1\na = 2", id="twice"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"a = " + b"9" * 5000, id="digits"),
        pytest.param(b"a = " + b"[" * 9999, id="deep"),
    ],
)
def test_a_file_that_is_no_toml_builds_nothing(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "answers.toml"
    file.write_bytes(text)
    nothing: Any = None
    outcome = answers.grade(LAB, file, nothing, 1, QUIET)
    assert {result.verdict for result in outcome.results} == {"no-build"}
    assert outcome.results[0].reason.startswith("answers.toml is no TOML file: ")
    assert outcome.results[0].next_step


def test_nothing_is_measured_for_no_answers(tmp_path: Path) -> None:
    file = tmp_path / "answers.toml"
    file.write_text('syscalls-long = "?"\nsyscall-short = 7.0\n')
    nothing: Any = None
    outcome = answers.grade(LAB, file, nothing, 1, QUIET)
    assert {result.verdict for result in outcome.results} == {"fail"}
    assert sum(result.points for result in outcome.results) == 0
    assert outcome.unknown == ("answers.toml: syscall-short",)


# Mean 7; Student's t for 2 degrees of freedom is 4.30, so the interval is 4.30 x 0.1 / sqrt(3) =
# 0.25, and a tolerance of 0.04 x 7 = 0.28 is added.
ROUNDS = [6.9, 7.0, 7.1]


@pytest.mark.parametrize(
    ("said", "right"), [(7.0, True), (7.52, True), (7.54, False), (6.48, True), (6.46, False)]
)
def test_a_number_is_right_within_interval_and_tolerance(said: float, right: bool) -> None:
    check = replace(NUMBER, tolerance=0.04)
    result = answers.judge_number(check, said, ROUNDS)
    assert result.verdict == ("pass" if right else "fail")
    assert result.points == (check.points if right else 0)
    assert result.reason == f"you say {said:g}; measured 7.00 ± 0.25, accepted 6.47 .. 7.53"
    assert result.measured == {"answer": said}
    assert result.compared_with["low"] == pytest.approx(6.472, abs=0.001)
    assert bool(result.next_step) != right


LAYERS = [
    {"TCP": 110.0, "allocator": 90.0, "IP": 50.0},
    {"TCP": 90.0, "allocator": 92.0, "IP": 50.0},
]


@pytest.mark.parametrize(
    ("said", "tolerance", "right"),
    [
        ("TCP", 0.05, True),
        (" tcp ", 0.05, True),
        ("allocator", 0.05, False),
        ("allocator", 0.1, True),
        ("IP", 0.1, False),
        ("", 0.1, False),
    ],
)
def test_a_name_is_right_if_none_has_much_more(said: str, tolerance: float, right: bool) -> None:
    result = answers.judge_name(replace(NAME, tolerance=tolerance), said, LAYERS)
    assert (result.verdict == "pass") is right
    assert "measured: TCP 100, allocator 91, IP 50; accepted: TCP" in result.reason
    assert result.compared_with == {"TCP": 100.0, "allocator": 91.0, "IP": 50.0}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("descriptors and VFS", "files"),
        ("Files", "files"),
        ("memset_orig()", "memset_orig"),
        ("TCP+0x5c0", "TCP"),
        ("TCP's table of connections", "TCP's table of connections"),
    ],
)
def test_names_are_what_tables_show(said: str, meant: str) -> None:
    assert answers.plain(said) == answers.plain(meant)


def _one(check: Check, *values: float) -> list[Reading]:
    return [Reading(numbers={check.metric: value}) for value in values]


def test_a_ratio_is_taken_round_by_round() -> None:
    assert RATIO.run and RATIO.versus
    # The second round was dearer for both; one machine had a round more than the other.
    readings = {
        RATIO.run: _one(RATIO, 60, 120, 60, 90),
        RATIO.versus: _one(RATIO, 50, 100, 50),
    }
    result = answers.judged(RATIO, 1.2, readings)
    assert result.verdict == "pass"
    assert result.compared_with["mean"] == pytest.approx(1.2)
    assert result.compared_with["half_width"] == pytest.approx(0, abs=1e-9)


def test_a_name_can_be_that_of_a_difference() -> None:
    check = BY_ID["layer-above-limit"]
    assert check.run and check.versus
    readings = {
        check.run: [Reading(names={"layer": {"TCP": 100.0, "allocator": 90.0}})],
        check.versus: [Reading(names={"layer": {"TCP": 90.0, "allocator": 40.0}})],
    }
    assert answers.judged(check, "allocator", readings).verdict == "pass"
    assert answers.judged(check, "TCP", readings).verdict == "fail"


def test_as_few_machines_as_possible_are_planned() -> None:
    plans = {plan.name: plan for plan in answers.plan(LAB.checks)}
    assert list(plans) == ["sharing-4", "stacks-4", "probe-4", "probe-1"]
    assert plans["probe-1"].runs == [Run("epoll", 1, 64, 1)]
    assert set(plans["probe-4"].runs) == {
        Run("epoll", 0, 64, 4),
        Run("epoll", 1, 64, 4),
    }
    assert [plan.name for plan in answers.plan([NUMBER])] == ["probe-4"]
    assert {RATIO} == set(plans["probe-1"].checks)


def test_a_run_is_that_of_a_bench() -> None:
    load = Run("epoll", 0, 4096, 2).load
    assert (load.connections, load.transactions_per_connection, load.size) == (128, 0, 4096)
    assert load.mode == "rounds"


def _measuring(
    monkeypatch: pytest.MonkeyPatch, taken: list[float]
) -> tuple[list[int], dict[Run, list[Reading]]]:
    rounds: list[int] = []

    def take(station: Any, run: Run, number: int, seed: int) -> Reading:
        rounds.append(seed)
        return Reading(numbers={NUMBER.metric: taken[number]})

    monkeypatch.setitem(answers._TAKE, "probe", take)
    station: Any = None
    (plan,) = answers.plan([NUMBER])
    return rounds, plan.measure(station, 5)


def test_what_spreads_little_is_measured_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, readings = _measuring(monkeypatch, [7.0, 7.0, 7.01, 0, 0, 0])
    assert seeds == [5, 6, 7]
    assert NUMBER.run and len(readings[NUMBER.run]) == 3


def test_what_spreads_is_measured_more_often_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(_measuring(monkeypatch, [7.0, 8.0, 7.0, 7.4, 7.4, 7.4])[0]) == answers.MAX_ROUNDS


class FakeStation:
    """A machine that is not one; `losing` says how many of a name are lost."""

    losing: dict[str, int]
    open: set[FakeStation]
    threads: set[str]

    def __init__(self, name: str) -> None:
        self.name = name
        self.machine: Any = self
        self.console: Any = self
        self.transcript: Any = self
        self.text = "what it printed"

    def start(self) -> None:
        FakeStation.open.add(self)
        assert threading.current_thread() is threading.main_thread()

    def __enter__(self) -> FakeStation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        FakeStation.open.discard(self)

    def environment(self) -> dict[str, object]:
        return {"qemu": "a fake"}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeStation]:
    FakeStation.losing, FakeStation.open = {}, set()

    def take(station: FakeStation, run: Run, number: int, seed: int) -> Reading:
        if FakeStation.losing.get(station.name, 0):
            FakeStation.losing[station.name] -= 1
            raise ExperimentFailed(Failure("panic", "double fault"))
        return Reading(
            numbers=dict.fromkeys(ANSWERS, 7.0), names={"layer": {"TCP": 2.0, "IP": 1.0}}
        )

    monkeypatch.setattr(answers.Plan, "station", lambda plan, built: FakeStation(plan.name))
    for instrument in answers.SLOWEST_FIRST:
        monkeypatch.setitem(answers._TAKE, instrument, take)
    return FakeStation


def _graded(tmp_path: Path, *ids: str) -> answers.Outcome:
    file = tmp_path / "answers.toml"
    lines = (f"{i} = {chr(34) + 'TCP' + chr(34) if BY_ID[i] == NAME else 7}" for i in ids)
    file.write_text("\n".join(lines) + "\n")
    nothing: Any = None
    return answers.grade(LAB, file, nothing, 1, QUIET)


def test_a_machine_that_is_lost_once_is_replaced(fakes: type[FakeStation], tmp_path: Path) -> None:
    fakes.losing = {"probe-4": 1}
    outcome = _graded(tmp_path, NUMBER.id, NAME.id)
    verdicts = {result.id: result.verdict for result in outcome.results}
    assert (verdicts[NUMBER.id], verdicts[NAME.id]) == ("pass", "pass")
    assert list(verdicts.values()).count("fail") == len(LAB.checks) - 2
    assert [(lost.name, lost.console) for lost in outcome.lost] == [("probe-4", "what it printed")]
    assert outcome.environment == {"qemu": "a fake"}
    assert not fakes.open


def test_one_that_is_lost_again_is_nobodys_fault(fakes: type[FakeStation], tmp_path: Path) -> None:
    fakes.losing = {"probe-4": 2}
    outcome = _graded(tmp_path, NUMBER.id, NAME.id)
    verdicts = {result.id: result.verdict for result in outcome.results}
    assert (verdicts[NUMBER.id], verdicts[NAME.id]) == ("infra", "pass")
    (lost,) = [result for result in outcome.results if result.verdict == "infra"]
    assert lost.reason == "it could not be measured here: double fault"
    assert not fakes.open


def test_an_interrupted_run_ends_its_machines_and_waits_for_nothing_else(
    fakes: type[FakeStation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(station: FakeStation, run: Run, number: int, seed: int) -> Reading:
        # As long as its machine is there.
        while station in fakes.open:
            time.sleep(0.001)
        raise OSError("the machine has gone")

    def interrupted(work: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(answers._TAKE, "probe", take)
    monkeypatch.setitem(answers._TAKE, "stacks", take)
    monkeypatch.setattr(answers, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _graded(tmp_path, NUMBER.id, NAME.id)
    assert not fakes.open


def test_a_report_shows_answers_beside_what_is_accepted(tmp_path: Path) -> None:
    results = [
        answers.judge_number(NUMBER, 9.0, ROUNDS),
        answers.judge_name(NAME, "IP", LAYERS),
        *(judge.failed(c, "fail", "no answer yet") for c in LAB.checks if c not in (NUMBER, NAME)),
    ]
    graded = grading.Grade(
        lab=LAB.name,
        variant="submission",
        score=0,
        max_score=100,
        checks=tuple(results),
        environment={},
        phases={},
        table=points.table(LAB),
        ignored=("answers.toml: syscall-short",),
    )
    console = Console(file=io.StringIO(), width=160)
    report.table(graded, LAB, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "9 (6.47 .. 7.53)" in text
    assert "you say IP; measured: TCP 100" in text
    assert "ignored in the submission: answers.toml: syscall-short" in text
    assert "starter" not in text
    # Nobody has to look into a machine because of a wrong answer.
    assert report.write_bundle(graded, "", tmp_path / "results") is None


def test_what_a_result_file_holds_is_worth_the_same_later(tmp_path: Path) -> None:
    results = [
        answers.judge_number(NUMBER, 7.0, ROUNDS),
        answers.judge_name(NAME, "TCP", LAYERS),
        *(judge.failed(c, "fail", "no answer yet") for c in LAB.checks if c not in (NUMBER, NAME)),
    ]
    rows = {result.id: result for result in results}
    graded = grading.Grade(
        lab=LAB.name,
        variant="submission",
        score=judge.score(results),
        max_score=100,
        checks=tuple(rows[check.id] for check in LAB.checks),
        environment=ENVIRONMENT,
        phases={},
        table=points.table(LAB),
    )
    document = report.as_json(graded)
    again = regrade.regrade(document, LAB)
    assert again.score == graded.score == NUMBER.points + NAME.points
    assert again.checks == graded.checks
    assert list(regrade.changes(document, again)) == []
    told = " ".join(explain.text(document).split())
    assert "open throughout; messages of 64 bytes; all connections in rounds; 4 vCPUs" in told
    assert "compared with server epoll, per connection 0, size 64, vcpus 4; tolerance: 0.08" in told


# ---- in the virtual machine: solution and starter are graded in test_grade.py ------------------


def test_answers_that_are_a_third_off_get_nothing(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.vmlinux.is_file()
    lab = LAB.only([NUMBER.id, "short-to-long", "objects-short"])
    wrong = {check.id: SOLVED[check.id] * (2 / 3) for check in lab.checks}
    text = "".join(f"{name} = {value}\n" for name, value in wrong.items())
    (tmp_path / "answers.toml").write_text(text)
    graded = grading.grade(lab, variant.submission(LAB.folder, tmp_path), seed=1)
    for result in graded.checks:
        assert (result.verdict, result.points) == ("fail", 0)
        assert result.reason.startswith(f"you say {wrong[result.id]:,.10g}; measured ")
        # What was measured agrees with the solution, though.
        low, high = result.compared_with["low"], result.compared_with["high"]
        assert low <= SOLVED[result.id] <= high
    assert graded.score == 0
