"""The file in which `sharing.c` counts; its layout is there."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grader.probe.counters import Counts, rows_since
from grader.probe.errors import ProbeError

MAGIC = b"MPSHARE\n"
LAYOUT = 2
# As in sharing.c: magic, layout, vcpus, block_bytes, functions, places, slots | the three offsets |
# recording, state, api_version, guest_vcpus, used_places, memory_mib.
HEADER = struct.Struct("<8s6I3Q6I")
RECORDING_OFFSET = struct.calcsize("<8s6I3Q")
BLOCKS_OFFSET = 4096
BLOCK_BYTES = 128
BLOCK = np.dtype(
    [
        ("user_loads", "<u8"),
        ("kernel_loads", "<u8"),
        ("clock_loads", "<u8"),
        ("user_stores", "<u8"),
        ("kernel_stores", "<u8"),
        ("clock_stores", "<u8"),
        ("merged", "<u8"),
        ("overflow", "<u8"),
        ("unseen", "<u8"),
        ("apart", f"V{BLOCK_BYTES - 9 * 8}"),
    ]
)
SLOT = np.dtype([("key", "<u8"), ("vaddr", "<u8"), ("loads", "<u8"), ("stores", "<u8")])
CODE_BITS = 20
CODE_USER, CODE_UNKNOWN, CODE_FUNCTIONS = 1, 2, 3
LINE_BYTES = 64
STATE_NEW, STATE_LOADED, STATE_RUNNING, STATE_ENDED = range(4)
REPEAT = "something else wrote to it; run it again with a new probe"

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Header:
    """The head of the file, as `struct sharing_header` in `sharing.c`."""

    vcpus: int
    block_bytes: int
    functions: int
    places: int
    slots: int
    blocks_offset: int
    places_offset: int
    slots_offset: int
    recording: int
    state: int
    api_version: int
    guest_vcpus: int
    used_places: int
    memory_mib: int

    @classmethod
    def read(cls, data: bytes | mmap.mmap) -> Header:
        """Return the header of a file's content; `ProbeError` if it is none."""
        if len(data) < HEADER.size:
            raise ProbeError(f"{len(data)} bytes are no sharing file", REPEAT)
        magic, layout, *rest = HEADER.unpack(data[: HEADER.size])
        if magic != MAGIC or layout != LAYOUT:
            raise ProbeError(f"not a sharing file of layout {LAYOUT}: {magic!r}, {layout}", REPEAT)
        header = cls(*rest)
        ends = (
            header.blocks_offset + header.vcpus * header.block_bytes,
            header.places_offset + header.places * 8,
            header.slots_offset + header.slots * SLOT.itemsize,
        )
        if header.block_bytes != BLOCK_BYTES or max(ends) > len(data):
            raise ProbeError("the sharing file's header does not fit its size", REPEAT)
        return header


