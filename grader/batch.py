"""Grade a whole class: find, grade each distinct submission once, go on after any interruption.

Every grade is a process of its own, the same `invoke grade` that anybody runs: what crashes, hangs
or leaks there touches no other. Its result file appears whole or not at all, under a name that
lab, project and submission determine; whatever ends a run, the next one grades what has no result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import jsonschema
import psutil
from filelock import FileLock, Timeout

from grader import cache, report, results, roster, setup
from grader import variant as variants
from grader.errors import UsageError, UserError
from grader.lab import Lab
from grader.limits import scaled
from grader.progress import Progress, duration
from grader.roster import Student, Submission
from grader.station import build
from grader.submission import SubmissionError, shown
from grader.variant import Variant
from kernel.build import build_kernel

# Seconds for one grade, ten times what most take: a submission that hangs takes minutes.
GRADE_SECONDS = 900.0
# Seconds for a grade to end after Ctrl-C, its machines with it.
STOP_SECONDS = 15.0
# Two at a time on two cores took a third less time and gave the same points; but for two of four
# submissions the share of the instructions had an interval wider than the way from the starter to
# the solution, and the starter passed that check by its spread. One at a time: 0.44 at most.
CORES_PER_GRADE = 2
# Four machines of 512 MiB, one of them on the debug kernel, and the emulator's own; without the
# debug kernel, six took 2.5 GiB.
GRADE_MEMORY = 3 << 30


class Grader(Protocol):
    """What makes a grade."""

    def prepare(self, progress: Progress) -> None:
        """Make what all grades need; called once, if there is something to grade."""

    def command(self, folder: Path, result: Path) -> Sequence[str]:
        """Return the command that grades what `folder` holds and writes its result file."""


@dataclass(frozen=True)
class InvokeGrade:
    """`invoke grade`, as anybody runs it."""

    lab: Lab

    def prepare(self, progress: Progress) -> None:
        """Build the kernel and the references, before several grades wait for them."""
        with progress.phase("kernel"):
            kernel = build_kernel(progress=progress)
            if self.lab.needs_debug_kernel:
                build_kernel(True, progress)
        with progress.phase("references"):
            for reference in (variants.starter, variants.solution):
                build(self.lab, reference(self.lab.folder), kernel)

    def command(self, folder: Path, result: Path) -> Sequence[str]:
        """Return it for this interpreter and this checkout."""
        invoke = [sys.executable, "-m", "invoke", "--search-root", str(setup.ROOT), "grade"]
        return [*invoke, "--lab", self.lab.name, "--submission", str(folder), "--json", str(result)]


@dataclass(frozen=True)
class Outcome:
    """What became of a submission."""

    status: Literal["graded", "no grade", "unreadable"]
    """``no grade`` is not the submission's fault: grading again may give one."""
    reason: str = ""
    """Why there is no grade."""
    key: str = ""
    """Of the result: the same for the same files, lab and project; empty if unreadable."""
    document: Mapping[str, Any] | None = None
    """The result, as result.schema.json has it; there if it is ``graded``."""


@dataclass(frozen=True)
class Row:
    """What there is about one student."""

    student: Student
    submission: Submission
    variant: Variant | None
    """None if the submission is unreadable."""
    outcome: Outcome

    @property
    def name(self) -> str:
        """A file name for this student: no other one's, and of letters, digits and ``-``."""
        letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in self.student.name)
        digest = cache.digest(self.student.name, self.student.id, self.submission.place)
        return f"{letters[:40]}-{digest[:8]}"


@dataclass(frozen=True)
class GradedClass:
    """Everybody's row in the order of their names; ``results/`` and ``logs/`` are in `folder`."""

    lab: Lab
    folder: Path
    rows: tuple[Row, ...]
    unrecognised: tuple[str, ...]
    """What else the class's folder held, with reasons."""

    @property
    def judged(self) -> bool:
        """Whether everybody has a grade."""
        return all(row.outcome.status == "graded" for row in self.rows)


