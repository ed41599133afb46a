"""Grade a variant of a lab: build, boot, measure beside starter and solution, judge.

A submission can fail in every way there is; what is wrong with *it* becomes a verdict. What is
wrong with the machine is found out by asking the reference to do the same: only if the solution
fails, too, the verdict is ``infra``.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from grader import answers, exact_grade, kernel_text, points
from grader import checks as judge
from grader import variant as variants
from grader.checks import CheckResult
from grader.errors import UserError
from grader.evidence import answered_elsewhere
from grader.experiment import (
    Compared,
    Comparison,
    ExperimentFailed,
    Failure,
    Session,
    machine_failure,
    nothing_to_report,
)
from grader.lab import Check, Lab
from grader.machine import CPU_MODEL, MachineError, qemu_version
from grader.progress import Progress
from grader.results import commit
from grader.station import Built, Station, build
from grader.variant import Variant
from images.build import CompileError
from kernel.build import Kernel, ModuleError, build_kernel

ROUNDS = 3
MAX_ROUNDS = 9
TRACE_CHARACTERS = 3000
# KASAN finds what the allocator's own checks find, which take a fifth of the boot's time.
DEBUG_KERNEL_ARGS = ("slab_debug=-",)


class NoGrade(UserError):
    """The machine, not the submission, is why there is no grade."""


Doubt = Callable[[Callable[[Station], None]], str]
"""Ask the reference to do the same; see `References.doubt`."""


@dataclass(frozen=True)
class MachineEnd:
    """What a machine left behind: for whoever looks for the reason."""

    name: str
    """Whose it was: the submission's, or that of a reference that was lost."""
    console: str
    """The recent text, at most 0.5 MB of it."""
    counters: Mapping[str, int]
    """All that the probe counted since the boot, over all vCPUs."""


@dataclass(frozen=True)
class Grade:
    """The outcome of grading one variant; see result.schema.json for the file."""

    lab: str
    variant: str
    score: float
    max_score: float
    checks: tuple[CheckResult, ...]
    environment: Mapping[str, object]
    phases: Mapping[str, float]
    table: Mapping[str, Any]
    """The lab's table of points, see `points.table`."""
    ignored: tuple[str, ...] = ()
    machines: tuple[MachineEnd, ...] = ()
    """The submission's, in the order of their boots, and references that were lost; not part of the
    result file."""

    @property
    def judged(self) -> bool:
        """Whether every check could be judged; if not, the score is none."""
        return all(result.verdict != "infra" for result in self.checks)


@dataclass(frozen=True)
class Attempt:
    """How an experiment ended, and the machines that were lost on the way."""

    failure: Failure | None
    lost: list[Failure]
    ran: bool = True
    """False: there was no machine left to try it on."""

    def note(self) -> str:
        """Return what to add to a reason when a lost machine was not the end."""
        if not self.lost or (self.failure and self.failure.verdict in ("panic", "hang")):
            return ""
        return f"; a first machine was lost here ({self.lost[0].reason}), a second was not"


class Candidate:
    """The variant to be graded: boots its station when needed, and once more after it is lost."""

    MAX_BOOTS = 3

    def __init__(self, built: Built, vcpus: int, stack: ExitStack, progress: Progress) -> None:
        self._built = built
        self._vcpus = vcpus
        self._stack = stack
        self._progress = progress
        self._boots = 0
        self._cancelled = False
        self._started: Station | None = None
        self._station: Station | None = None
        self.lost: Failure | None = None
        """Why there is no station any more, once every boot has been used."""
        self.ends: list[MachineEnd] = []

    def start(self) -> None:
        """Begin a boot without waiting for it. Raises `NoGrade` if this machine cannot."""
        if self._cancelled:
            raise NoGrade("the run was ended", "start it again")
        self._boots += 1
        self._started = _start(_station(self._built, self._vcpus, "submission"), self._stack)

    def cancel(self) -> None:
        """Let no machine start from here on; any thread may say so."""
        self._cancelled = True

    def station(self) -> Station | None:
        """Return a running station, or None when the variant has lost all its machines."""
        while self._station is None and self.lost is None:
            if self._started is None:
                self.start()
            assert self._started is not None
            station, self._started = self._started, None
            try:
                with self._progress.phase("boot"):
                    self._station = station.__enter__()
            except MachineError as error:
                self.ends.append(MachineEnd("submission", error.console, {}))
                self.abandon(machine_failure(error))
        return self._station

    @property
    def running(self) -> Station | None:
        """The station that runs, if any."""
        return self._station

    def abandon(self, failure: Failure) -> None:
        """Give the station up after a panic or a hang."""
        self.close()
        if self._boots >= self.MAX_BOOTS:
            self.lost = failure

    def close(self) -> None:
        """End the machine that runs, if any, and keep what it leaves."""
        if self._station is not None:
            self.ends.append(_end_of(self._station))
            self._station.close()
            self._station = None


