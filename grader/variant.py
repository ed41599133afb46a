"""Variants: which file stands for each file that a student writes.

A student's file is kept once, solved, in the lab's folder. Marker comments, each alone on its
line, say what the student writes and what the starter has in its place::

    /* STUDENT: drain the ring in one crossing; return how many requests you took. */
    /* BEGIN SOLUTION */
    solved lines
    /* ELSE STARTER */
    //| return 0; /* TODO */
    /* END SOLUTION */

- The solved file compiles as it stands: the starter's lines are ``//|`` comments, and may hold
  any comment of their own. ``//|`` and one blank after it go away; blanks before it stay.
- The starter has the ``//|`` lines in place of the whole region. Without an ``ELSE STARTER`` part
  it has nothing there.
- The STUDENT comment is an ordinary one: it stays, and tells the task in one line. Everything
  between BEGIN SOLUTION and ELSE STARTER (or END SOLUTION) is what a student must not see.
- Regions do not nest. A marker out of place, a misspelt one, a ``//|`` outside an ELSE part,
  anything else inside one, or a ``//|`` line that ends with a backslash (it would swallow the
  next) is a `MarkerError` that names the line.

A TOML file says the same in its own comments: ``# BEGIN SOLUTION``, ``# ELSE STARTER`` with ``#|``
lines, ``# END SOLUTION``.

In a handout (`grader.handout`) a lab's folder has the student's own files, and beside them, in the
folder `GIVEN`, what the solved files are no longer there for: ``starter/`` and ``solution/``. The
latter holds C files or, for those who must not see them, objects (`grader.given`).
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from grader import cache, given
from grader.errors import UserError
from grader.submission import read

GIVEN = "given"
"""The folder of a handout's lab that the student's own files do not lie in."""

_MARKERS = {"BEGIN SOLUTION": "begin", "ELSE STARTER": "else", "END SOLUTION": "end"}
# What a slip of the pen makes of a marker; the exact ones have been looked for before.
_SLIP = (
    r"(?i:\b(begin|else|end)[\s_-]*(solution|starter)\b"
    r"|\b(solution|starter)[\s_-]*(begin|else|end)\b)"
)


@dataclass(frozen=True)
class _Syntax:
    """How the comments of a language carry the markers."""

    before: str
    """What stands before a marker's words, with a blank."""
    after: str
    any_comment: str
    """A pattern: what any comment begins with."""
    prefix: str
    """What a starter's line begins with."""

    @functools.cached_property
    def marker(self) -> re.Pattern[str]:
        before, after = re.escape(self.before), re.escape(self.after)
        return re.compile(rf"\s*{before}({'|'.join(_MARKERS)}){after}\s*")

    @functools.cached_property
    def like_a_marker(self) -> re.Pattern[str]:
        return re.compile(rf"{self.any_comment}.*{_SLIP}")

    @functools.cached_property
    def starter_line(self) -> re.Pattern[str]:
        return re.compile(rf"(\s*){re.escape(self.prefix)}(?: )?(.*)")

    @property
    def order(self) -> str:
        """How to put it right."""
        begin, other, end = (f"{self.before}{words}{self.after}" for words in _MARKERS)
        return (
            f"put each marker alone on its line, in the order {begin}, "
            f"{other} (with {self.prefix} lines), {end}"
        )


_C = _Syntax("/* ", " */", "/[/*]", "//|")
_TOML = _Syntax("# ", "", "#", "#|")


def _syntax_of(name: str) -> _Syntax:
    return _TOML if name.endswith(".toml") else _C


class MarkerError(UserError):
    """The markers of a solved file are wrong at one line."""

    def __init__(self, name: str, line: int, problem: str) -> None:
        super().__init__(
            f"{name}:{line}: {problem}",
            _syntax_of(name).order,
        )
        self.name = name
        self.line = line


class _Part(Enum):
    OUTSIDE = "outside a region"
    SOLUTION = "inside a solution"
    STARTER = "inside an ELSE STARTER part"


@dataclass(frozen=True)
class _Split:
    starter: str
    solved: str
    regions: list[str]


