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

from grader.probe import sharing_file
from grader.probe.errors import ProbeError
from grader.probe.files import PluginFiles
from grader.probe.loading import arguments
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
# Where the clock's interrupt begins and ends: arguments of the plugin, and the kernel's functions.
CLOCK = {"clock": "sysvec_apic_timer_interrupt", "clock_end": "irq_exit_rcu"}
USER = "(user code)"
UNKNOWN = "(unknown kernel code)"


class SharingProbe(PluginFiles):
    """The transfers of one QEMU process; a context manager.

    Counted are the transfers of the first `recorded` vCPUs (None: of all).
    `memory_mib` is the size of the guest's memory, all of which lies in a file in memory. The
    plugin removes its name as soon as the guest runs: from then on nothing but an empty folder is
    left behind if this process is killed, and nothing at all otherwise. See `PluginFiles`.
    """

    plugin_name = "sharing"

    def __init__(
        self,
        vcpus: int,
        memory_mib: int,
        symbols: Symbols,
        qemu: Path | None = None,
        parent: Path | None = None,
        recorded: int | None = None,
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
        super().__init__(qemu, parent)
        self.vcpus = vcpus
        self.memory_mib = memory_mib
        self._recorded = vcpus if recorded is None else recorded
        self._system_map = Path(symbols.source).with_name("System.map")
        self._starts, self._names = _functions(symbols)
        self._clock = {
            argument: f"{symbols.entries(name)[0]:x}"
            for argument, name in CLOCK.items()
            if all(map(symbols.has, CLOCK.values()))
        }
        self._late: list[tuple[int, str]] = []
        self._memory: mmap.mmap | None = None

    def _make_files(self, folder: Path) -> mmap.mmap:
        size = self.memory_mib << 20
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ProbeError(
                f"the guest's {self.memory_mib} MiB do not fit into {folder.parent}",
                f"only {free >> 20} MiB are free there: free more, or give the guest less",
            )
        lines = "".join(f"{start:x}\n" for start in self._starts)
        (folder / "functions").write_text(lines)
        self._memory = _new_map(folder / "memory", size)
        header, length = sharing_file.header(self.vcpus, len(self._starts), PLACES, SLOTS)
        counters = _new_map(folder / "counters", length)
        counters[: len(header)] = header
        return counters

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _header(self) -> Header:
        header = Header.read(self._opened())
        # QEMU opens the memory only after it has loaded the plugins.
        if header.state in (STATE_RUNNING, STATE_ENDED):
            self._remove_folder()
        return header

    def qemu_arguments(self) -> list[str]:
        """Return the arguments with which QEMU, under ``-accel tcg``, loads this probe."""
        plugin_file, folder = self._to_load()
        path = str(folder / "memory").replace(",", ",,")
        backend = f"memory-backend-file,id=sharing,size={self.memory_mib}M,mem-path={path},share=on"
        return [
            *arguments(
                plugin_file,
                counters=folder / "counters",
                functions=folder / "functions",
                memory_mib=self.memory_mib,
                direct=f"{DIRECT_MAP:x}",
                recorded=self._recorded,
                **self._clock,
                memory=folder / "memory",
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
        self.record()
        try:
            yield
        finally:
            if self._map is not None:
                self.record(on=False)

    def record(self, *, on: bool = True) -> None:
        """Begin or end to count; for a guest that stands still whenever it is read."""
        struct.pack_into("<I", self._opened(), RECORDING_OFFSET, on)

    def read(self) -> Transfers:
        """Return the counts now. Only one taken outside of recordings is of one moment."""
        self._header()
        return sharing_file.parse(self._opened())

    @property
    def memory(self) -> mmap.mmap:
        """The guest's memory as it is now, by physical address."""
        if self._memory is None:
            raise ProbeError("the probe is not open", "use it as a context manager")
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
