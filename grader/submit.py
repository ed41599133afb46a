"""What a student hands in: exactly the lab's files, and a manifest that says what they were.

The same files give the same archive, byte for byte, so the times in it are those of the files. What
the manifest claims is the student's own word; only its hashes are looked at when it is graded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from grader import results, setup, submission
from grader import variant as variants


@dataclass(frozen=True)
class Packed:
    """An archive that has been written."""

    path: Path
    files: Mapping[str, bytes]
    untouched: list[str]
    """Of the files, those that are the starter's still."""
    left_out: list[str] | None
    """What else was changed or made, as ``git status`` names it; None without git."""


def run(root: Path, lab: Path, out: Path) -> None:
    """Pack the lab's files into `out`, and say what to hand in and what it does not hold."""
    packed = pack(root, lab, out)
    for name, data in packed.files.items():
        print(f"  {name:<20} {decimal(len(data))}")
    for name in packed.untouched:
        print(f"warning: {name} is the starter still, byte for byte")
    if packed.left_out is None:
        print("this is no git checkout: what else you have changed cannot be told")
    elif packed.left_out:
        print("not in it, for only the files above are graded:")
        for line in packed.left_out:
            print(f"  {line}")
    print(f"hand in {packed.path}")


def pack(root: Path, lab: Path, out: Path) -> Packed:
    """Write the archive with the lab's files as they lie in its folder, and a manifest.

    Raises `UserError` if a file is not there, and `grader.submission.SubmissionError` if one is
    such that it would be refused when it is graded.
    """
    results.check_writable(out, "--out")
    paths = variants.mine(lab).files
    files = {name: paths[name].read_bytes() for name in sorted(paths)}
    for name, data in files.items():
        submission.check(name, data)
    newest = max(int(path.stat().st_mtime) for path in paths.values())
    manifest = {
        "version": submission.MANIFEST_VERSION,
        "lab": lab.name,
        "files": [
            {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in files.items()
        ],
        "handout": _first_commit(root),
        "commit": _git(root, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(newest)),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    results.write(out, _archive({submission.MANIFEST: text.encode(), **files}, newest))
    starter = variants.starter(lab).files
    return Packed(
        out,
        files,
        [name for name, data in files.items() if starter[name].read_bytes() == data],
        _left_out(root, list(paths.values()), out),
    )


def _archive(contents: Mapping[str, bytes], when: int) -> bytes:
    packed = io.BytesIO()
    # The compressed file has no name, and the time is in its entries.
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in sorted(contents):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(contents[name]), when, 0o644
            archive.addfile(entry, io.BytesIO(contents[name]))
    return packed.getvalue()


def _left_out(root: Path, packed: list[Path], out: Path) -> list[str] | None:
    """Return what differs from the handout besides the packed files, committed or not."""
    base = _first_commit(root) if setup.is_handout(root) else "HEAD"
    if not _git(root, "rev-parse", "HEAD"):
        return None
    changed = _git(root, "diff", "--name-status", "--no-renames", "-z", base, "--").split("\0")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    found = list(zip(changed[::2], changed[1::2], strict=False))
    found += [("?", name) for name in new if name]
    own = {path.resolve() for path in (*packed, out)}
    return [
        submission.shown(f"{state} {name}")
        for state, name in found
        if (root / name).resolve() not in own
    ]


def _first_commit(root: Path) -> str:
    """Return the commit that a handout began with; empty without git."""
    return _git(root, "rev-list", "--max-parents=0", "HEAD").rpartition("\n")[2]


def _git(root: Path, *arguments: str) -> str:
    """Return what git says about the checkout; nothing where there is none."""
    # Not that of a folder around it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip("\n") if done.returncode == 0 else ""