def _split(text: str, name: str) -> _Split:
    """Tell apart what the starter has and what the solution has."""
    syntax = _syntax_of(name)
    starter: list[str] = []
    solved: list[str] = []
    regions: list[list[str]] = []
    part = _Part.OUTSIDE
    begun = 0
    # Not splitlines(): that splits at form feeds as well, and the text must come back unchanged.
    for number, line in enumerate(text.split("\n"), start=1):
        marker = syntax.marker.fullmatch(line)
        if marker is not None:
            match _MARKERS[marker[1]], part:
                case "begin", _Part.OUTSIDE:
                    part, begun = _Part.SOLUTION, number
                    regions.append([])
                case "else", _Part.SOLUTION:
                    part = _Part.STARTER
                case "end", _Part.SOLUTION | _Part.STARTER:
                    part = _Part.OUTSIDE
                case _:
                    raise MarkerError(name, number, f"{marker[1]} {part.value}")
            continue
        if syntax.like_a_marker.search(line):
            raise MarkerError(name, number, f"not quite a marker: {line.strip()}")
        if part is _Part.STARTER:
            starter.append(_starter_line(line, name, number, syntax))
        elif syntax.starter_line.fullmatch(line):
            raise MarkerError(name, number, f"a {syntax.prefix} line {part.value}")
        else:
            (regions[-1] if part is _Part.SOLUTION else starter).append(line)
            solved.append(line)
    if part is not _Part.OUTSIDE:
        raise MarkerError(name, begun, "BEGIN SOLUTION without END SOLUTION")
    return _Split("\n".join(starter), "\n".join(solved), ["\n".join(lines) for lines in regions])


def _starter_line(line: str, name: str, number: int, syntax: _Syntax) -> str:
    match = syntax.starter_line.fullmatch(line)
    if match is None:
        raise MarkerError(
            name, number, f"a line without {syntax.prefix} inside an ELSE STARTER part"
        )
    if line.rstrip().endswith("\\"):
        raise MarkerError(name, number, f"a {syntax.prefix} line that ends with a backslash")
    return match[1] + match[2] if match[2] else ""


def starter_text(solved: str, name: str = "text") -> str:
    """Return what a student starts from; a text without markers comes back unchanged.

    `name` tells the language; raises `MarkerError`, which calls the text by it.
    """
    return _split(solved, name).starter


def solved_text(solved: str, name: str = "text") -> str:
    """Return the solved text without the markers and without the starter's lines."""
    return _split(solved, name).solved


def solution_regions(text: str, name: str = "text") -> list[str]:
    """Return the solved lines of each region, for the check that none of them leaks."""
    return _split(text, name).regions


@dataclass(frozen=True)
class Variant:
    """A choice of files: for each of the lab's names the file that stands for it.

    `key` depends on names and contents only: two variants with the same files share it, and all
    that is built from them. `ignored` lists what else a submission held, for its author to see.
    """

    name: str
    files: Mapping[str, Path]
    key: str
    ignored: tuple[str, ...] = ()


def lab_files(lab: Path) -> tuple[str, ...]:
    """Return the names of the files that the lab's students write (`files` in its lab.toml)."""
    table = lab / "lab.toml"
    try:
        names = tomllib.loads(table.read_text(encoding="utf-8")).get("files")
    except FileNotFoundError:
        raise UserError(f"there is no lab {lab.name}", f"use {_known_labs(lab.parent)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: {error}", "put it right; it is a TOML file") from None
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in names)
        or len(set(names)) < len(names)
    ):
        raise UserError(
            f"{table}: files is {names!r}", 'list the lab\'s own files, as in   files = ["a.c"]'
        )
    return tuple(names)


def _known_labs(folder: Path) -> str:
    known = sorted(path.parent.name for path in folder.glob("*/lab.toml"))
    return "one of " + ", ".join(known) if known else "a checkout that holds labs/"


def solution(lab: Path) -> Variant:
    """Return the lab solved: as it is kept, or what a handout has in place of it."""
    return _variant("solution", {name: solved_file(lab, name) for name in lab_files(lab)})


