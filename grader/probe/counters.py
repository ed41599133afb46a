"""The counter file that the plugin writes and the grader reads; its layout is in `probe.c`."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grader.probe.errors import ProbeError

MAGIC = b"MPPROBE\n"
LAYOUT = 3
# As in probe.c: magic, layout, vcpus, functions, block_bytes, blocks_offset | state, api_version,
# guest_vcpus, addresses, marks | passed (the reader's).
HEADER = struct.Struct("<8sIIIIQIIIIII")
PASSED = struct.Struct("<I")
PASSED_OFFSET = HEADER.size - PASSED.size
BLOCKS_OFFSET = 4096
# Words of a block before its functions: user, kernel, clock, in_clock.
FIXED = 4
BLOCK_ALIGN = 128
REPEAT = "something else wrote to it; run it again with a new probe"
STATE_NEW, STATE_COUNTING, STATE_ENDED = range(3)

Counts = npt.NDArray[np.int64]


def rows_since(
    keys: npt.NDArray[np.uint64],
    earlier: npt.NDArray[np.uint64],
    *columns: tuple[Counts, Counts],
) -> list[Counts]:
    """Return what columns of a growing table, now and earlier, have had since.

    `keys` are those of the rows, ascending; a row that is new had nothing. Raises `ProbeError`
    unless every earlier key is still there.
    """
    at = np.searchsorted(keys, earlier)
    if len(earlier) > len(keys) or (keys[np.minimum(at, len(keys) - 1)] != earlier).any():
        raise ProbeError(
            "these are readings of different probes, or the second is the earlier one",
            "subtract an earlier one of the same probe",
        )
    since = []
    for now, then in columns:
        column = now.copy()
        column[at] -= then
        since.append(column)
    return since


@dataclass(frozen=True)
class Total:
    """Counts summed over all vCPUs."""

    user: int
    kernel: int
    clock: int
    """Of the kernel's instructions, those in the interrupt of the clock."""
    functions: Mapping[str, int]

    @property
    def instructions(self) -> int:
        """User and kernel instructions together."""
        return self.user + self.kernel


@dataclass(frozen=True, eq=False)
class Counters:
    """One reading, or the difference of two: arrays of shape [vcpus], in instructions or calls."""

    user: Counts
    kernel: Counts
    clock: Counts
    functions: Mapping[str, Counts]

    def __sub__(self, earlier: Counters) -> Counters:
        """Return what was counted since `earlier`, a reading of the same probe."""
        if len(self.user) != len(earlier.user) or list(self.functions) != list(earlier.functions):
            raise ProbeError(
                "these are readings of different probes", "subtract one of the same probe"
            )
        return Counters(
            self.user - earlier.user,
            self.kernel - earlier.kernel,
            self.clock - earlier.clock,
            {name: calls - earlier.functions[name] for name, calls in self.functions.items()},
        )

    @property
    def total(self) -> Total:
        """The sums over all vCPUs."""
        sums = {name: int(calls.sum()) for name, calls in self.functions.items()}
        return Total(int(self.user.sum()), int(self.kernel.sum()), int(self.clock.sum()), sums)

    def never_executed(self, expected: Iterable[str]) -> tuple[str, ...]:
        """Return those of the counters `expected` that no vCPU has moved.

        To be asked of a known-good run that does everything which is to be counted: a counter
        that stays at 0 there has a wrong address, or a function that the compiler inlined.
        """
        names = list(expected)
        for name in names:
            if name not in self.functions:
                raise ProbeError(f"no counter {name}", f"use one of: {', '.join(self.functions)}")
        return tuple(name for name in names if not self.functions[name].any())


@dataclass(frozen=True)
class Header:
    """The head of a counter file, as `struct probe_header` in `probe.c`."""

    vcpus: int
    functions: int
    block_bytes: int
    blocks_offset: int
    state: int
    api_version: int
    guest_vcpus: int
    addresses: int
    marks: int
    passed: int

    @classmethod
    def read(cls, data: bytes | mmap.mmap) -> Header:
        """Return the header of a counter file's content; `ProbeError` if it is none."""
        if len(data) < HEADER.size:
            raise ProbeError(f"{len(data)} bytes are no counter file", REPEAT)
        magic, layout, *rest = HEADER.unpack(data[: HEADER.size])
        if magic != MAGIC or layout != LAYOUT:
            raise ProbeError(f"not a counter file of layout {LAYOUT}: {magic!r}, {layout}", REPEAT)
        header = cls(*rest)
        if (
            header.block_bytes < _block_bytes(header.functions)
            or header.block_bytes % BLOCK_ALIGN
            or len(data) < header.blocks_offset + header.vcpus * header.block_bytes
        ):
            raise ProbeError("the counter file's header does not fit its size", REPEAT)
        return header


def _block_bytes(functions: int) -> int:
    return -(-8 * (FIXED + functions) // BLOCK_ALIGN) * BLOCK_ALIGN


def new_file(vcpus: int, functions: int) -> bytes:
    """Return the content of a counter file that no plugin has used yet."""
    block = _block_bytes(functions)
    header = HEADER.pack(
        MAGIC, LAYOUT, vcpus, functions, block, BLOCKS_OFFSET, STATE_NEW, 0, 0, 0, 0, 0
    )
    return header.ljust(BLOCKS_OFFSET + vcpus * block, b"\0")


def parse(data: bytes | mmap.mmap, names: Sequence[str]) -> Counters:
    """Return the counters in a counter file's content, its functions called `names` in order.

    Each count is read whole, but not all at one moment: take a reading that matters while the
    guest is idle.
    """
    header = Header.read(data)
    if header.state == STATE_NEW:
        raise ProbeError("no QEMU has loaded the probe", "start QEMU with the probe's arguments")
    if header.functions != len(names):
        raise ProbeError(
            f"the counter file has {header.functions} functions, not {len(names)}", REPEAT
        )
    words = header.block_bytes // 8
    raw = np.frombuffer(data, "<u8", header.vcpus * words, header.blocks_offset)
    # Signed, since NumPy makes floats of unsigned integers that meet signed ones.
    table = raw.reshape(header.vcpus, words).astype(np.int64)
    table.flags.writeable = False
    calls = {name: table[:, FIXED + index] for index, name in enumerate(names)}
    return Counters(table[:, 0], table[:, 1], table[:, 2], calls)
