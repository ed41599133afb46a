"""The user's cache: everything that is built, under a name that its inputs determine.

An entry is a folder ``<cache>/<kind>/<key>``. It appears under that name whole or not at all,
so a reader never needs a lock, and a run that is killed leaves at most a temporary folder that
the next build of the same entry removes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

KEY_DIGITS = 16


def root() -> Path:
    """Return the cache's folder (``$XDG_CACHE_HOME/megapipe-lab``), made if need be."""
    path = platformdirs.user_cache_path("megapipe-lab")
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: str | bytes | Path) -> str:
    """Return a key of 16 hex digits for these inputs, order included.

    A `Path` stands for its content: a file's bytes, or a folder's relative file names, modes
    and bytes. Strings and bytes stand for themselves.
    """
    total = hashlib.sha256()
    for part in parts:
        for chunk in _chunks(part):
            total.update(len(chunk).to_bytes(8, "little"))
            total.update(chunk)
    return total.hexdigest()[:KEY_DIGITS]


def _chunks(part: str | bytes | Path) -> Iterator[bytes]:
    if isinstance(part, str):
        yield part.encode()
    elif isinstance(part, bytes):
        yield part
    elif part.is_dir():
        for path in sorted(part.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(part)).encode()
                yield oct(path.stat().st_mode & 0o111).encode()
                yield path.read_bytes()
    else:
        yield part.read_bytes()


@contextmanager
def locked(name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the machine-wide lock `name`; call `waiting` once if somebody else holds it."""
    locks = root() / "locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it holds the old content or the new one, however this ends."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        partial = Path(file.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def entry(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``<cache>/<kind>/<key>``, letting `make` fill it if it is not there.

    `make` gets an empty folder; what it leaves there becomes the entry in one rename. If it
    raises, nothing appears.
    """
    final = root() / kind / key
    if final.is_dir():
        return final
    with locked(f"{kind}-{key}"):
        if final.is_dir():
            return final
        building = final.with_name(f".{key}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            make(building)
            building.rename(final)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return final
