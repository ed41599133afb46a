"""Answers: what a student has read off the lab's own tools, judged by measuring it again.

An answer is a number or a name in a TOML file, under the id of its check. Nothing here knows the
right one: what is asked for is measured in this run, several times, and accepted is what lies in
the 95 % interval of that or beyond it by no more than the check's tolerance. Only what has been
answered is measured, in as few machines as do it, several at a time.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from grader import bench, profile, sharing
from grader import checks as judge
from grader.checks import CheckResult, interval
from grader.errors import UserError
from grader.experiment import ExperimentFailed, Failure, machine_failure
from grader.lab import ANSWERS, Check, Lab, Run
from grader.layers import LAYERS, title
from grader.machine import MachineError
from grader.progress import Progress
from grader.samples import Cell
from grader.station import Built, Station
from grader.submission import shown

Instrument = Literal["probe", "stacks", "sharing"]
"""What counts: the standard probe; the stack probe beside it; the sharing probe alone."""

INSTRUMENTS: Mapping[str, Instrument] = {
    "syscalls": "probe",
    "instructions": "probe",
    "user": "probe",
    "objects": "probe",
    "layer": "stacks",
    "transfers": "sharing",
    "function": "sharing",
    "object": "sharing",
}
"""What counts each of `ANSWERS`:

