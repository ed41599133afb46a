"""Result files: asked for before the work, written whole after it, and as their schema says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema

from grader import cache
from grader.errors import UserError


def check_writable(path: Path, option: str) -> None:
    """Raise `UserError` if a result could not be written to `path` after minutes of work.

    `option` is the one that names another file.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} for {path.name}", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK) or path.is_dir():
        raise UserError(f"{path} cannot be written", f"name another file with {option}")


def make_folder(folder: Path) -> None:
    """Make a folder for results, if it is not there. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}", "free space, or make it writable") from error


def write(path: Path, content: str | bytes) -> None:
    """Write a result: whole or not at all. Raises `UserError`."""
    try:
        cache.write_whole(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}", "free space, or name another file"
        ) from error


def checked(document: Mapping[str, Any], schema: Path) -> dict[str, Any]:
    """Return a document as JSON has it; raises ValidationError if it is not what `schema` says."""
    # The schema speaks about JSON, where a tuple is an array.
    plain: dict[str, Any] = json.loads(json.dumps(document))
    jsonschema.validate(plain, json.loads(schema.read_text()))
    return plain


def read(path: Path, schema: Path, what: str, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return the content of a result file that `schema` describes, a result of `what`.

    Raises `error` if it is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        jsonschema.validate(found, json.loads(schema.read_text()))
    except (OSError, ValueError, jsonschema.ValidationError) as failure:
        reason = getattr(failure, "message", None) or failure
        raise error(f"{path} is no result of {what}: {reason}", "name another file") from None
    return found


def commit() -> str:
    """Return the checkout's commit, with ``+`` if files differ from it; empty without git."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()
