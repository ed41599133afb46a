"""References that are lost, and what that means for a submission: without a machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from grader import grade
from grader.experiment import ExperimentFailed, Failure
from grader.lab import load_lab
from grader.probe.counters import Total
from grader.progress import Progress


class FakeStation:
    """Boots at once; `boots` says which machine of this name it is."""

    made: list[FakeStation]

    def __init__(self, built: Any, vcpus: int, name: str, kernel_args: Sequence[str]) -> None:
        self.name = name
        self.open = False
        self.boots = 1 + sum(other.name == name for other in FakeStation.made)
        FakeStation.made.append(self)
        text = SimpleNamespace(text=f"console of {name} {self.boots}")
        self.machine = SimpleNamespace(console=SimpleNamespace(transcript=text))
        self.probe = SimpleNamespace(
            read=lambda: SimpleNamespace(total=Total(1, 2, 0, {"ioctl": 3}))
        )

    def start(self) -> None:
        self.open = True

    def __enter__(self) -> FakeStation:
        return self

    def close(self) -> None:
        self.open = False


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> grade.References:
    FakeStation.made = []
    monkeypatch.setattr(grade, "Station", FakeStation)
    built: Any = SimpleNamespace(kernel=SimpleNamespace(debug=False))
    both = {"starter": built, "solution": built}
    return grade.References(both, 4, ExitStack(), Progress(quiet=True))


def test_a_solution_that_succeeds_leaves_no_doubt(references: grade.References) -> None:
    assert references.doubt(lambda station: None) == ""
    assert references.ends == []


def test_one_that_was_lost_once_is_replaced(references: grade.References) -> None:
    def run(station: Any) -> None:
        if station.boots == 1:
            raise ExperimentFailed(Failure("panic", "double fault"))

    assert references.doubt(run) == ""
    assert [(end.name, end.console) for end in references.ends] == [
        ("solution", "console of solution 1")
    ]
    assert references.ends[0].counters == {"user": 1, "kernel": 2, "clock": 0, "ioctl": 3}
    running: Any = references.stations()["solution"]
    assert running.boots == 2 and running.open
    assert not FakeStation.made[1].open


def test_one_that_is_lost_again_is_the_machines_fault(references: grade.References) -> None:
    def run(station: Any) -> None:
        raise ExperimentFailed(Failure("hang", "no answer"))

    assert references.doubt(run) == "no answer"
    assert len(references.ends) == 2
    assert references.stations()["solution"]


def test_one_that_only_fails_keeps_its_machine(references: grade.References) -> None:
    def run(station: Any) -> None:
        raise ExperimentFailed(Failure("fail", "a wrong byte"))

    assert references.doubt(run) == "a wrong byte"
    assert references.ends == []


@pytest.mark.parametrize(("conclusive", "verdict"), [(True, "fail"), (False, "infra")])
def test_what_no_load_of_the_host_can_cause_is_not_doubted(
    conclusive: bool,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def doubt(run: Any) -> str:
        asked.append(run)
        return "the solution is too slow here, too"

    failure = Failure("fail", "the debug kernel reports", conclusive=conclusive)
    monkeypatch.setattr(grade, "_attempt", lambda *_: grade.Attempt(failure, []))
    check = next(check for check in load_lab("2-partitioning").checks if check.debug)
    candidate: Any = None
    assert grade._serve(check, candidate, doubt, seed=1).verdict == verdict
    assert bool(asked) is not conclusive
