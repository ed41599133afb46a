"""What a student hands in: from a folder or an archive of unknown origin to the lab's files.

Only the lab's own files are taken, found by their base names wherever they lie; the rest is
ignored and listed. Nothing that an archive says about itself is believed: everything is unpacked
in memory under limits, looked at, and written only once all of it is in order.

What `invoke submit` packs has a manifest besides, `MANIFEST`; an archive without one is as good.
What it says of the files must be so, for else they are not what the student has packed.

A whole handout may be handed in as well: what it has in its folders called ``given`` is nobody's
work, and ignored.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grader.errors import UserError

MAX_FILE = 256 << 10
MAX_ARCHIVE = 8 << 20
MAX_UNPACKED = 32 << 20
MAX_ENTRIES = 2000
MAX_DEPTH = 16
MAX_LISTED = 20
# Ratios of real archives of source code stay below 30; zeros reach 1000. Small ones do no harm.
MAX_RATIO = 200
RATIO_FROM = 1 << 20
# tarfile's time on one extended header grows with the square of its size.
MAX_TAR_HEADER = 4 << 10
MAX_TAR_HEADERS = 128 << 10
XZ_MEMORY = 128 << 20
CHUNK = 64 << 10
MANIFEST = "megapipe-submission.json"
MANIFEST_VERSION = 1
# The folder of a handout's lab where starter and solution are (`grader.variant.GIVEN`).
GIVEN = "given"
TAR_BLOCK = 512


class SubmissionError(UserError):
    """A submission cannot be graded as it is."""


@dataclass(frozen=True)
class Contents:
    """The wanted files' bytes by name, and what else there was, escaped and bounded."""

    files: Mapping[str, bytes]
    ignored: list[str]


@dataclass(frozen=True)
class Unpacked:
    """The wanted files by name where they have been written, and what has been ignored."""

    files: Mapping[str, Path]
    ignored: list[str]


def unpack(path: Path, wanted: Sequence[str], into: Path) -> Unpacked:
    """Write the wanted files of a submission into the folder `into`, which is made.

    `wanted` are plain file names. All of them are written or none; a file that is there already
    is never replaced. Raises `SubmissionError`.
    """
    contents = read(path, wanted)
    files = {name: into / name for name in contents.files}
    into.mkdir(parents=True, exist_ok=True)
    if there := [name for name, file in files.items() if file.exists() or file.is_symlink()]:
        raise SubmissionError(
            f"{into} already holds {', '.join(there)}", "unpack into an empty folder"
        )
    for name, file in files.items():
        with file.open("xb") as target:
            target.write(contents.files[name])
    return Unpacked(files, contents.ignored)


def read(path: Path, wanted: Sequence[str]) -> Contents:
    """Return the wanted files of a submission: a folder, a .zip, .tar.gz, .tgz or .tar.xz.

    Raises `SubmissionError` if one is missing, there twice, not text or too large, or if the
    archive is damaged, encrypted, too large or holds what has no place in one.
    """
    for name in wanted:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain file name")
    found = _Found(path, tuple(wanted))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            _from_folder(path, found)
        elif stat.S_ISREG(mode):
            _from_archive(path, found)
        else:
            raise SubmissionError(f"{shown(path)} is neither a folder nor a file", found.packing)
    except OSError as error:
        raise SubmissionError(
            f"cannot read {shown(path)}: {error.strerror or error}",
            "name the folder, .zip or .tar.gz that holds the lab's files",
        ) from None
    return found.contents()


