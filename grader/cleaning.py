"""Delete what the project has put on the machine."""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from grader import cache, setup
from grader.doctor import disk_usage
from grader.errors import UserError

DOOMED = ".deleting-"


def run(everything: bool = False, yes: bool = False) -> None:
    """Delete the cache, and with `everything` also ``.venv``; ask first unless `yes`.

    Says how much that freed. Raises `UserError` if a run is building something just now, or if
    there is nobody to ask.
    """
    folders = [cache.root()]
    if everything:
        folders.append(setup.ROOT / ".venv")
    sizes = {folder: disk_usage(folder) for folder in folders if folder.is_dir()}
    for folder, size in sizes.items():
        print(f"{folder}: {decimal(size)}")
    if not yes and not _agreed():
        print("nothing was deleted")
        return
    _refuse_if_in_use()
    for folder in sizes:
        _delete(folder)
    print(f"freed {decimal(sum(sizes.values()))}")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is nobody to ask", "add --yes to delete without being asked")
    print("delete? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _refuse_if_in_use() -> None:
    for path in sorted((cache.root() / "locks").glob("*.lock")):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            raise UserError(
                f"another run is at work in the cache ({path.stem})", "wait until it has ended"
            ) from None


def _delete(folder: Path) -> None:
    """Delete a folder so that, cut short anywhere, no part of it passes for the whole."""
    for path in folder.iterdir():
        if not path.name.startswith(DOOMED):
            path.rename(folder / f"{DOOMED}{uuid.uuid4().hex}")
    shutil.rmtree(folder)