@dataclass
class _Job:
    """A grade to make: of one submission, or of several with the same files."""

    key: str
    variant: Variant
    students: list[str] = field(default_factory=list)
    problem: str = "it has not been graded"
    """Why there is no result file."""


def default_jobs() -> int:
    """Return how many grades at a time this machine has cores and memory for."""
    cores = len(os.sched_getaffinity(0)) // CORES_PER_GRADE
    memory = psutil.virtual_memory().available // GRADE_MEMORY
    return max(1, min(cores, memory))


def run(
    lab: Lab, folder: Path, out: Path, grader: Grader, jobs: int, progress: Progress
) -> GradedClass:
    """Grade what `folder` holds, `jobs` at a time, with results in `out`.

    Raises `UserError` if there is nothing to grade, if `out` cannot be written, or if another run
    is writing it; what is wrong with a submission is in its row.
    """
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}", "give a number from 1 on")
    found = roster.find(folder, leave_out=[out])
    for part in (out, out / "results", out / "logs"):
        results.make_folder(part)
        results.check_writable(part / "file", "--out")
    with _locked(out):
        _tidy(out)
        read: list[tuple[Submission, Variant | Outcome]] = []
        with progress.phase("reading"):
            for submission in found.submissions:
                progress.update(submission.place)
                read.append((submission, _read(lab, submission)))
        identity = _identity(lab)
        keys = {v.key: cache.digest(identity, v.key) for _, v in read if isinstance(v, Variant)}
        work: dict[str, _Job] = {}
        for submission, variant in read:
            names = ", ".join(student.name for student in submission.students)
            if isinstance(variant, Variant):
                key = keys[variant.key]
                work.setdefault(key, _Job(key, variant)).students.append(names)
            else:
                progress.say(f"  {_in_short(variant)}: {names}")
        try:
            outcomes = _grade_all(lab, list(work.values()), out, grader, jobs, progress)
        except KeyboardInterrupt:
            progress.say("the same command goes on from here")
            raise
    rows = [
        Row(student, submission, variant, outcomes[keys[variant.key]])
        if isinstance(variant, Variant)
        else Row(student, submission, None, variant)
        for submission, variant in read
        for student in submission.students
    ]
    rows.sort(key=lambda row: (row.student.name.casefold(), row.student.id, row.submission.place))
    return GradedClass(lab, out, tuple(rows), found.unrecognised)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another grade-all is writing {out}", "wait, or name another folder with --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _tidy(out: Path) -> None:
    """Remove what a run has left that was killed while it wrote a file."""
    for folder in (out, out / "results", out / "pages"):
        for partial in folder.glob(".*.*.*"):
            partial.unlink()


def _identity(lab: Lab) -> str:
    """Return what stands for the lab and for all that grades it."""
    commit = results.commit()
    # A commit tells what the files hold, unless they differ from it.
    exact = commit and not commit.endswith("+")
    parts = () if exact else ("grader", "images", "kernel", "labs")
    folders = [setup.ROOT / part for part in parts]
    return cache.digest(lab.name, lab.folder / "lab.toml", commit, *folders)


def _read(lab: Lab, submission: Submission) -> Variant | Outcome:
    if submission.path is None:
        return Outcome("unreadable", f"{submission.place} is listed, but not there")
    try:
        return variants.submission(lab.folder, roster.held(submission.path, lab.files))
    except SubmissionError as error:
        reason = f"{error.problem}; {error.todo}"
        # Students are told what they have handed in, not where it lies.
        return Outcome("unreadable", reason.replace(f"{shown(submission.path.parent)}/", ""))
    # Whatever it is, it must not keep the others from their grades.
    except Exception as error:
        return Outcome("no grade", f"the grader could not read it: {shown(repr(error))}")


