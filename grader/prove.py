"""Prove that each lab's points mean something: solved, starter, and every mutant.

A mutant is the solution with one mistake, as a student could make it: a patch in the lab's
``mutants`` folder whose first lines say what is wrong and which checks it must lose::

    What: the owner is woken for every event
    Loses: wakeups-long
    May lose: instructions-long

    --- a/mp_batch.c
    ...

It must lose those checks and no others. ``May lose`` is for what hangs on timing, a race that
strikes or does not. A line ``Race: yes`` marks races and mistakes about lifetimes.
"""

from __future__ import annotations

import random
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grader import variant as variants
from grader.errors import UserError
from grader.grade import Grade, grade
from grader.lab import Lab
from grader.progress import Progress
from grader.variant import Variant

ALL = "all"


class MutantError(UserError):
    """A mutant's file is not in order."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}", "see the head of grader/prove.py")


@dataclass(frozen=True)
class Mutant:
    """One mistake, and the ids of the checks that it must lose."""

    name: str
    what: str
    loses: frozenset[str]
    may_lose: frozenset[str]
    race: bool
    patch: Path


@dataclass(frozen=True)
class Case:
    """A variant, and what must come of it: checks lost, and points where they are known."""

    name: str
    what: str
    variant: Variant
    loses: frozenset[str] = frozenset()
    may_lose: frozenset[str] = frozenset()
    points: float | None = None


@dataclass(frozen=True)
class Row:
    """What a variant of a lab had to lose, and what it lost."""

    lab: str
    case: Case
    lost: frozenset[str]
    unjudged: frozenset[str]
    score: float
    max_score: float

    @property
    def holds(self) -> bool:
        """Whether exactly the expected checks were lost, and the points are the expected ones."""
        case = self.case
        points = case.points is None or case.points == self.score
        lost = case.loses <= self.lost <= case.loses | case.may_lose
        return points and lost and not self.unjudged


def mutants(lab: Lab) -> list[Mutant]:
    """Return the lab's mutants by name; raises `MutantError`."""
    return [_read(path, lab) for path in sorted((lab.folder / "mutants").glob("*.patch"))]


def _read(path: Path, lab: Lab) -> Mutant:
    head, separator, _ = path.read_text(encoding="utf-8").partition("\n--- ")
    if not separator:
        raise MutantError(path, "there is no patch in it")
    fields = dict(re.findall(r"^(What|Loses|May lose|Race): (.*)$", head, re.M))
    if not fields.get("What") or not fields.get("Loses"):
        raise MutantError(path, "the lines What: and Loses: are missing")
    return Mutant(
        name=path.stem,
        what=fields["What"],
        loses=_checks(fields["Loses"], path, lab),
        may_lose=_checks(fields.get("May lose", ""), path, lab),
        race=fields.get("Race") == "yes",
        patch=path,
    )


def _checks(text: str, path: Path, lab: Lab) -> frozenset[str]:
    known = {check.id for check in lab.checks}
    named = frozenset(re.split(r",\s*", text)) if text else frozenset()
    if named == {ALL}:
        return frozenset(known)
    if unknown := named - known:
        raise MutantError(path, f"{lab.name} has no check {', '.join(sorted(unknown))}")
    return named


def variant_of(lab: Lab, mutant: Mutant) -> Variant:
    """Return the solution with the mutant's patch applied; raises `MutantError`."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name, file in variants.solution(lab.folder).files.items():
            (folder / name).write_bytes(file.read_bytes())
        done = subprocess.run(
            ["patch", "-p1", "-s", "--no-backup-if-mismatch", "-i", str(mutant.patch)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise MutantError(mutant.patch, f"does not apply: {done.stdout.strip()}")
        return variants.submission(lab.folder, folder)


def cases(lab: Lab) -> Iterator[Case]:
    """Yield everything of the lab that is to be graded."""
    everything = frozenset(check.id for check in lab.checks)
    folder = lab.folder
    yield Case("solution", "the lab, solved", variants.solution(folder), points=lab.max_score)
    # It may do right what it likes, and must get no point.
    yield Case("starter", "as handed out", variants.starter(folder), may_lose=everything, points=0)
    for mutant in mutants(lab):
        yield Case(mutant.name, mutant.what, variant_of(lab, mutant), mutant.loses, mutant.may_lose)


def prove(
    labs: Sequence[Lab], only: str = "", seed: int = 1, progress: Progress | None = None
) -> list[Row]:
    """Grade every case of these labs whose name matches `only`, a regular expression."""
    progress = progress or Progress(quiet=True)
    rows = []
    for lab in labs:
        for case in cases(lab):
            if re.search(only, case.name):
                progress.update(f"{lab.name} {case.name}")
                graded = grade(lab, case.variant, seed=seed, progress=Progress(quiet=True))
                row = judged(graded, case)
                progress.say(
                    f"{'ok ' if row.holds else 'NOT'} {lab.name} {case.name}: {_seen(row)}"
                )
                rows.append(row)
    return rows


def judged(graded: Grade, case: Case) -> Row:
    """Compare a grade with what it had to be. A check is lost when its verdict is not pass."""
    # A mutant that does not compile proves nothing.
    unjudged = frozenset(r.id for r in graded.checks if r.verdict in ("infra", "no-build"))
    lost = frozenset(result.id for result in graded.checks if result.verdict != "pass") - unjudged
    return Row(graded.lab, case, lost, unjudged, graded.score, graded.max_score)


def sample(lab: Lab, count: int, seed: int | str) -> list[Mutant]:
    """Return `count` of the lab's mutants; another seed takes others, and in the end all."""
    names = mutants(lab)
    return random.Random(seed).sample(names, min(count, len(names)))


def never_lost(lab: Lab) -> list[str]:
    """Return the checks that no mutant of the lab must lose."""
    lost = frozenset[str]().union(*(mutant.loses for mutant in mutants(lab)))
    return [check.id for check in lab.checks if check.id not in lost]


def _seen(row: Row) -> str:
    seen = f"{row.score:g} of {row.max_score:g}, lost {_names(row.lost)}"
    if row.unjudged:
        seen += f"; not judged: {_names(row.unjudged)}"
    return seen


def _names(ids: frozenset[str]) -> str:
    return ", ".join(sorted(ids)) or "nothing"


def report(rows: Sequence[Row], console: Console) -> None:
    """Print the table of expected and actual losses."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("lab", "variant", "must lose", "lost", "points", ""):
        table.add_column(column)
    for row in rows:
        case = row.case
        expected = _names(case.loses)
        if perhaps := case.may_lose - case.loses:
            expected += f" (and perhaps {_names(perhaps)})"
        table.add_row(
            row.lab,
            Text(f"{case.name}\n{case.what}"),
            expected,
            _names(row.lost),
            f"{row.score:g}/{row.max_score:g}",
            Text("ok", "green") if row.holds else Text("NOT", "red"),
        )
    console.print(table)
