"""Where the functions of a kernel are entered: from its System.map or its vmlinux."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from grader.probe.errors import ProbeError, UnknownSymbol

CLONE = re.compile(r"(?:\.(?:isra|constprop|part|cold|llvm)(?:\.\d+)?)+")
KERNEL_HALF = 1 << 63


@dataclass(frozen=True)
class Symbols:
    """The functions of a kernel: `addresses` maps each text symbol to where it lies.

    A name has several addresses when static functions of several files share it.
    """

    addresses: Mapping[str, tuple[int, ...]]
    source: str

    @classmethod
    def of_kernel(cls, vmlinux: Path) -> Symbols:
        """Read the System.map that was built beside `vmlinux`, or else `vmlinux` itself."""
        system_map = vmlinux.with_name("System.map")
        if system_map.is_file():
            return cls.from_system_map(system_map)
        return cls.from_vmlinux(vmlinux)

    @classmethod
    def from_system_map(cls, path: Path) -> Symbols:
        """Read a System.map (lines ``address type name``)."""
        found: list[tuple[str, int]] = []
        number = 0
        try:
            with path.open(encoding="ascii") as lines:
                for line in lines:
                    number += 1
                    word, kind, name = line.split()[:3]
                    address = int(word, 16)
                    if kind in "tTwW":
                        found.append((name, address))
        except OSError as error:
            raise ProbeError(f"{path}: {error.strerror}", "build the kernel first") from error
        except ValueError as error:
            raise ProbeError(
                f"{path}:{number}: not a line of a System.map", "build the kernel again"
            ) from error
        return cls._checked(found, path)

    @classmethod
    def from_vmlinux(cls, path: Path) -> Symbols:
        """Read the symbol table of an unstripped x86-64 kernel."""
        try:
            with path.open("rb") as file:
                elf: Any = ELFFile(file)
                table = elf.get_section_by_name(".symtab")
                if table is None or elf.elfclass != 64 or not elf.little_endian:
                    raise ProbeError(
                        f"{path}: not an x86-64 vmlinux with symbols",
                        "give the vmlinux at the top of the kernel's build, not bzImage or a "
                        "stripped copy",
                    )
                entries, strings = table.data(), elf.get_section(table["sh_link"]).data()
        except OSError as error:
            raise ProbeError(f"{path}: {error.strerror}", "build the kernel first") from error
        except ELFError as error:
            raise ProbeError(f"{path}: not an ELF file ({error})", "give the vmlinux") from error
        found = []
        for name, info, _, section, value, _ in struct.iter_unpack("<IBBHQQ", entries):
            # Functions that are defined here (STT_FUNC, not SHN_UNDEF).
            if info & 0xF == 2 and section:
                text: bytes = strings[name : strings.index(b"\0", name)]
                found.append((text.decode("ascii", "replace"), value))
        return cls._checked(found, path)

    @classmethod
    def _checked(cls, found: Iterable[tuple[str, int]], path: Path) -> Symbols:
        addresses: dict[str, tuple[int, ...]] = {}
        for name, address in found:
            if address & KERNEL_HALF and address not in addresses.get(name, ()):
                addresses[name] = (*addresses.get(name, ()), address)
        if not addresses:
            raise ProbeError(
                f"{path}: no kernel function in it",
                "give the System.map or vmlinux of the kernel's build, not an unprivileged copy of "
                "/proc/kallsyms",
            )
        return cls(addresses, str(path))

    @functools.cached_property
    def _clones(self) -> dict[str, list[str]]:
        clones: dict[str, list[str]] = {}
        for name in self.addresses:
            plain, dot, _ = name.partition(".")
            if dot and CLONE.fullmatch(name, len(plain)):
                clones.setdefault(plain, []).append(name)
        return clones

    def entries(self, name: str) -> tuple[int, ...]:
        """Return the addresses at which the function `name` is entered, sorted.

        An entry is one of the function's body. So these count: the symbol itself, every static
        function of that name, and the specialised bodies that GCC makes (``.isra.N``,
        ``.constprop.N``) or Clang renames (``.llvm.N``). ``.part.N``, what is left of a function
        whose beginning was inlined, counts only where none of those exists: else the body calls
        it and one entry would count twice. ``.cold`` is the far half of a body that has been
        entered, and never counts. A call that the compiler inlined leaves no entry to count.

        Raises `UnknownSymbol`, with names that are near, if there is no entry.
        """
        found = self._find(name)
        if not found:
            near = self._near(name)
            hint = f"near it: {', '.join(near)}" if near else "nothing near it either"
            raise UnknownSymbol(
                f"{self.source} has no function {name} ({hint})",
                "correct the name; a function may also be inlined, renamed in this version, or "
                "switched off in the kernel's configuration",
            )
        return found

    def _find(self, name: str) -> tuple[int, ...]:
        clones = [clone for clone in self._clones.get(name, ()) if ".cold" not in clone]
        bodies = [clone for clone in clones if ".part" not in clone]
        if name in self.addresses:
            bodies.append(name)
        found = {address for body in bodies or clones for address in self.addresses[body]}
        return tuple(sorted(found))

    def matching(self, pattern: str) -> tuple[str, ...]:
        """Return the functions, clones left out, that `pattern` names (``*``, ``?``, ``[]``)."""
        plain = {name.partition(".")[0] for name in self.addresses}
        return tuple(name for name in sorted(fnmatch.filter(plain, pattern)) if self._find(name))

    def resolve(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the sorted entries of all these functions; a name may be a pattern."""
        found: set[int] = set()
        for name in names:
            functions = self.matching(name) if _is_pattern(name) else (name,)
            if not functions:
                raise UnknownSymbol(
                    f"{self.source} has no function that matches {name}", "correct it"
                )
            for function in functions:
                found.update(self.entries(function))
        return tuple(sorted(found))

    def has(self, name: str) -> bool:
        """Say whether `name`, which may be a pattern, has an entry here."""
        return bool(self.matching(name) if _is_pattern(name) else self._find(name))

    def _near(self, name: str) -> list[str]:
        core = name.strip("_")
        inside = [other for other in self.addresses if len(core) > 4 and core in other]
        alike = [other for other in self.addresses if abs(len(other) - len(name)) < 4]
        near = [*sorted(inside, key=len)[:4], *difflib.get_close_matches(name, alike, 4, 0.75)]
        return list(dict.fromkeys(near))


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")