def _outcome(lab: Lab, job: _Job, out: Path) -> Outcome:
    """Return what the result file says, or why there is none."""
    try:
        document = json.loads((out / "results" / f"{job.key}.json").read_text())
        document = results.checked(document, report.SCHEMA)
    except (OSError, ValueError, jsonschema.ValidationError):
        return Outcome("no grade", job.problem, job.key)
    if document["lab"] != lab.name:
        return Outcome("no grade", f"the result is of {shown(document['lab'])}", job.key)
    for check in document["checks"]:
        if check["verdict"] == "infra":
            reason = f"{check['id']} could not be judged: {shown(check['reason'])}"
            return Outcome("no grade", reason, job.key)
    return Outcome("graded", key=job.key, document=document)


def _in_short(outcome: Outcome) -> str:
    if outcome.document is None:
        return f"{outcome.status} ({outcome.reason})"
    return f"{outcome.document['score']:g} of {outcome.document['max_score']:g}"


# ----------------------------------------------------------------------------------- grading


def _grade_all(
    lab: Lab, work: Sequence[_Job], out: Path, grader: Grader, jobs: int, progress: Progress
) -> dict[str, Outcome]:
    """Make the grades that are not there yet; one that could not be made is tried once more."""
    outcomes = {job.key: _outcome(lab, job, out) for job in work}
    for again in (False, True):
        left = [job for job in work if outcomes[job.key].status != "graded"]
        if not left:
            break
        if again:
            progress.say(f"once more: {len(left)}")
        else:
            progress.say(f"{len(left)} to grade, {len(work) - len(left)} graded before")
            grader.prepare(progress)
        begin = time.monotonic()
        with progress.phase("grading"), closing(_each(left, out, grader, jobs)) as each:
            for done, job in enumerate(each, start=1):
                outcomes[job.key] = outcome = _outcome(lab, job, out)
                to_do = len(left) - done
                seconds = (time.monotonic() - begin) / done * to_do
                how_far = f"{done} of {len(left)}, about {duration(seconds)} left"
                progress.say(f"  {_in_short(outcome)}: {'; '.join(job.students)} ({how_far})")
                progress.update(how_far)
    return outcomes


def _each(
    work: Sequence[_Job], out: Path, grader: Grader, jobs: int
) -> Generator[_Job, None, None]:
    """Grade, and yield each job when it is done; closed before its end, it ends what runs."""
    processes = _Processes()
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(_grade_one, job, out, grader, processes): job for job in work}
        for future in as_completed(futures):
            futures[future].problem = future.result()
            yield futures[future]
    finally:
        processes.end()
        pool.shutdown(cancel_futures=True)


def _grade_one(job: _Job, out: Path, grader: Grader, processes: _Processes) -> str:
    """Run the grade; return why it has left no result file, if it has not."""
    (folder,) = {path.parent for path in job.variant.files.values()}
    result = out / "results" / f"{job.key}.json"
    log = out / "logs" / f"{job.key}.txt"
    try:
        result.unlink(missing_ok=True)
        status = processes.run(grader.command(folder, result), log)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except subprocess.TimeoutExpired as error:
        return f"the grade took longer than {error.timeout / 60:.0f} minutes"
    except OSError as error:
        return f"the grade could not be run: {error}"
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    return f"the grade ended with status {status}: {shown(said) or 'it said nothing'}"


class _Processes:
    """The grades that run now. Whatever becomes of this process, they end before or with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command to its end; return its status.

        Raises `OSError`, or `subprocess.TimeoutExpired` with nothing left of it.
        """
        with log.open("wb") as output, self._lock:
            if self._ended:
                raise InterruptedError("interrupted")
            process = subprocess.Popen(
                # Should this process be killed, the grade is; the sandbox sees to its machines.
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C comes here only.
                start_new_session=True,
                cwd=setup.ROOT,
            )
            self._running.add(process)
        try:
            return process.wait(scaled(GRADE_SECONDS))
        except subprocess.TimeoutExpired:
            _end([process])
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    def end(self) -> None:
        """End what runs, and let nothing start any more."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        _end(running)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt grades as Ctrl-C does, and kill what has not ended after a while."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        # The group's number is the leader's, and may be somebody else's once that is gone.
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