class References:
    """Starter and solution, booted: what the submission is compared with.

    They, too, can be lost to a fault of the emulator; then a new machine takes the old one's place.
    """

    def __init__(
        self, built: Mapping[str, Built], vcpus: int, stack: ExitStack, progress: Progress
    ) -> None:
        self._built = built
        self._vcpus = vcpus
        self._stack = stack
        self._progress = progress
        self._stations: dict[str, Station] = {}
        self._booting: dict[str, Station] = {}
        self.ends: list[MachineEnd] = []
        """What the lost ones left."""
        for name in built:
            self._begin(name)

    def _begin(self, name: str) -> None:
        station = _station(self._built[name], self._vcpus, name)
        self._booting[name] = _start(station, self._stack)

    def stations(self) -> Mapping[str, Station]:
        """Return the running stations; raises `NoGrade` if one does not boot."""
        while self._booting:
            name, station = self._booting.popitem()
            self._progress.update(name)
            try:
                with self._progress.phase("boot"):
                    self._stations[name] = station.__enter__()
            except MachineError as error:
                raise _no_boot(name, error) from error
        return self._stations

    def replace(self, name: str) -> None:
        """Give this machine up after a panic or a hang, and begin the boot of another one."""
        station = self._stations.pop(name)
        self.ends.append(_end_of(station))
        station.close()
        self._begin(name)

    def doubt(self, run: Callable[[Station], None]) -> str:
        """Return why the solution cannot do `run` either, on this machine just now; or nothing."""
        reason = ""
        for _ in range(2):
            try:
                run(self.stations()["solution"])
                return ""
            except ExperimentFailed as error:
                reason = error.failure.reason
                if error.failure.verdict in ("panic", "hang"):
                    self.replace("solution")
        return reason

    def close(self) -> None:
        """End the machines."""
        for station in (*self._stations.values(), *self._booting.values()):
            station.close()
        self._stations, self._booting = {}, {}


class _OnDebugKernel:
    """The checks on the debug kernel, in a thread of their own from the first moment on."""

    def __init__(self, lab: Lab, built: Built, vcpus: int, seed: int, stack: ExitStack) -> None:
        self._lab = lab
        self._kernel = built.kernel
        self._vcpus = vcpus
        self._seed = seed
        self._stack = stack
        self._candidate = Candidate(built, vcpus, stack, Progress(quiet=True))
        self._references: References | None = None
        # From the last to the first: no new machine, the machines, the thread.
        thread = stack.enter_context(ThreadPoolExecutor(1))
        self._candidate.start()
        self._future = thread.submit(self._run)
        stack.callback(self._candidate.cancel)

    def _run(self) -> list[CheckResult]:
        checks = [check for check in self._lab.checks if check.debug]
        found = [_serve(check, self._candidate, self._doubt, self._seed) for check in checks]
        self._candidate.close()
        return found

    def _doubt(self, run: Callable[[Station], None]) -> str:
        # Built and booted for the first who asks: seldom anybody does.
        if self._references is None:
            solution = build(self._lab, variants.solution(self._lab.folder), self._kernel)
            self._references = References(
                {"solution": solution}, self._vcpus, self._stack, Progress(quiet=True)
            )
        return self._references.doubt(run)

    def results(self) -> list[CheckResult]:
        """Wait for the results; raises what went wrong."""
        return self._future.result()

    @property
    def ends(self) -> list[MachineEnd]:
        """What the machines left."""
        return self._candidate.ends