def solved_file(lab: Path, name: str) -> Path:
    """Return what stands for a lab's file, solved: a C file, or a folder of given objects."""
    if not (lab / GIVEN).is_dir():
        return _existing(lab / name)
    folder = lab / GIVEN / "solution"
    objects = folder / given.folder_name(name)
    return objects if objects.is_dir() else _existing(folder / name)


def lab_of(labs: Path, name: str) -> Path:
    """Return the folder of the lab, of those in `labs`, that a file of this name belongs to."""
    for lab in sorted(labs.iterdir()):
        folder = lab / GIVEN / "solution"
        places = (lab / name, folder / name, folder / given.folder_name(name))
        if any(path.exists() for path in places):
            return lab
    raise UserError(f"no lab in {labs} has {name}", "restore it: git checkout -- labs")


def starter(lab: Path) -> Variant:
    """Return the lab as students get it: generated from the solved files, or a handout's own."""
    names = lab_files(lab)
    if (lab / GIVEN).is_dir():
        _check_handed_out(lab)
        return _variant("starter", {name: _existing(starter_file(lab, name)) for name in names})
    texts = {
        name: starter_text(_existing(lab / name).read_text(encoding="utf-8"), f"{lab.name}/{name}")
        for name in names
    }
    return _stored("starter", {name: text.encode() for name, text in texts.items()})


def starter_file(lab: Path, name: str) -> Path:
    """Return where a handout keeps the starter of a file that is the student's from then on."""
    return lab / GIVEN / "starter" / name


def mine(lab: Path) -> Variant:
    """Return the files as they lie in the lab's folder: in a handout the student's work."""
    _check_handed_out(lab)
    return _variant("mine", {name: _existing(lab / name) for name in lab_files(lab)})


def usual(lab: Path) -> str:
    """Return the name of the variant that is meant when none is named."""
    return "mine" if (lab / GIVEN).is_dir() else "solution"


def _check_handed_out(lab: Path) -> None:
    if (lab / GIVEN).is_dir() and not (lab / GIVEN / "starter").is_dir():
        there = ", ".join(sorted(path.parts[-3] for path in lab.parent.glob("*/given/starter")))
        raise UserError(
            f"{lab.name} is here only as other labs need it, not to be worked on",
            f"name one of the labs of this handout: --lab {there}",
        )


def submission(lab: Path, path: Path) -> Variant:
    """Return what a student handed in: a folder, .zip or .tar.gz with the lab's files.

    The files are copied, so what is graded cannot change under way. Raises
    `grader.submission.SubmissionError` if anything is wrong with it.
    """
    held = read(path, lab_files(lab))
    return _stored("submission", held.files, held.ignored)


def write_starter(lab: Path, folder: Path) -> list[Path]:
    """Write the starter's files into `folder`, which is made; never over an existing file."""
    files = starter(lab).files
    targets = {name: folder / name for name in files}
    if existing := [str(path) for path in targets.values() if path.exists() or path.is_symlink()]:
        raise UserError(
            f"there already: {', '.join(existing)}", "name another folder, or move them away"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in targets.items():
            with target.open("xb") as file:
                file.write(files[name].read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}", "name a folder that you may write to"
        ) from None
    return list(targets.values())


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} is not there, though lab.toml lists it", "restore it: git checkout -- labs"
        )
    return path


def _variant(name: str, files: Mapping[str, Path], ignored: Sequence[str] = ()) -> Variant:
    parts = [part for file in sorted(files) for part in (file, files[file])]
    return Variant(name, MappingProxyType(dict(files)), cache.digest(*parts), tuple(ignored))


def _stored(kind: str, contents: Mapping[str, bytes], ignored: Sequence[str] = ()) -> Variant:
    def fill(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    parts = [part for name in sorted(contents) for part in (name, contents[name])]
    folder = cache.entry("variant", cache.digest(*parts), fill)
    return _variant(kind, {name: folder / name for name in contents}, ignored)
