"""The file in which `locks.c` counts; its layout is there."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grader.probe.counters import Counts, rows_since
from grader.probe.errors import ProbeError

MAGIC = b"MPLOCKS\n"
LAYOUT = 1
# As in locks.c: magic, layout, slots, slots_offset | recording, state, api_version, guest_vcpus,
# overflow.
HEADER = struct.Struct("<8sIIQIIIIQ")
RECORDING_OFFSET = struct.calcsize("<8sIIQ")
SLOTS_OFFSET = 4096
SLOT = np.dtype(
    [
        ("vaddr", "<u8"),
        ("visits", "<u8"),
        ("held", "<u8"),
        ("handovers", "<u8"),
        ("since", "<u8"),
        ("holder", "<u4"),
        ("last", "<u4"),
    ]
)
STATE_NEW, STATE_COUNTING, STATE_ENDED = range(3)
REPEAT = "something else wrote to it; run it again with a new probe"


@dataclass(frozen=True)
class Header:
    """The head of the file, as `struct locks_header` in `locks.c`."""

    slots: int
    slots_offset: int
    recording: int
    state: int
    api_version: int
    guest_vcpus: int
    overflow: int

    @classmethod
    def read(cls, data: bytes | mmap.mmap) -> Header:
        """Return the header of a file's content; `ProbeError` if it is none."""
        if len(data) < HEADER.size:
            raise ProbeError(f"{len(data)} bytes are no lock file", REPEAT)
        magic, layout, *rest = HEADER.unpack(data[: HEADER.size])
        if magic != MAGIC or layout != LAYOUT:
            raise ProbeError(f"not a lock file of layout {LAYOUT}: {magic!r}, {layout}", REPEAT)
        header = cls(*rest)
        if header.slots_offset + header.slots * SLOT.itemsize > len(data):
            raise ProbeError("the lock file's header does not fit its size", REPEAT)
        return header


def header(slots: int) -> tuple[bytes, int]:
    """Return the header of a new file, and the file's size; `slots` is a power of two."""
    packed = HEADER.pack(MAGIC, LAYOUT, slots, SLOTS_OFFSET, 0, STATE_NEW, 0, 0, 0)
    return packed, SLOTS_OFFSET + slots * SLOT.itemsize


def new_file(slots: int) -> bytes:
    """Return the content of a file that no plugin has used yet; `slots` is a power of two."""
    head, size = header(slots)
    return head.ljust(size, b"\0")


@dataclass(frozen=True, eq=False)
class Locks:
    """One reading, or the difference of two: arrays that belong together row by row."""

    vaddr: npt.NDArray[np.uint64]
    """Of the lock, ascending."""
    visits: Counts
    """How often it was taken, and given back."""
    held: Counts
    """Instructions of the holders."""
    handovers: Counts
    """How often by another vCPU than the time before."""

    def __sub__(self, earlier: Locks) -> Locks:
        """Return what was counted since `earlier`, a reading of the same probe."""
        columns = rows_since(
            self.vaddr,
            earlier.vaddr,
            (self.visits, earlier.visits),
            (self.held, earlier.held),
            (self.handovers, earlier.handovers),
        )
        return Locks(self.vaddr, *columns)


def parse(data: bytes | mmap.mmap) -> Locks:
    """Return the counts in a file's content."""
    found = Header.read(data)
    if found.state == STATE_NEW:
        raise ProbeError(
            "no QEMU has loaded the lock probe", "start QEMU with the probe's arguments"
        )
    if found.overflow:
        raise ProbeError(
            f"the lock probe's table had no room for {found.overflow} takings", "count for less"
        )
    table = np.frombuffer(data, SLOT, found.slots, found.slots_offset)
    table = table[table["vaddr"] != 0]
    table = table[np.argsort(table["vaddr"])]
    visits, held, handovers = (
        table[name].astype(np.int64) for name in ("visits", "held", "handovers")
    )
    return Locks(table["vaddr"], visits, held, handovers)