def _end_of(station: Station) -> MachineEnd:
    total = station.probe.read().total
    counters = {"user": total.user, "kernel": total.kernel, "clock": total.clock, **total.functions}
    return MachineEnd(station.name, station.machine.console.transcript.text, counters)


def _station(built: Built, vcpus: int, name: str) -> Station:
    arguments = DEBUG_KERNEL_ARGS if built.kernel.debug else ()
    return Station(built, vcpus, name, kernel_args=arguments)


def _start(station: Station, stack: ExitStack) -> Station:
    stack.callback(station.close)
    try:
        station.start()
    except MachineError as error:
        raise _no_boot(station.name, error) from error
    return station


def _no_boot(name: str, error: MachineError) -> NoGrade:
    return NoGrade(
        f"the {name} does not boot here: {error}",
        "run `invoke doctor`; if it finds nothing, report this",
    )


def grade(
    lab: Lab,
    variant: Variant,
    vcpus: int = 4,
    seed: int | None = None,
    progress: Progress | None = None,
    exact: bool = False,
) -> Grade:
    """Grade `variant`. Raises `NoGrade` or another `UserError` where the machine fails.

    `exact`: in virtual time, for a lab that is `exact_grade.possible`.
    """
    progress = progress or Progress(quiet=True)
    seed = secrets.randbits(63) if seed is None else seed
    begin = time.monotonic()
    load_before = os.getloadavg()[0]
    with progress.phase("kernel"):
        kernel = build_kernel(progress=progress)
    try_it = _try_exactly if exact else _try_code if lab.has_code else _try_answers
    tried = try_it(lab, variant, kernel, vcpus, seed, progress)
    results = judge.apply_activity(lab, tried.results)
    return Grade(
        lab=lab.name,
        variant=variant.name,
        score=judge.score(results),
        max_score=lab.max_score,
        checks=tuple(results),
        environment={
            "kernel": kernel.release,
            "kernel_key": kernel.key,
            "qemu": qemu_version(),
            "cpu_model": CPU_MODEL,
            "accelerator": "tcg",
            **({"exact": True} if exact else {}),
            **tried.machine,
            "vcpus": vcpus,
            "seed": seed,
            "host_cpus": os.cpu_count() or 1,
            "host_load": {"before": load_before, "after": os.getloadavg()[0]},
            "commit": commit(),
            "time": now(),
            "seconds": time.monotonic() - begin,
            **({"only": [check.id for check in lab.checks]} if lab.partial else {}),
        },
        phases=dict(progress.times),
        table=points.table(lab),
        ignored=(*variant.ignored, *tried.ignored),
        machines=tuple(tried.ends),
    )


