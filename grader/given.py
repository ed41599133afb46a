"""Given objects: a lab's file compiled, for those who need it and must not see its source.

A handout has a folder of them in place of a solved file, one for everything that the file is
compiled for (a kernel with and without the checkers, or the library). With each stands what it was
compiled against, for an object fits only there, and nothing else would say that it does not: the
kernel of the labs has no MODVERSIONS, and a structure that is laid out otherwise links as well.

What an object still tells about its source, `neutral` having taken out what can be taken out: the
code, its strings, the sections' names, and the names that it shares with others. On the debug
kernel the strings are more: KASAN's, lockdep's and UBSAN's descriptions hold the names of the
file's own variables, locks and types, and line numbers.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from grader.errors import UserError

FOLDER_SUFFIX = ".objects"
DESCRIPTION = "objects.json"
VERSION = 1

# What an object is compiled against, and how to get back to it.
KERNEL_SOURCE = "the kernel's source"
KERNEL_CONFIGURATION = "the kernel's configuration"
MODULE_HEADERS = "kernel/megapipe/*.h"
LIBRARY_HEADERS = "images/guest/libmegapipe/*.h"
# What `neutral` calls a function.
NEUTRAL = re.compile(r"given_\d+")
_REMEDIES = {
    KERNEL_SOURCE: "build from the source named there: KERNEL_TARBALL=/path/to/that.tar.xz",
    KERNEL_CONFIGURATION: "put it back: git checkout -- kernel/config",
    MODULE_HEADERS: "put them back: git checkout -- kernel/megapipe",
    LIBRARY_HEADERS: "put them back: git checkout -- images/guest kernel/megapipe",
}


class GivenError(UserError):
    """No given object fits what is being built."""


@dataclass(frozen=True)
class GivenObject:
    """An object, and what it was compiled against: thing -> its digest."""

    name: str
    code: bytes
    made_for: Mapping[str, str]


def folder_name(file: str) -> str:
    """Return what the folder is called that stands for a lab's file."""
    return Path(file).stem + FOLDER_SUFFIX


def write(folder: Path, origin: str, objects: Sequence[GivenObject]) -> None:
    """Write the objects of one file; `origin` tells people which kernel source they are for."""
    folder.mkdir(parents=True)
    entries = []
    for one in objects:
        (folder / f"{one.name}.o").write_bytes(one.code)
        entries.append({"object": f"{one.name}.o", "made_for": dict(one.made_for)})
    text = json.dumps({"version": VERSION, "origin": origin, "objects": entries}, indent=2)
    (folder / DESCRIPTION).write_text(text + "\n")


def choose(path: Path, made_for: Mapping[str, str]) -> Path:
    """Return what to compile or to link: a C file itself, of a folder the object that fits.

    Raises `GivenError`, which names what differs, if none does.
    """
    if not path.is_dir():
        return path
    origin, entries = _read(path)
    for entry in entries:
        if entry["made_for"] == made_for:
            return path / str(entry["object"])
    # The object for the kernel with the checkers differs from the other in one thing more.
    differing = min(
        ([thing for thing in made_for if entry["made_for"].get(thing) != made_for[thing]]
         for entry in entries),
        key=len,
    )  # fmt: skip
    steps = [_REMEDIES.get(thing, "ask for a handout that was made for it") for thing in differing]
    raise GivenError(
        f"{path} holds nothing that fits: {', '.join(differing)} is not what it was compiled "
        f"against ({origin})",
        "; ".join(steps),
    )


def check_source(labs: Path, digest: str) -> None:
    """Raise `GivenError` if a lab's objects are for another source of the kernel than this one.

    They are looked at again when they are linked; this comes before a kernel is built for nothing.
    """
    for folder in sorted(labs.glob(f"*/*/*/*{FOLDER_SUFFIX}")):
        origin, entries = _read(folder)
        sources = [entry["made_for"].get(KERNEL_SOURCE, digest) for entry in entries]
        if digest not in sources:
            raise GivenError(
                f"the given objects are for another source of the kernel: {origin}",
                f"{_REMEDIES[KERNEL_SOURCE]}   (if you have changed kernel/patches, put them back: "
                "git checkout -- kernel/patches)",
            )


def _read(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    try:
        document = json.loads((folder / DESCRIPTION).read_text())
        if document["version"] != VERSION or not document["objects"]:
            raise ValueError("unknown version, or empty")
        return str(document["origin"]), list(document["objects"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GivenError(
            f"{folder / DESCRIPTION} cannot be read ({error})",
            "put it back: git checkout -- labs",
        ) from None


def neutral(code: bytes, known: Collection[str]) -> bytes:
    """Return an object without debug information and without the names of its own functions.

    Local symbols stay, because objtool, the unwinder's tables and kallsyms want to know where a
    function begins and ends; those whose names are not `known` anyway are called ``given_N``. A
    suffix that the compiler has added stays, for objtool finds by it what belongs together.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, after, renamed = (Path(folder) / name for name in ("a.o", "b.o", "names"))
        before.write_bytes(code)
        own = [name for name in local_symbols(before) if name.partition(".")[0] not in known]
        bases = {base: f"given_{n}" for n, base in enumerate(dict.fromkeys(map(_base, own)))}
        lines = [f"{name} {bases[_base(name)]}{name.removeprefix(_base(name))}\n" for name in own]
        renamed.write_text("".join(lines))
        subprocess.run(
            ["objcopy", "--strip-debug", f"--redefine-syms={renamed}", before, after],
            check=True,
        )
        return after.read_bytes()


def _base(name: str) -> str:
    return name.partition(".")[0]


def local_symbols(path: Path) -> list[str]:
    """Return the names of an object's own functions and variables."""
    with path.open("rb") as file:
        elf: Any = ELFFile(file)
        symbols = elf.get_section_by_name(".symtab").iter_symbols()
        # A name that begins with a dot is the assembler's.
        return [
            symbol.name
            for symbol in symbols
            if symbol["st_info"]["bind"] == "STB_LOCAL"
            and symbol["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE")
            and re.match(r"\w", symbol.name)
        ]
