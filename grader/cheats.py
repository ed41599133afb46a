"""Submissions that want points without the work, and what becomes of each.

They are data: ``labs/cheats/cheats.toml``, with the longer ones in folders beside it. `run` grades
them as students' submissions are graded, and compares with what the table says.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from grader import variant as variants
from grader.errors import UserError
from grader.grade import Grade, grade
from grader.lab import LABS, Lab, load_lab
from grader.probe import Symbols
from grader.progress import Progress
from grader.submission import SubmissionError
from grader.variant import Variant
from kernel.build import Kernel, build_kernel

FOLDER = LABS / "cheats"
TABLE = FOLDER / "cheats.toml"
REFUSED = "refused"
# From the worst to the best.
_VERDICTS = ("infra", "no-build", "panic", "hang", "fail", "pass")


class CheatError(UserError):
    """cheats.toml says something that cannot be."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{TABLE.relative_to(LABS.parent)}: {problem}", "correct the file")


@dataclass(frozen=True)
class Edit:
    """One place of the base that a cheat changes."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Cheat:
    """One row of cheats.toml."""

    id: str
    tries: str
    lab: str
    base: str
    verdict: str
    line: str
    points: float
    edits: tuple[Edit, ...] = ()
    prepend: Mapping[str, str] | None = None
    """With the keys ``file`` and ``text``."""
    extra: Mapping[str, str] | None = None
    archive: bool = False


@dataclass(frozen=True)
class Row:
    """What became of a cheat."""

    cheat: Cheat
    verdict: str
    points: float
    line: str
    """What the instructor reads."""

    @property
    def as_stated(self) -> bool:
        """Whether all of it is what the table says."""
        expected = (self.cheat.verdict, self.cheat.points)
        return (self.verdict, self.points) == expected and self.cheat.line in self.line


def read(path: Path = TABLE) -> list[Cheat]:
    """Return the rows of cheats.toml; raises `CheatError`."""
    try:
        rows = [_cheat(entry) for entry in tomllib.loads(path.read_text())["cheat"]]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise CheatError(f"missing or unknown key, or no TOML: {error}") from error
    if len({row.id for row in rows}) < len(rows):
        raise CheatError("two cheats have one id")
    return rows


def _cheat(entry: Mapping[str, Any]) -> Cheat:
    known = {field.name for field in fields(Cheat)}
    if unknown := set(entry) - known:
        raise CheatError(f"{entry.get('id')}: unknown keys {', '.join(sorted(unknown))}")
    edits = tuple(Edit(**edit) for edit in entry.get("edits", ()))
    cheat = Cheat(**{**entry, "edits": edits})
    if cheat.base not in ("solution", "starter"):
        raise CheatError(f"{cheat.id}: base is neither solution nor starter")
    return cheat


def write(cheat: Cheat, lab: Lab, kernel: Kernel, folder: Path) -> Path:
    """Write the cheat into `folder` as a student would hand it in; return what to grade."""
    base = (variants.solution if cheat.base == "solution" else variants.starter)(lab.folder)
    texts = {name: path.read_text() for name, path in base.files.items()}
    own = FOLDER / cheat.id
    if own.is_dir():
        texts |= {path.name: path.read_text() for path in own.iterdir()}
    for edit in cheat.edits:
        if texts[edit.file].count(edit.old) != 1:
            raise CheatError(f"{cheat.id}: {edit.old!r} is not in the {cheat.base} exactly once")
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    if cheat.prepend:
        file, text = cheat.prepend["file"], cheat.prepend["text"]
        texts[file] = f"{text}\n{texts[file]}"
    texts = {name: _addressed(text, kernel) for name, text in texts.items()}
    texts |= cheat.extra or {}
    if cheat.archive:
        path = folder / "submission.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
        return path
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def _addressed(text: str, kernel: Kernel) -> str:
    """Put in the addresses of the kernel's functions, which a student can look up as well."""

    def address(match: re.Match[str]) -> str:
        symbols = Symbols.of_kernel(kernel.vmlinux)
        (start,) = symbols.resolve([match[1]])
        return f"{start + int(match[2] or 0):#x}"

    return re.sub(r"\{address:(\w+)(?:\+(\d+))?\}", address, text)


def judge(cheat: Cheat, kernel: Kernel, progress: Progress) -> Row:
    """Grade one cheat. Raises `grader.grade.NoGrade` where the machine fails."""
    lab = load_lab(cheat.lab)
    with tempfile.TemporaryDirectory() as name:
        path = write(cheat, lab, kernel, Path(name))
        try:
            variant = variants.submission(lab.folder, path)
        except SubmissionError as error:
            return Row(cheat, REFUSED, 0, error.problem)
    return _row(cheat, variant, grade(lab, variant, seed=1, progress=progress))


def _row(cheat: Cheat, variant: Variant, graded: Grade) -> Row:
    verdict = min((result.verdict for result in graded.checks), key=_VERDICTS.index)
    reasons = dict.fromkeys(r.reason for r in graded.checks if r.reason)
    lines = [reason for reason in reasons if cheat.line in reason] or list(reasons)
    if variant.ignored:
        lines = [f"ignored: {', '.join(variant.ignored)}", *lines]
    # The one that the table names, or the first.
    line = next((text for text in lines if cheat.line in text), lines[0])
    return Row(cheat, verdict, graded.score, line)


def matching(lab: str, only: str) -> list[Cheat]:
    """Return the cheats of this lab whose ids match a regular expression (empty: all)."""
    found = [row for row in read() if lab in ("", row.lab) and re.search(only, row.id)]
    if not found:
        raise UserError("there is no such cheat", "see what there is: invoke prove --cheats --list")
    return found


def run(progress: Progress, only: Collection[str] = ()) -> list[Row]:
    """Grade every cheat (or only those with these ids); return what became of each."""
    chosen = [cheat for cheat in read() if not only or cheat.id in only]
    if unknown := set(only) - {cheat.id for cheat in chosen}:
        raise UserError(f"there is no cheat {', '.join(sorted(unknown))}", f"see {TABLE}")
    kernel = build_kernel(progress=progress)
    rows = []
    for number, cheat in enumerate(chosen, 1):
        row = judge(cheat, kernel, Progress(quiet=True))
        rows.append(row)
        state = "as stated" if row.as_stated else "NOT as stated"
        progress.say(f"{number}/{len(chosen)} {cheat.id}: {row.verdict}, {row.points:g}: {state}")
    return rows


def table(rows: Collection[Row]) -> Table:
    """Return the table of cheats, expected beside actual where they differ."""
    made = Table(box=box.SIMPLE_HEAD)
    for column in ("cheat", "what it tries", "verdict", "points", "what the instructor reads"):
        made.add_column(column, overflow="fold")
    for row in rows:
        wanted = row.cheat
        verdict = _differing(wanted.verdict, row.verdict)
        points = _differing(f"{wanted.points:g}", f"{row.points:g}")
        line = Text(row.line, "" if wanted.line in row.line else "red")
        made.add_row(Text(wanted.id), Text(wanted.tries), verdict, points, line)
    return made


def _differing(expected: str, actual: str) -> Text:
    if expected == actual:
        return Text(actual)
    return Text(f"{actual} (not {expected})", "red")
