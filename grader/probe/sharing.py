"""The sharing probe: which cache lines move between vCPUs, and which functions move them.

`sharing.c` says what is counted. It follows every load and store: the guest needs 3.5 times the
host's time that it needs with the standard probe alone. The state of the lines is kept all the
time, which is nearly all of that; transfers are counted while it is `recording`::

    with SharingProbe(4, 512, Symbols.of_kernel(vmlinux)) as sharing:
        ...start QEMU with sharing.qemu_arguments()...
        before = sharing.read()
        with sharing.recording():
            ...
        moved = sharing.read() - before

The guest's memory is a file that this process maps, too, so that what a line is can be seen from
outside, without asking the guest: `SharingProbe.memory`.
"""

from __future__ import annotations

import bisect
import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from grader.probe import sharing_file
from grader.probe.errors import ProbeError
from grader.probe.loading import arguments, plugin, private_folder
from grader.probe.memory import DIRECT_MAP, MODULES, GuestMemory
from grader.probe.sharing_file import (
    CODE_FUNCTIONS,
    CODE_UNKNOWN,
    CODE_USER,
    RECORDING_OFFSET,
    STATE_ENDED,
    STATE_NEW,
    STATE_RUNNING,
    Header,
    Transfers,
)
from grader.probe.symbols import Symbols

# As in sharing.c.
MAX_VCPUS = 64
MAX_MEMORY_MIB = 2816
# 16 bytes of a module's code each.
PLACES = 1 << 16
# Rows of the table, of 32 bytes; memory is taken only for those in use.
SLOTS = 1 << 21
USER = "(user code)"
UNKNOWN = "(unknown kernel code)"


