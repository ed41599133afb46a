"""Whose submissions lie in a folder, and where: three layouts, told apart entry by entry.

- **Gradescope**, what "Download Submissions" gives: ``submission_metadata.yml`` beside one folder
  for each submission, named by the file's keys (``submission_<id>``); under each key a list
  ``:submitters`` of ``:name``, ``:sid`` and ``:email``, several for a group. Gradescope has
  unpacked .zip files by then, nothing else. It documents the export nowhere; the readers agree on
  it, for example `GradescopeParser` in otter/metadata.py of github.com/ucbds-infra/otter-grader.
- **Moodle**, what "Download all submissions" gives: a folder
  ``Full Name_<id>_assignsubmission_file`` for each student, or ``Group_<id>_...``; older versions
  end it with one more ``_``, and the default group has no id. Moodle replaces ``_`` in names by
  blanks. From `get_student_prefix` and `load_submissionplugin_filelist` in
  mod/assign/classes/downloader.php of github.com/moodle/moodle. Without the preference "Download
  submissions in folders" it writes files instead; archives among them are taken, loose files are
  not.
- **Plain**: every folder and every archive is a submission, and its name the student's.

Names come from students, or from archives that students made: they are shown escaped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from grader.errors import UserError
from grader.submission import MAX_ENTRIES, SubmissionError, shown

METADATA = "submission_metadata.yml"
# That of a class of 500 with the output of every test is some 10 MiB.
MAX_METADATA = 64 << 20
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.xz")
_MOODLE = re.compile(
    r"(?P<name>.*?)(?:_(?P<id>\d+))?_assignsubmission_(?P<plugin>[a-z]+)(?:_.*)?",
    re.DOTALL,
)


class RosterError(UserError):
    """A folder holds no submissions that could be recognised."""


@dataclass(frozen=True)
class Student:
    """Who handed something in, escaped for printing; `id` is empty where the layout has none."""

    name: str
    id: str = ""


@dataclass(frozen=True)
class Submission:
    """One piece of work: of a student, or of a group."""

    place: str
    """Its entry in the folder, escaped for printing."""
    students: tuple[Student, ...]
    path: Path | None
    """Folder or archive; None if it is listed, and not there."""


@dataclass(frozen=True)
class Roster:
    """All submissions of a folder in the order of their students' names, and what else is there."""

    submissions: tuple[Submission, ...]
    unrecognised: tuple[str, ...]
    """Each entry that is no submission, with the reason."""


def find(folder: Path, leave_out: Sequence[Path] = ()) -> Roster:
    """Return the submissions in `folder`; what is in `leave_out` is passed by.

    Raises `RosterError` if there are none.
    """
    if not folder.is_dir():
        raise RosterError(f"there is no folder {shown(folder)}", "name the folder of submissions")
    unrecognised: list[str] = []
    try:
        entries = _entries(folder)
        # The export is an archive that holds one folder, and that is what it unpacks to.
        if len(entries) == 1 and (entries[0] / METADATA).is_file():
            folder = entries[0]
            entries = _entries(folder)
        found = list(_gradescope(folder, unrecognised))
        listed = {submission.place for submission in found}
        passed_by = [path.resolve() for path in leave_out]
        for path in entries:
            place = shown(path.name)
            if path.resolve() not in passed_by and place not in listed and path.name != METADATA:
                recognised = _entry(path)
                if isinstance(recognised, str):
                    unrecognised.append(f"{place}: {recognised}")
                else:
                    found.append(recognised)
    except OSError as error:
        raise RosterError(
            f"cannot read {shown(folder)}: {error.strerror or error}", "make it readable"
        ) from None
    if not found:
        there = f" ({'; '.join(unrecognised[:3])})" if unrecognised else ""
        raise RosterError(
            f"no submission in {shown(folder)}{there}",
            f"name a folder that holds a folder or an archive ({', '.join(ARCHIVES)}) for each "
            "student, or an unpacked export of Gradescope or Moodle",
        )
    found.sort(key=lambda submission: (submission.students[0].name.casefold(), submission.place))
    return Roster(tuple(found), tuple(unrecognised))


def _entries(folder: Path) -> list[Path]:
    # Hidden ones, and __MACOSX beside them, belong to tools.
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))


def _gradescope(folder: Path, unrecognised: list[str]) -> Iterator[Submission]:
    """Yield what the metadata lists; if it cannot be read, its problem is what is unrecognised."""
    if not (folder / METADATA).is_file():
        return
    try:
        table = _metadata(folder / METADATA)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        unrecognised.append(f"{METADATA}: {shown(str(error))}; students are named by their folders")
        return
    for place, entry in table.items():
        submitters = entry.get(":submitters") if isinstance(entry, Mapping) else None
        students = [
            Student(shown(name), shown(person.get(":sid") or person.get(":email") or ""))
            for person in (submitters if isinstance(submitters, list) else ())
            if isinstance(person, Mapping) and isinstance(name := person.get(":name"), str) and name
        ]
        path = folder / place
        # A key that is a path leads anywhere.
        there = Path(place).name == place and path.exists()
        yield Submission(
            shown(place), tuple(students) or (Student(shown(place)),), path if there else None
        )


def _metadata(path: Path) -> Mapping[str, object]:
    if path.stat().st_size > MAX_METADATA:
        raise ValueError(f"larger than {MAX_METADATA >> 20} MiB")
    # All scalars as text: an id keeps its leading zeros, and no tag makes an object.
    with path.open("rb") as file:
        table = yaml.load(file, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ValueError("not a table of submissions")
    return table


def _entry(path: Path) -> Submission | str:
    """Return an entry as a submission, or why it is none."""
    packed = path.name.endswith(ARCHIVES) and path.is_file()
    match = _MOODLE.fullmatch(path.name)
    if match is not None and match["plugin"] != "file":
        return f"Moodle's {match['plugin']}, not files"
    if match is not None and (packed or path.is_dir()):
        student = Student(shown(match["name"]), match["id"] or "")
    elif match is not None:
        return "a loose file; download from Moodle with folders"
    elif packed:
        student = Student(shown(_stem(path.name)))
    elif path.is_dir():
        student = Student(shown(path.name))
    else:
        return "neither a folder nor an archive"
    return Submission(shown(path.name), (student,), path)


def _stem(name: str) -> str:
    return next(name.removesuffix(ending) for ending in ARCHIVES if name.endswith(ending))


def held(path: Path, wanted: Sequence[str]) -> Path:
    """Return what of a submission to read: the one archive in a folder without loose files.

    Raises `SubmissionError` if a folder holds several archives and none of the wanted files.
    """
    if not path.is_dir():
        return path
    archives: list[Path] = []
    entries = 0
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        if any(name in wanted for name in files):
            return path
        # A link leads to what may be somebody else's.
        archives += [
            Path(folder, name)
            for name in files
            if name.endswith(ARCHIVES) and not Path(folder, name).is_symlink()
        ]
        entries += len(folders) + len(files)
        # Too much to be a submission; its reader says so.
        if entries > MAX_ENTRIES:
            return path
    if len(archives) > 1:
        listed = ", ".join(shown(p.relative_to(path)) for p in sorted(archives)[:5])
        raise SubmissionError(
            f"{shown(path)} holds several archives: {listed}", "which one counts? remove the others"
        )
    return archives[0] if archives else path
