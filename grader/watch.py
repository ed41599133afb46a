"""`invoke grade --watch`: grade again when a file is saved, and say what that has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from grader.errors import UserError
from grader.grade import Grade
from grader.lab import Lab

POLL_SECONDS = 0.3

Contents = Mapping[Path, bytes | None]
"""What the files hold; None: not there just now, as while an editor puts a new one in its place."""


def watched(lab: Lab, submission: Path | None) -> tuple[Path, ...]:
    """Return the files whose change is a reason to grade again: an archive is one file."""
    if submission and not submission.is_dir():
        return (submission,)
    return tuple((submission or lab.folder) / name for name in lab.files)


def contents(paths: Iterable[Path]) -> Contents:
    """Read the files."""
    return {path: _read(path) for path in paths}


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def until_saved(known: Contents) -> Contents:
    """Wait until the files are all there, are not what is `known`, and rest; return what they hold.

    They are read, not listened to: that works on every file system, and for whatever way an editor
    has of saving.
    """
    before = known
    while True:
        time.sleep(POLL_SECONDS)
        now = contents(known)
        if now == before and now != known and None not in now.values():
            return now
        before = now


def changes(before: Grade, after: Grade) -> Iterator[str]:
    """Yield a line for each check with another verdict or other points, and one for the score."""
    old = {result.id: result for result in before.checks}
    for new in after.checks:
        was = old[new.id]
        if (was.verdict, was.points) != (new.verdict, new.points):
            verdict = (
                was.verdict if was.verdict == new.verdict else f"{was.verdict} -> {new.verdict}"
            )
            yield f"{new.points - was.points:+g}  {new.id}: {verdict} ({new.title})"
    if before.score == after.score:
        yield f"score: {after.score:g} of {after.max_score:g}, as before"
    else:
        yield f"score: {before.score:g} -> {after.score:g} of {after.max_score:g}"


def grade_on_save(
    paths: Collection[Path], grade: Callable[[], Grade], say: Callable[[str], None]
) -> None:
    """Grade now and after each change of the files, and say what it changed, until Ctrl-C.

    What cannot be graded, half a file say, is said, and the next change waited for. What is saved
    while a grade runs is graded after it.
    """
    before: Grade | None = None
    names = ", ".join(path.name for path in paths)
    with suppress(KeyboardInterrupt):
        while True:
            known = contents(paths)
            try:
                after = grade()
            except UserError as error:
                say(error.report())
            else:
                # What this machine could not judge is nothing to compare with.
                if after.judged:
                    for line in changes(before, after) if before else ():
                        say(line)
                    before = after
            say(f"watching {names}; Ctrl-C ends")
            until_saved(known)