def header(vcpus: int, functions: int, places: int, slots: int) -> tuple[bytes, int]:
    """Return the header of a new file, and the file's size."""

    def aligned(offset: int) -> int:
        return -(-offset // BLOCKS_OFFSET) * BLOCKS_OFFSET

    places_offset = aligned(BLOCKS_OFFSET + vcpus * BLOCK_BYTES)
    slots_offset = aligned(places_offset + places * 8)
    packed = HEADER.pack(
        *(MAGIC, LAYOUT, vcpus, BLOCK_BYTES, functions, places, slots),
        *(BLOCKS_OFFSET, places_offset, slots_offset),
        *(0, STATE_NEW, 0, 0, 0, 0),
    )
    return packed, slots_offset + slots * SLOT.itemsize


def new_file(vcpus: int, functions: int, places: int, slots: int) -> bytes:
    """Return the content of a file that no plugin has used yet; `slots` is a power of two."""
    head, size = header(vcpus, functions, places, slots)
    return head.ljust(size, b"\0")


@dataclass(frozen=True, eq=False)
class Transfers:
    """One reading, or the difference of two: transfers of cache lines, counted as `sharing.c` says.

    By vCPU, in arrays of shape [vcpus]; by code and line in arrays that belong together row by row.
    """

    user_loads: Counts
    kernel_loads: Counts
    clock_loads: Counts
    """Of the clock's interrupt, which is not in `kernel_loads`, nor in any row."""
    user_stores: Counts
    kernel_stores: Counts
    clock_stores: Counts
    merged: Counts
    """Loads that are counted with the store of the same instruction."""
    overflow: Counts
    """Transfers that found no room in the table."""
    unseen: Counts
    """Accesses whose physical address QEMU did not tell, in and outside of recordings."""
    key: Words
    vaddr: Words
    """One virtual address at which this code has touched this line."""
    row_loads: Counts
    row_stores: Counts

    @property
    def loads(self) -> int:
        """Transfers by loads, without the clock's."""
        return int((self.user_loads + self.kernel_loads).sum())

    @property
    def stores(self) -> int:
        """Transfers by stores and read-modify-writes, without the clock's."""
        return int((self.user_stores + self.kernel_stores).sum())

    @property
    def code(self) -> Counts:
        """Of each row, the number of the code; `SharingProbe.functions` names it."""
        return (self.key & np.uint64((1 << CODE_BITS) - 1)).astype(np.int64)

    @property
    def line(self) -> Counts:
        """Of each row, the line: its physical address by `LINE_BYTES`."""
        return (self.key >> np.uint64(CODE_BITS)).astype(np.int64)

    def __sub__(self, earlier: Transfers) -> Transfers:
        """Return what was counted since `earlier`, a reading of the same probe."""
        if len(self.merged) != len(earlier.merged):
            raise ProbeError(
                "these are readings of different probes, or the second is the earlier one",
                "subtract an earlier one of the same probe",
            )
        loads, stores = rows_since(
            self.key,
            earlier.key,
            (self.row_loads, earlier.row_loads),
            (self.row_stores, earlier.row_stores),
        )
        return Transfers(
            self.user_loads - earlier.user_loads,
            self.kernel_loads - earlier.kernel_loads,
            self.clock_loads - earlier.clock_loads,
            self.user_stores - earlier.user_stores,
            self.kernel_stores - earlier.kernel_stores,
            self.clock_stores - earlier.clock_stores,
            self.merged - earlier.merged,
            self.overflow - earlier.overflow,
            self.unseen - earlier.unseen,
            self.key,
            self.vaddr,
            loads,
            stores,
        )


def parse(data: bytes | mmap.mmap) -> Transfers:
    """Return the counts in a file's content.

    Not all are read at one moment: only outside of recordings do they agree with one another.
    """
    header = Header.read(data)
    if header.state == STATE_NEW:
        raise ProbeError(
            "no QEMU has loaded the sharing probe", "start QEMU with the probe's arguments"
        )
    blocks = np.frombuffer(data, BLOCK, header.vcpus, header.blocks_offset)
    table = np.frombuffer(data, SLOT, header.slots, header.slots_offset)
    table = table[table["key"] != 0]
    table = table[np.argsort(table["key"])]
    return Transfers(
        user_loads=_counts(blocks["user_loads"]),
        kernel_loads=_counts(blocks["kernel_loads"]),
        clock_loads=_counts(blocks["clock_loads"]),
        user_stores=_counts(blocks["user_stores"]),
        kernel_stores=_counts(blocks["kernel_stores"]),
        clock_stores=_counts(blocks["clock_stores"]),
        merged=_counts(blocks["merged"]),
        overflow=_counts(blocks["overflow"]),
        unseen=_counts(blocks["unseen"]),
        key=table["key"],
        vaddr=table["vaddr"],
        row_loads=_counts(table["loads"]),
        row_stores=_counts(table["stores"]),
    )


def _counts(column: Words) -> Counts:
    """Return a column as signed numbers: NumPy makes floats of unsigned ones that meet signed."""
    counts = column.astype(np.int64)
    counts.flags.writeable = False
    return counts


def places(data: bytes | mmap.mmap) -> list[int]:
    """Return the addresses of the places, in the order of their numbers."""
    header = Header.read(data)
    found = np.frombuffer(data, "<u8", header.used_places, header.places_offset)
    return [int(address) for address in found]