class SharingProbe:
    """The transfers of one QEMU process; a context manager.

    `memory_mib` is the size of the guest's memory, all of which lies in a file in memory. The
    plugin removes its name as soon as the guest runs: from then on nothing but an empty folder is
    left behind if this process is killed, and nothing at all otherwise. A probe serves one QEMU.
    """

    def __init__(
        self,
        vcpus: int,
        memory_mib: int,
        symbols: Symbols,
        qemu: Path | None = None,
        parent: Path | None = None,
    ) -> None:
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ProbeError(
                f"the sharing probe cannot follow {vcpus} vCPUs", f"use 1 to {MAX_VCPUS}"
            )
        if not 1 <= memory_mib <= MAX_MEMORY_MIB:
            raise ProbeError(
                f"the sharing probe cannot follow {memory_mib} MiB of memory",
                f"use 1 to {MAX_MEMORY_MIB}: above, memory has a hole",
            )
        self.vcpus = vcpus
        self.memory_mib = memory_mib
        self._system_map = Path(symbols.source).with_name("System.map")
        self._starts, self._names = _functions(symbols)
        self._late: list[tuple[int, str]] = []
        self._qemu = qemu
        self._parent = parent
        self._folder: Path | None = None
        self._plugin: Path | None = None
        self._map: mmap.mmap | None = None
        self._memory: mmap.mmap | None = None

    def __enter__(self) -> Self:
        self._plugin = plugin("sharing", self._qemu)
        self._folder = private_folder(self._parent)
        try:
            size = self.memory_mib << 20
            free = shutil.disk_usage(self._folder).free
            if free < size:
                raise ProbeError(
                    f"the guest's {self.memory_mib} MiB do not fit into {self._folder.parent}",
                    f"only {free >> 20} MiB are free there: free more, or give the guest less",
                )
            header, length = sharing_file.header(self.vcpus, len(self._starts), PLACES, SLOTS)
            self._map = _new_map(self._folder / "counters", length)
            self._map[: len(header)] = header
            self._memory = _new_map(self._folder / "memory", size)
            lines = "".join(f"{start:x}\n" for start in self._starts)
            (self._folder / "functions").write_text(lines)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove_folder()
        for opened in (self._map, self._memory):
            if opened is not None:
                opened.close()
        self._map = self._memory = None

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _opened(self) -> mmap.mmap:
        if self._map is None:
            raise ProbeError("the sharing probe is not open", "use it as a context manager")
        return self._map

    def _header(self) -> Header:
        header = Header.read(self._opened())
        # QEMU opens the memory only after it has loaded the plugins.
        if header.state in (STATE_RUNNING, STATE_ENDED):
            self._remove_folder()
        return header

    def qemu_arguments(self) -> list[str]:
        """Return the arguments with which QEMU, under ``-accel tcg``, loads this probe."""
        if self._plugin is None or self._folder is None or self._header().state != STATE_NEW:
            raise ProbeError(
                "the sharing probe is not open, or its QEMU runs already", "open a probe per QEMU"
            )
        path = str(self._folder / "memory").replace(",", ",,")
        backend = f"memory-backend-file,id=sharing,size={self.memory_mib}M,mem-path={path},share=on"
        return [
            *arguments(
                self._plugin,
                counters=self._folder / "counters",
                functions=self._folder / "functions",
                memory_mib=self.memory_mib,
                direct=f"{DIRECT_MAP:x}",
                memory=self._folder / "memory",
            ),
            *("-object", backend, "-machine", "memory-backend=sharing"),
        ]

    @property
    def counting(self) -> bool:
        """Whether a QEMU has loaded the probe; from then on `read` works."""
        return self._header().state != STATE_NEW

    @property
    def ended(self) -> bool:
        """Whether that QEMU has exited in an orderly way (not so if it was killed)."""
        return self._header().state == STATE_ENDED

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count during the ``with`` block: what an idle guest's clock does beside it, stays out."""
        self._record(1)
        try:
            yield
        finally:
            if self._map is not None:
                self._record(0)

    def _record(self, on: int) -> None:
        struct.pack_into("<I", self._opened(), RECORDING_OFFSET, on)

    def read(self) -> Transfers:
        """Return the counts now. Only one taken outside of recordings is of one moment."""
        self._header()
        return sharing_file.parse(self._opened())

    @property
    def memory(self) -> mmap.mmap:
        """The guest's memory as it is now, by physical address."""
        if self._memory is None:
            raise ProbeError("the sharing probe is not open", "use it as a context manager")
        return self._memory

    def guest_memory(self) -> GuestMemory:
        """Return the guest's memory as it is now, to say what lines are; see `GuestMemory`."""
        return GuestMemory(self.memory, self._system_map, self._late)

    def set_modules(self, symbols: Iterable[tuple[int, str]]) -> None:
        """Name what `Symbols` does not know: (address, name) of each symbol of the modules.

        Only the guest can say where it has put a module, so these names are its testimony.
        """
        self._late = sorted(symbols)

    def functions(self) -> list[str]:
        """Return the name of each code, in the order of their numbers (`Transfers.code`)."""
        self._header()
        starts = [start for start, _ in self._late]
        late = []
        for address in sharing_file.places(self._opened()):
            # The place's last byte: a function may begin within it only where none is aligned.
            index = bisect.bisect_right(starts, address + 15) - 1
            late.append(self._late[index][1] if index >= 0 else f"(kernel code at {address:#x})")
        names = ["(none)"] * CODE_FUNCTIONS
        names[CODE_USER], names[CODE_UNKNOWN] = USER, UNKNOWN
        return [*names, *self._names, *late]


def _functions(symbols: Symbols) -> tuple[list[int], list[str]]:
    """Return where the kernel's functions begin, ascending, and their names, clones as one."""
    named: dict[int, str] = {}
    for name, addresses in symbols.addresses.items():
        for address in addresses:
            if address < MODULES:
                plain = name.partition(".")[0] or name
                # Of several names, the one with fewer underscores is what people say.
                named[address] = min(
                    named.get(address, plain), plain, key=lambda one: (one.count("_"), one)
                )
    starts = sorted(named)
    return starts, [named[start] for start in starts]


def _new_map(path: Path, size: int) -> mmap.mmap:
    """Make a file of zeros, with no memory yet, and map it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