- ``syscalls``, ``instructions`` (without the clock's), ``user`` (instructions of programs) per
  transaction;
- ``objects``: files, inodes, dentries and descriptors allocated per transaction;
- ``transfers``: cache lines that move between CPUs, per connection;
- ``layer``: the layer of `grader.layers` with the most instructions;
- ``function``: the one that causes most transfers; ``object``: what the lines are parts of that
  move most, all lines of all objects of this kind together.
"""
SLOWEST_FIRST: Sequence[Instrument] = ("sharing", "stacks", "probe")
# The emulator has faults of its own, which take a machine down once in many boots.
ATTEMPTS = 2
OBJECTS = ("file_alloc", "inode_alloc", "dentry_alloc", "fd_alloc")
ROUNDS = 3
# Added while an interval is wider than its tolerance.
MAX_ROUNDS = 6
# Of `grader.sharing.WINDOWS`, what the time allows.
SHARING_WINDOWS = 1
UNANSWERED = "?"
"""What the starter has in place of an answer."""
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Reading:
    """What one round of a run gives for each metric of its instrument."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """How much there is of each name."""


@dataclass(frozen=True)
class Outcome:
    """What grading the answers has come to."""

    results: list[CheckResult]
    environment: Mapping[str, object]
    """The description of a machine that was measured in; empty if there was none."""
    unknown: tuple[str, ...]
    """Keys of the file that are no check's."""
    lost: tuple[Lost, ...]


@dataclass(frozen=True)
class Lost:
    """A machine that did not get through its measurements."""

    name: str
    failure: Failure
    console: str


class BadAnswers(UserError):
    """The file of answers is no TOML file."""


def read(path: Path) -> dict[str, Any]:
    """Return a file's answers by the ids of their checks. Raises `BadAnswers`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    # Bytes that are no text, and numbers of too many digits, are ValueErrors, too.
    except (ValueError, RecursionError) as error:
        raise BadAnswers(
            f"{path.name} is no TOML file: {shown(str(error))}",
            'each answer is a line such as   some-id = 7.1   or   some-id = "name"',
        ) from None


def problem(check: Check, answers: Mapping[str, Any]) -> str:
    """Return why there is no answer to a check that could be right, or nothing."""
    if check.id not in answers:
        return f"no answer: the file has no line   {check.id} = ..."
    said = answers[check.id]
    if said == UNANSWERED:
        return "no answer yet"
    if ANSWERS[check.metric] == "name":
        good, wanted = isinstance(said, str), "a name in quotes"
    else:
        good, wanted = _is_number(said), "a number without quotes"
    return "" if good else f"{shown(repr(said))} is no answer: {wanted} is wanted"


def _is_number(said: object) -> bool:
    try:
        return type(said) in (int, float) and math.isfinite(said)  # type: ignore[arg-type]
    except OverflowError:
        return False


# ---- judging -----------------------------------------------------------------------------------


def judge_number(check: Check, said: float, rounds: Sequence[float]) -> CheckResult:
    """Judge a number by what each round has measured."""
    measured = interval(rounds)
    slack = measured.half + check.tolerance * abs(measured.mean)
    low, high = measured.mean - slack, measured.mean + slack
    digits = 0 if abs(measured.mean) >= 100 else 2
    return _result(
        check,
        low <= said <= high,
        f"you say {said:,.10g}; measured {measured.mean:,.{digits}f} ± "
        f"{measured.half:,.{digits}f}, accepted {low:,.{digits}f} .. {high:,.{digits}f}",
        {"answer": said},
        {"mean": measured.mean, "half_width": measured.half, "low": low, "high": high},
    )


def judge_name(check: Check, said: str, rounds: Sequence[Mapping[str, float]]) -> CheckResult:
    """Judge a name by how much there was of each in each round; that with most is the first."""
    names = dict.fromkeys(name for one in rounds for name in one)
    means = {name: fmean(one.get(name, 0.0) for one in rounds) for name in names}
    ranked = sorted(means, key=lambda name: -means[name])
    most = means[ranked[0]]
    accepted = [name for name in ranked if means[name] >= (1 - check.tolerance) * most]
    first = {name: means[name] for name in ranked[:SHOWN_NAMES]}
    digits = 0 if most >= 100 else 1
    listed = ", ".join(f"{name} {value:,.{digits}f}" for name, value in first.items())
    return _result(
        check,
        plain(said) in map(plain, accepted),
        f"you say {shown(said)}; measured: {listed}; accepted: {', '.join(accepted)}",
        {},
        first,
    )


def plain(name: str) -> str:
    """Return a name in the form in which names are compared.

    A layer may be called by its title or its key, a function may have its (), a line its offset.
    """
    bare = _OFFSET.sub("", name.strip()).removesuffix("()").casefold()
    return _LAYERS.get(bare, bare)


_OFFSET = re.compile(r"\+0x[0-9a-f]+$")
_LAYERS = {title(layer).casefold(): layer.casefold() for layer in LAYERS}


def _result(
    check: Check,
    right: bool,
    reason: str,
    measured: dict[str, float],
    compared_with: dict[str, float],
) -> CheckResult:
    result = judge.failed(check, "fail", reason)
    if right:
        result = replace(result, verdict="pass", points=check.max_points, next_step="")
    return replace(result, measured=measured, compared_with=compared_with)


def judged(check: Check, said: Any, readings: Mapping[Run, Sequence[Reading]]) -> CheckResult:
    """Judge a well-formed answer by the readings of the runs that its check names."""
    assert check.run is not None
    rounds = readings[check.run]
    others = readings[check.versus] if check.versus else ()
    if ANSWERS[check.metric] == "number":
        return judge_number(check, said, _numbers(check, rounds, others))
    names = [reading.names[check.metric] for reading in rounds]
    if others:
        names = [
            {name: mine.get(name, 0.0) - other.names[check.metric].get(name, 0.0) for name in mine}
            for mine, other in zip(names, others, strict=False)
        ]
    return judge_name(check, said, names)


def _numbers(check: Check, rounds: Sequence[Reading], others: Sequence[Reading]) -> list[float]:
    """Return a number of each round, or its ratio to that of the other run in the same round."""
    mine = [reading.numbers[check.metric] for reading in rounds]
    if not others:
        return mine
    # One machine can have needed more rounds than the other.
    pairs = zip(mine, others, strict=False)
    return [value / other.numbers[check.metric] for value, other in pairs]


# ---- measuring ---------------------------------------------------------------------------------


def _cell(run: Run) -> Cell:
    return Cell(run.vcpus, run.size, run.per_connection)


def _by_probe(station: Station, run: Run, number: int, seed: int) -> Reading:
    costs = bench.measure_once(station, _cell(run), run.server, number, seed).costs
    return Reading(
        numbers={
            "syscalls": costs.calls["syscalls"],
            "instructions": costs.work,
            "user": costs.user_instructions,
            "objects": sum(costs.calls[name] for name in OBJECTS),
        }
    )


def _by_stacks(station: Station, run: Run, number: int, seed: int) -> Reading:
    paths, _ = profile.measure_once(station, run.server, _cell(run), seed)
    layers = {title(layer): count for layer, count in profile.layers(paths).items()}
    return Reading(names={"layer": layers})


def _by_sharing(station: Station, run: Run, number: int, seed: int) -> Reading:
    command = bench.SERVERS[run.server]
    found = sharing.measure_sharing(station, command, run.load, seed, SHARING_WINDOWS)
    return Reading(
        numbers={"transfers": found.per_connection},
        names={
            "function": {one.name: one.moved.all for one in found.functions},
            "object": {name: moved.all for name, moved in found.objects.items()},
        },
    )


_TAKE: Mapping[Instrument, Callable[[Station, Run, int, int], Reading]] = {
    "probe": _by_probe,
    "stacks": _by_stacks,
    "sharing": _by_sharing,
}


@dataclass(frozen=True)
class Plan:
    """What is measured in one machine."""

    instrument: Instrument
    vcpus: int
    checks: tuple[Check, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of this machine, each once."""
        return [run for run in runs_of(self.checks) if run.vcpus == self.vcpus]

    @property
    def name(self) -> str:
        """What the machine is called where it is reported."""
        return f"{self.instrument}-{self.vcpus}"

    def station(self, built: Built) -> Station:
        """Return the machine, not started."""
        return Station(
            built,
            self.vcpus,
            self.name,
            counted=self.instrument != "sharing",
            stacks=self.instrument == "stacks",
            sharing=self.instrument == "sharing",
            kernel_args=sharing.KERNEL_ARGS if self.instrument == "sharing" else (),
        )

    def measure(self, station: Station, seed: int) -> dict[Run, list[Reading]]:
        """Measure all runs in turn, in as many rounds as it takes. Raises `ExperimentFailed`."""
        readings: dict[Run, list[Reading]] = {run: [] for run in self.runs}
        take = _TAKE[self.instrument]
        for number in range(MAX_ROUNDS):
            if number >= ROUNDS and not self._wide(readings):
                break
            for run, taken in readings.items():
                taken.append(take(station, run, number, seed + number))
        return readings

    def _wide(self, readings: Mapping[Run, Sequence[Reading]]) -> bool:
        """Whether an interval is wider than its tolerance; of a ratio, as far as it is known."""
        for check in self.checks:
            if ANSWERS[check.metric] == "name":
                continue
            here = [readings[run] for run in runs_of([check]) if run in readings]
            measured = interval(_numbers(check, here[0], here[1] if len(here) > 1 else ()))
            if measured.half > check.tolerance * abs(measured.mean):
                return True
        return False


def runs_of(checks: Iterable[Check]) -> list[Run]:
    """Return the runs that these checks name, each once."""
    named = (run for check in checks for run in (check.run, check.versus) if run)
    return list(dict.fromkeys(named))


def plan(checks: Sequence[Check]) -> list[Plan]:
    """Return the machines that these checks need, those that take longest first."""
    return [
        Plan(instrument, vcpus, tuple(mine))
        for instrument in SLOWEST_FIRST
        for vcpus in sorted({run.vcpus for run in runs_of(checks)}, reverse=True)
        if (
            mine := [
                check
                for check in checks
                if INSTRUMENTS[check.metric] == instrument
                and any(run.vcpus == vcpus for run in runs_of([check]))
            ]
        )
    ]


class _Measuring:
    """Measures what checks need in several machines at a time; one that is lost is replaced."""

    def __init__(self, built: Built, seed: int, progress: Progress) -> None:
        self._built = built
        self._seed = seed
        self._progress = progress
        self.readings: dict[Instrument, dict[Run, list[Reading]]] = {}
        self.failed: dict[str, Failure] = {}
        """By the name of a plan: why there are no readings."""
        self.lost: list[Lost] = []
        self.environment: Mapping[str, object] = {}

    def run(self, plans: Sequence[Plan]) -> None:
        """Follow the plans. Raises `UserError` if no machine can be started."""
        for _ in range(ATTEMPTS):
            self.failed = {}
            self._once(plans)
            plans = [plan for plan in plans if plan.name in self.failed]

    def _once(self, plans: Sequence[Plan]) -> None:
        workers = max(1, min(len(plans), len(os.sched_getaffinity(0))))
        # Left from the inside out: when this is interrupted, the machines end first, and with them
        # the work of the threads.
        with ThreadPoolExecutor(workers) as pool, ExitStack() as stack:
            work = {}
            for plan in plans:
                station = plan.station(self._built)
                stack.callback(station.close)
                # Here, not in a thread: starting a machine forks.
                station.start()
                work[pool.submit(self._measure, plan, station)] = plan
            for number, done in enumerate(as_completed(work), start=1):
                self._progress.update(f"{number} of {len(plans)} machines are done")
                if failure := done.result():
                    self.failed[work[done].name] = failure

    def _measure(self, plan: Plan, station: Station) -> Failure | None:
        try:
            with station:
                try:
                    taken = plan.measure(station, self._seed)
                except ExperimentFailed as error:
                    console = station.machine.console.transcript.text
                    self.lost.append(Lost(plan.name, error.failure, console))
                    return error.failure
                self.environment = station.machine.environment()
        except MachineError as error:
            failure = machine_failure(error)
            self.lost.append(Lost(plan.name, failure, error.console))
            return failure
        self.readings.setdefault(plan.instrument, {}).update(taken)
        return None


def grade(lab: Lab, file: Path, built: Built, seed: int, progress: Progress) -> Outcome:
    """Judge the answers in `file` by what machines that boot `built` measure."""
    try:
        answers = read(file)
    except BadAnswers as error:
        results = [judge.failed(c, "no-build", error.problem, error.todo) for c in lab.checks]
        return Outcome(results, {}, (), ())
    problems = {check.id: problem(check, answers) for check in lab.checks}
    answered = [check for check in lab.checks if not problems[check.id]]
    plans = plan(answered)
    measuring = None
    if plans:
        measuring = _Measuring(built, seed, progress)
        with progress.phase("measuring"):
            progress.update(f"{len(plans)} machines")
            measuring.run(plans)
    results = []
    for check in lab.checks:
        if problems[check.id]:
            results.append(judge.failed(check, "fail", problems[check.id]))
            continue
        assert measuring is not None
        failures = [
            failure
            for one in plans
            if check in one.checks and (failure := measuring.failed.get(one.name))
        ]
        if failures:
            reason = f"it could not be measured here: {failures[0].reason}"
            results.append(judge.failed(check, "infra", reason))
        else:
            readings = measuring.readings[INSTRUMENTS[check.metric]]
            results.append(judged(check, answers[check.id], readings))
    known = {check.id for check in lab.checks}
    return Outcome(
        results,
        measuring.environment if measuring else {},
        tuple(f"{file.name}: {shown(key)}" for key in answers if key not in known),
        tuple(measuring.lost) if measuring else (),
    )
