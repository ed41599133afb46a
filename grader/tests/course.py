"""A class for tests: what students hand in, and a grader that does as they ask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from grader import batch, checks, report, setup
from grader.batch import GradedClass
from grader.grade import Grade
from grader.lab import load_lab
from grader.progress import Progress
from grader.tests.results import graded

LAB = load_lab("1-batching")
FAKE = Path(__file__).with_name("fake_grade.py")

DRIVER = """
import signal
import sys
from pathlib import Path
from grader import batch
from grader.lab import load_lab
from grader.progress import Progress
from grader.tests.course import DoesAsAsked

# Ignored in what a shell starts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
source, out, *command = sys.argv[1:]
batch.run(
    load_lab("1-batching"), Path(source), Path(out), DoesAsAsked(command), 2, Progress()
)
"""


@dataclass(frozen=True)
class DoesAsAsked:
    """The grader."""

    start: Sequence[str]

    def prepare(self, progress: Progress) -> None:
        progress.say("nothing to prepare")

    def command(self, folder: Path, result: Path) -> Sequence[str]:
        return [*self.start, str(folder), str(result)]


class Course:
    """A class's folder, and a grader that does what each submission asks for."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "handed in"
        self.source.mkdir()
        self.out = folder / "results"
        self.calls = folder / "calls.txt"
        solved = folder / "solved.json"
        report.write_json(_solved(), solved)
        self.grader = DoesAsAsked([sys.executable, str(FAKE), str(solved), str(self.calls)])

    def hand_in(self, name: str, word: str, *, more: str = "") -> None:
        """Add a student's folder with what the grader is to do."""
        made = self.source / name
        made.mkdir()
        (made / "mp_batch.c").write_text(f"// grade: {word}\nint a;\n{more}")
        (made / "mp_flush.c").write_text("int b;\n")

    def grade(self, jobs: int = 2, out: Path | None = None) -> GradedClass:
        """Grade everything in this process."""
        quiet = Progress(quiet=True)
        return batch.run(LAB, self.source, out or self.out, self.grader, jobs, quiet)

    def words(self) -> list[str]:
        """What has been graded so far, in order."""
        return [line.split()[0] for line in self.calls.read_text().splitlines()]

    def running(self) -> list[psutil.Process]:
        """The graders that wait."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        pids = [int(line.split()[1]) for line in lines if line.startswith("wait")]
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def driver(self) -> subprocess.Popen[bytes]:
        """Start grading in another process."""
        arguments = [str(self.source), str(self.out), *self.grader.start]
        command = [sys.executable, "-c", DRIVER, *arguments]
        return subprocess.Popen(command, cwd=setup.ROOT, stderr=subprocess.DEVNULL)


def _solved() -> Grade:
    results = [
        checks.served(check, 1)
        if check.kind == "serve"
        else checks.reduction(check, [4.0, 4.1], [0.1, 0.11], [0.1, 0.11])
        for check in LAB.checks
    ]
    return graded(LAB, results)


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    """A class with a cache of its own, and nothing handed in yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Course(tmp_path)