def shown(name: str | Path) -> str:
    """Return a name in a form that is safe to print: one line, no escapes, no reordering."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(name)
    )
    return text if len(text) <= 100 else f"{text[:60]}...{text[-37:]}"


@dataclass
class _Found:
    """What has turned up so far of a submission."""

    path: Path
    wanted: tuple[str, ...]
    places: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    ignored_count: int = 0

    @property
    def packing(self) -> str:
        """How to pack it right."""
        return (
            f"hand in only {' and '.join(self.wanted)}, for example packed with   "
            f"tar -czf submission.tar.gz {' '.join(self.wanted)}"
        )

    def wants(self, name: str) -> bool:
        *folders, base = name.rstrip("/").split("/")
        return (base in self.wanted or base == MANIFEST) and GIVEN not in folders

    def take(self, name: str, data: bytes) -> None:
        base = _base(name)
        self.places.setdefault(base, []).append(name)
        _check_file_size(name, data)
        self.data[base] = data

    def ignore(self, name: str) -> None:
        self.ignored_count += 1
        if len(self.ignored) < MAX_LISTED:
            self.ignored.append(shown(name))

    def refuse(self, name: str, what: str) -> SubmissionError:
        return SubmissionError(f"{shown(self.path)}: {shown(name)} {what}", self.packing)

    def contents(self) -> Contents:
        """Return what has been found once it is known to be complete and sound."""
        for base, places in self.places.items():
            if len(places) > 1:
                listed = ", ".join(map(shown, places[:MAX_LISTED]))
                raise SubmissionError(
                    f"{shown(self.path)} holds {base} more than once: {listed}",
                    f"which one counts? {self.packing}",
                )
        ignored = self.ignored
        if self.ignored_count > len(ignored):
            ignored = [*ignored, f"... and {self.ignored_count - len(ignored)} more"]
        manifest = _Manifest.read(self.data.pop(MANIFEST)) if MANIFEST in self.data else None
        if absent := [name for name in self.wanted if name not in self.data]:
            there = f" (found only: {', '.join([*self.data, *ignored])})" if ignored else ""
            there += f"; it was packed for lab {shown(manifest.lab)}" if manifest else ""
            raise SubmissionError(
                f"{shown(self.path)} lacks {', '.join(absent)}{there}",
                f"{' and '.join(self.wanted)} must be there under exactly these names; "
                f"{self.packing}",
            )
        for name in self.wanted:
            check(self.places[name][0], self.data[name])
            if manifest:
                manifest.check(name, self.data[name])
        return Contents({name: self.data[name] for name in self.wanted}, ignored)


def _base(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class _Manifest:
    """What `invoke submit` says that it has packed."""

    lab: str
    sha256: Mapping[str, str]

    @classmethod
    def read(cls, data: bytes) -> _Manifest:
        again = "pack it anew with   invoke submit"
        try:
            document = json.loads(data)
            version = document["version"]
            hashes = {str(entry["name"]): str(entry["sha256"]) for entry in document["files"]}
            lab = str(document["lab"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SubmissionError(
                f"{MANIFEST} is not as `invoke submit` writes it", again
            ) from None
        if version != MANIFEST_VERSION:
            raise SubmissionError(
                f"{MANIFEST} is of version {shown(str(version))}, not {MANIFEST_VERSION}",
                "pack and grade with the same version of the lab",
            )
        return cls(lab, hashes)

    def check(self, name: str, data: bytes) -> None:
        """Raise `SubmissionError` if a file is not the one that was packed."""
        if self.sha256.get(name) != hashlib.sha256(data).hexdigest():
            raise SubmissionError(
                f"{name} is not the file that {MANIFEST} was made for (SHA-256)",
                "pack it anew with   invoke submit   and hand in what it writes, unchanged",
            )


def check(name: str, data: bytes) -> None:
    """Raise `SubmissionError` if a file of this content would be refused, whatever holds it."""
    _check_file_size(name, data)
    _check_text(name, data)


def _check_file_size(name: str, data: bytes) -> None:
    if len(data) > MAX_FILE:
        raise SubmissionError(
            f"{shown(name)} is larger than {MAX_FILE >> 10} KiB", "hand in source code only"
        )


def _check_text(name: str, data: bytes) -> None:
    if not data.strip():
        raise SubmissionError(f"{shown(name)} is empty", "hand in the file with your work in it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SubmissionError(
            f"{shown(name)}:{line} is not UTF-8 text", "save it as a UTF-8 text file"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SubmissionError(
            f"{shown(name)}:{line} holds a NUL byte", "hand in source code, not a compiled file"
        )


# ----------------------------------------------------------------------------------- folders


def _from_folder(top: Path, found: _Found) -> None:
    entries = 0

    def failed(error: OSError) -> None:
        raise error

    for folder, folders, files, descriptor in os.fwalk(top, onerror=failed):
        inside = os.path.relpath(folder, top)
        prefix = "" if inside == "." else f"{inside}/"
        entries += len(folders) + len(files)
        if entries > MAX_ENTRIES:
            raise SubmissionError(
                f"{shown(top)} holds more than {MAX_ENTRIES} files",
                "name the folder that holds the lab's files",
            )
        for name in sorted(files):
            _from_entry(f"{prefix}{name}", name, descriptor, found)
        # A hidden folder belongs to a tool (.git, .venv), and a link to a folder may be a loop.
        for name in sorted(folders):
            linked = stat.S_ISLNK(os.lstat(name, dir_fd=descriptor).st_mode)
            if linked and name in found.wanted:
                raise found.refuse(prefix + name, "is a symbolic link")
            if linked or name.startswith(".") or prefix.count("/") >= MAX_DEPTH:
                found.ignore(f"{prefix}{name}/")
                folders.remove(name)


def _from_entry(shown_as: str, name: str, folder: int, found: _Found) -> None:
    if not found.wants(shown_as):
        found.ignore(shown_as)
        return
    if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode):
        raise found.refuse(shown_as, "is a symbolic link")
    # It may be replaced between the look and the open: follow nothing, wait for nothing.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise found.refuse(shown_as, "is not an ordinary file")
        found.take(shown_as, file.read(MAX_FILE + 1))


# ---------------------------------------------------------------------------------- archives


def _from_archive(path: Path, found: _Found) -> None:
    with path.open("rb") as file:
        data = file.read(MAX_ARCHIVE + 1)
    if len(data) > MAX_ARCHIVE:
        raise SubmissionError(
            f"{shown(path)} is larger than {MAX_ARCHIVE >> 20} MiB", found.packing
        )
    damage: str
    try:
        if data.startswith((b"PK\3\4", b"PK\5\6")):
            _from_zip(data, found)
        elif data.startswith(b"\x1f\x8b"):
            _from_tar(_unpacked(_gzip_chunks(data), len(data), found), found)
        elif data.startswith(b"\xfd7zXZ\0"):
            _from_tar(_unpacked(_xz_chunks(data), len(data), found), found)
        else:
            raise SubmissionError(
                f"{shown(path)} is not a .zip, .tar.gz or .tar.xz archive", found.packing
            )
        return
    except UnicodeDecodeError:
        damage = "holds a name that is not UTF-8"
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        damage = f"is damaged ({shown(str(error))})"
    except NotImplementedError as error:
        damage = f"is packed in an unusual way ({shown(str(error))})"
    # What the libraries let through when a header makes no sense.
    except (
        zlib.error,
        lzma.LZMAError,
        struct.error,
        ValueError,
        OverflowError,
        RecursionError,
        IndexError,
    ) as error:
        damage = f"is damaged ({type(error).__name__})"
    raise SubmissionError(f"{shown(path)} {damage}", f"pack it anew: {found.packing}")


def _gzip_chunks(data: bytes) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _xz_chunks(data: bytes) -> Iterator[bytes]:
    # Not LZMAFile: that takes as much memory as the archive asks for.
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    rest = data
    while not stream.eof:
        chunk = stream.decompress(rest, CHUNK)
        if not chunk and not rest and not stream.eof:
            raise EOFError("it ends too early")
        rest = b""
        yield chunk


def _unpacked(chunks: Iterable[bytes], packed: int, found: _Found) -> bytes:
    whole = bytearray()
    for chunk in chunks:
        whole += chunk
        _check_size(len(whole), packed, found)
    return bytes(whole)


def _check_size(unpacked: int, packed: int, found: _Found) -> None:
    too_much = unpacked > MAX_UNPACKED
    if too_much or unpacked > max(RATIO_FROM, MAX_RATIO * packed):
        size = f"{MAX_UNPACKED >> 20} MiB" if too_much else f"{MAX_RATIO} times its size"
        raise SubmissionError(f"{shown(found.path)} unpacks to more than {size}", found.packing)


def _check_entry(name: str, count: int, found: _Found) -> None:
    """Refuse an archive for the name or the number of its entries."""
    if count > MAX_ENTRIES:
        raise SubmissionError(
            f"{shown(found.path)} holds more than {MAX_ENTRIES} entries", found.packing
        )
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise found.refuse(name, "has an absolute path")
    if ".." in name.split("/"):
        raise found.refuse(name, "leads out of the archive")
    categories = {unicodedata.category(c) for c in name}
    if "Cs" in categories:
        raise found.refuse(name, "has a name that is not UTF-8")
    if "Cc" in categories:
        raise found.refuse(name, "has control characters in its name")


def _from_zip(data: bytes, found: _Found) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        declared = 0
        for count, entry in enumerate(archive.infolist(), start=1):
            # Some Windows tools separate with backslashes; zipfile cuts names at a NUL.
            name = entry.orig_filename.replace("\\", "/")
            _check_entry(name, count, found)
            declared += entry.file_size
            _check_size(declared, len(data), found)
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind == stat.S_IFLNK:
                raise found.refuse(name, "is a symbolic link")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise found.refuse(name, "is not an ordinary file")
            if entry.flag_bits & 0x1:
                raise found.refuse(name, "is encrypted")
            if name.endswith("/") or kind == stat.S_IFDIR:
                continue
            if not found.wants(name):
                found.ignore(name)
                continue
            # Of the others, a few bytes unpack to gigabytes in one step.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise found.refuse(name, "is packed with an unusual method")
            with archive.open(entry) as file:
                found.take(name, file.read(MAX_FILE + 1))


def _from_tar(data: bytes, found: _Found) -> None:
    _check_tar_headers(data, found)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as archive:
        for count, entry in enumerate(archive, start=1):
            name = entry.name
            _check_entry(name, count, found)
            if entry.issym() or entry.islnk():
                kind = "symbolic" if entry.issym() else "hard"
                raise found.refuse(name, f"is a {kind} link")
            if entry.size < 0:
                raise tarfile.ReadError("a size is negative")
            if entry.isdir():
                continue
            if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
                raise found.refuse(name, "is not an ordinary file")
            if not found.wants(name):
                found.ignore(name)
                continue
            file = archive.extractfile(entry)
            content = b"" if file is None else file.read(MAX_FILE + 1)
            if len(content) < min(entry.size, MAX_FILE + 1):
                raise EOFError("it ends too early")
            found.take(name, content)
        # tarfile takes a header that it cannot read for the end.
        if data[archive.offset :].strip(b"\0"):
            raise tarfile.ReadError("a header is broken")


def _check_tar_headers(data: bytes, found: _Found) -> None:
    """Refuse an archive with extended headers of a size that no honest one has.

    Every block is looked at, for what is a header depends on what the headers before it say.
    """
    total = 0
    for offset in range(0, len(data), TAR_BLOCK):
        block = data[offset : offset + TAR_BLOCK]
        if block[156:157] not in (b"x", b"g", b"X", b"L", b"K"):
            continue
        try:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        except (tarfile.HeaderError, ValueError):
            continue
        total += size
        if not 0 <= size <= MAX_TAR_HEADER or total > MAX_TAR_HEADERS:
            raise SubmissionError(f"{shown(found.path)} has oversized headers", found.packing)