def now() -> str:
    """Return the time as a result file has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True)
class _Tried:
    """What has come of trying a variant."""

    results: list[CheckResult]
    machine: Mapping[str, object] = field(default_factory=dict)
    """The description of one that was measured in, if there was one."""
    ends: Sequence[MachineEnd] = ()
    ignored: tuple[str, ...] = ()


def _try_answers(
    lab: Lab, variant: Variant, kernel: Kernel, _: int, seed: int, progress: Progress
) -> _Tried:
    with progress.phase("build"):
        built = build(lab, variant, kernel)
    (file,) = variant.files.values()
    outcome = answers.grade(lab, file, built, seed, progress)
    for result in outcome.results:
        _say(progress, result)
    ends = [MachineEnd(lost.name, lost.console, {}) for lost in outcome.lost]
    return _Tried(outcome.results, outcome.environment, ends, outcome.unknown)


def _try_code(
    lab: Lab, variant: Variant, kernel: Kernel, vcpus: int, seed: int, progress: Progress
) -> _Tried:
    with progress.phase("kernel"):
        debug_kernel = build_kernel(True, progress) if lab.needs_debug_kernel else None
    with progress.phase("references"):
        references = _references(lab, kernel)
    try:
        with progress.phase("submission"):
            built = build(lab, variant, kernel)
            debug = build(lab, variant, debug_kernel) if debug_kernel else None
    except (ModuleError, CompileError) as error:
        return _no_build(lab, error)
    return _Tried(*_measure(lab, built, debug, references, vcpus, seed, progress))


def _try_exactly(
    lab: Lab, variant: Variant, kernel: Kernel, vcpus: int, _: int, progress: Progress
) -> _Tried:
    with progress.phase("references"):
        references = _references(lab, kernel)
    try:
        with progress.phase("submission"):
            built = build(lab, variant, kernel)
    except (ModuleError, CompileError) as error:
        return _no_build(lab, error)
    return _Tried(exact_grade.measure(lab, built, references, vcpus, progress))


def _references(lab: Lab, kernel: Kernel) -> Mapping[str, Built]:
    return {
        "starter": build(lab, variants.starter(lab.folder), kernel),
        "solution": build(lab, variants.solution(lab.folder), kernel),
    }


def _no_build(lab: Lab, error: ModuleError | CompileError) -> _Tried:
    reason = f"does not compile: {_first_error(error.text)}"
    return _Tried(
        [
            judge.failed(check, "no-build", reason, next_step=error.text.strip()[:4000])
            for check in lab.checks
        ]
    )


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    # The compiler's, or else modpost's (an undefined symbol), or whatever comes first.
    for mark in (" error: ", "ERROR: ", ""):
        for line in lines:
            if line and mark in line:
                return line
    return "no message"


def _measure(
    lab: Lab,
    built: Built,
    debug: Built | None,
    references: Mapping[str, Built],
    vcpus: int,
    seed: int,
    progress: Progress,
) -> tuple[list[CheckResult], Mapping[str, object], list[MachineEnd]]:
    """Run every check; return the results in the lab's order, and the machine's description."""
    results: dict[str, CheckResult] = {}
    with ExitStack() as stack:
        # All at once: the references come up while the submission is already being tried.
        candidate = Candidate(built, vcpus, stack, progress)
        candidate.start()
        # The debug kernel takes as long as all the rest, so it runs beside it.
        beside = _OnDebugKernel(lab, debug, vcpus, seed, stack) if debug else None
        compared_with = References(references, vcpus, stack, progress)
        candidate.station()

        with progress.phase("correctness"):
            for check in lab.checks:
                if check.kind == "serve" and not check.debug:
                    progress.update(check.title)
                    results[check.id] = _serve(check, candidate, compared_with.doubt, seed)
                    _say(progress, results[check.id])
        compared_with.stations()
        with progress.phase("performance"):
            for check in lab.checks:
                if check.kind == "reduction" and not check.same_run:
                    progress.update(check.title)
                    same = [c for c in lab.checks if check.id in (c.id, c.same_run)]
                    for result in _reduction(check, same, candidate, compared_with, seed, progress):
                        results[result.id] = result
                        _say(progress, result)
        description = compared_with.stations()["solution"].machine.environment()
        changed = _changed_code(candidate, compared_with)
        candidate.close()
        ends = [*candidate.ends, *compared_with.ends]
        compared_with.close()
        if beside:
            with progress.phase("debug kernel"):
                for result in beside.results():
                    results[result.id] = result
                    _say(progress, result)
            ends += beside.ends
    if changed:
        reason = f"the kernel's code was changed while it ran: {changed}"
        results = {check.id: judge.failed(check, "fail", reason) for check in lab.checks}
    return [results[check.id] for check in lab.checks], description, ends


def _changed_code(candidate: Candidate, references: References) -> str:
    """Return in which functions the candidate's kernel is not the one that it booted, if any."""
    station = candidate.running
    if station is None:
        return ""
    place = kernel_text.layout(station.built.kernel)
    try:
        found = kernel_text.of(station.machine, place)
        known = [kernel_text.of(one.machine, place) for one in references.stations().values()]
    except MachineError:
        # One is lost just now; there is nothing more to be seen of it.
        return ""
    return kernel_text.changed(place, known, found)


def _say(progress: Progress, result: CheckResult) -> None:
    progress.say(f"  {result.verdict:8} {result.title}")


def _attempt(candidate: Candidate, what: Callable[[Station], None]) -> Attempt:
    """Let the candidate do `what`, and once more in a fresh machine if it loses this one.

    An emulator has faults of its own, which take a machine down once in many boots and not
    twice at the same place. So what counts is the second time; the first is reported.
    """
    lost: list[Failure] = []
    while True:
        station = candidate.station()
        if station is None:
            assert candidate.lost is not None
            reason = f"not run: every machine was lost, the last one: {candidate.lost.reason}"
            return Attempt(replace(candidate.lost, reason=reason), lost, ran=bool(lost))
        try:
            what(station)
        except ExperimentFailed as error:
            if error.failure.verdict not in ("panic", "hang"):
                return Attempt(error.failure, lost)
            candidate.abandon(error.failure)
            if lost:
                return Attempt(error.failure, lost)
            lost.append(error.failure)
        else:
            return Attempt(None, lost)


