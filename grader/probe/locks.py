"""The lock probe: how often each lock of the guest is taken, how long held, and handed over.

`locks.c` says what is counted, and which locks are not seen. It relies on vCPUs that take turns on
one thread, as in exact mode::

    with LockProbe(4, Symbols.of_kernel(vmlinux)) as locks:
        ...start QEMU with locks.qemu_arguments()...
        locks.record()
        before = locks.read()
        ...
        used = locks.read() - before
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

from grader.probe import lock_file
from grader.probe.files import PluginFiles
from grader.probe.loading import arguments
from grader.probe.lock_file import RECORDING_OFFSET, STATE_NEW, Header, Locks
from grader.probe.symbols import Symbols

# Words that were ever taken for a lock; memory is taken only for those in use.
SLOTS = 1 << 19


class Kind(IntEnum):
    """What a function does to locks; see `locks.c`."""

    TAKES = 0
    WAITS = 1
    GIVES = 2
    OWNS = 3


_VARIANTS = ("", "_bh", "_irq", "_irqsave")
_BACK = ("", "_bh", "_irq", "_irqrestore")
FUNCTIONS = {
    Kind.TAKES: (
        *(f"_raw_{lock}{variant}" for lock in ("spin_lock", "write_lock") for variant in _VARIANTS),
        *("_raw_spin_trylock", "_raw_spin_trylock_bh", "mutex_lock", "mutex_trylock"),
    ),
    Kind.WAITS: ("native_queued_spin_lock_slowpath", "queued_write_lock_slowpath"),
    Kind.GIVES: (
        *(f"_raw_{lock}{variant}" for lock in ("spin_unlock", "write_unlock") for variant in _BACK),
        *("mutex_unlock", "release_sock"),
    ),
    Kind.OWNS: ("lock_sock_nested",),
}
"""The functions of 6.12 by which locks are taken and given back."""


class LockProbe(PluginFiles):
    """The locks of one QEMU process; a context manager, see `PluginFiles`.

    Counted are those that the first `recorded` vCPUs take.
    """

    plugin_name = "locks"

    def __init__(
        self,
        recorded: int,
        symbols: Symbols,
        qemu: Path | None = None,
        parent: Path | None = None,
    ) -> None:
        super().__init__(qemu, parent)
        self._recorded = recorded
        self.functions = tuple(sorted(_functions(symbols)))
        """Begin, end and kind of each function that takes locks or gives them back."""

    def _make_files(self, folder: Path) -> mmap.mmap:
        lines = "".join(f"{begin:x} {end:x} {kind:d}\n" for begin, end, kind in self.functions)
        (folder / "functions").write_text(lines)
        head, size = lock_file.header(SLOTS)
        with (folder / "counters").open("w+b") as file:
            file.write(head)
            # Zeros that take no memory until they are used.
            file.truncate(size)
            return mmap.mmap(file.fileno(), 0)

    def _header(self) -> Header:
        header = Header.read(self._opened())
        if header.state != STATE_NEW:
            self._remove_folder()
        return header

    def qemu_arguments(self) -> list[str]:
        """Return the arguments with which QEMU, under ``-accel tcg``, loads this probe."""
        plugin_file, folder = self._to_load()
        return arguments(
            plugin_file,
            counters=folder / "counters",
            functions=folder / "functions",
            recorded=self._recorded,
        )

    @property
    def counting(self) -> bool:
        """Whether a QEMU has loaded the probe; from then on `read` works."""
        return self._header().state != STATE_NEW

    def record(self, *, on: bool = True) -> None:
        """Begin or end to count; for a guest that stands still whenever it is read."""
        struct.pack_into("<I", self._opened(), RECORDING_OFFSET, on)

    def read(self) -> Locks:
        """Return the counts now, of a guest that stands still."""
        self._header()
        return lock_file.parse(self._opened())


def _functions(symbols: Symbols) -> Iterator[tuple[int, int, Kind]]:
    """Yield begin, end and kind of each function that this kernel has."""
    starts = sorted({address for found in symbols.addresses.values() for address in found})
    following = dict(itertools.pairwise(starts))
    for kind, names in FUNCTIONS.items():
        for name in names:
            for begin in symbols.addresses.get(name, ()):
                if begin in following:
                    yield begin, following[begin], kind