def _serve(check: Check, candidate: Candidate, doubt: Doubt, seed: int) -> CheckResult:
    seen: Mapping[str, tuple[float, ...]] = {}

    def run(station: Station) -> None:
        nonlocal seen
        with ExitStack() as stack:
            if check.debug:
                stack.enter_context(nothing_to_report(station))
            for _ in range(check.kills):
                with Session(station, check.server, check.load, seed) as session:
                    session.kill_under_load()
            with Session(station, check.server, check.load, seed) as session:
                seen = session.run(check.transactions).seen

    attempt = _attempt(candidate, run)
    failure = attempt.failure
    if failure is None:
        result = judge.served(check, check.transactions)
        return replace(result, reason=result.reason + attempt.note(), samples=seen)
    if attempt.ran and not failure.conclusive and (reason := doubt(run)):
        return judge.failed(
            check, "infra", f"{failure.reason}; but the solution fails here, too: {reason}"
        )
    return _judged(check, failure)


def _judged(check: Check, failure: Failure) -> CheckResult:
    result = judge.failed(check, failure.verdict, failure.reason)
    if failure.phase:
        result = replace(result, samples=failure.phase.seen)
    if failure.trace:
        step = f"{result.next_step}\n{failure.trace[:TRACE_CHARACTERS]}"
        result = replace(result, next_step=step)
    return result


def _reduction(
    check: Check,
    same_run: list[Check],
    candidate: Candidate,
    references: References,
    seed: int,
    progress: Progress,
) -> list[CheckResult]:
    """Measure starter, solution and submission in turn, and judge every check of this run."""
    compared = Compared({}, {})

    def run(station: Station) -> None:
        nonlocal compared
        stations = {**references.stations(), "submission": station}
        comparison = Comparison(stations, check.server, check.load, seed)
        compared = _measure_enough(comparison, check, same_run, progress)
        if failure := compared.failures.get("submission"):
            raise ExperimentFailed(failure)

    for last in (False, True):
        compared = Compared({}, {})
        attempt = _attempt(candidate, run)
        broken = {n: f for n, f in compared.failures.items() if n != "submission"}
        for name, failure in broken.items():
            if failure.verdict in ("panic", "hang"):
                references.replace(name)
        if not broken:
            break
        if last:
            name, failure = next(iter(broken.items()))
            reason = f"the {name} fails here: {failure.reason}"
            return [judge.failed(c, "infra", reason) for c in same_run]
    if attempt.failure is not None:
        return [_judged(c, attempt.failure) for c in same_run]
    known = [compared.costs["starter"], compared.costs["solution"]]
    if reason := answered_elsewhere(known, compared.costs["submission"]):
        return [judge.failed(c, "fail", reason) for c in same_run]
    results = [judge.reduction(c, *compared.samples(c.metric)) for c in same_run]
    # Once for the run, whatever is judged of it.
    results[0] = replace(results[0], costs=compared.means())
    return [replace(result, reason=result.reason + attempt.note()) for result in results]


def _undecided(check: Check, compared: Compared) -> bool:
    try:
        return judge.straddles(check, judge.share(*compared.samples(check.metric)))
    except judge.Indistinct:
        return True


def _measure_enough(
    comparison: Comparison, check: Check, same_run: list[Check], progress: Progress
) -> Compared:
    """Measure in rounds until no step lies within the spread, or often enough."""
    measure = comparison.measure_remote if check.metric == "remote" else comparison.measure
    compared = measure(ROUNDS)
    for _ in range(ROUNDS, MAX_ROUNDS, ROUNDS):
        if compared.failures:
            break
        if not any(_undecided(c, compared) for c in same_run):
            break
        progress.update(f"{check.title}: measuring again, a step is within the spread")
        compared = measure(ROUNDS)
    return compared
