"""The file in which `stacks.c` counts; its layout is there."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from grader.probe.errors import ProbeError

MAGIC = b"MPSTACK\n"
LAYOUT = 2
# As in stacks.c: magic, layout, vcpus, functions, late_room, node_slots | late, generation |
# state, api_version, nodes, lost_frames, lost_stacks | the three offsets.
HEADER = struct.Struct("<8s5I2I3I2Q3Q")
LATE_OFFSET_IN_HEADER = struct.calcsize("<8s5I")
STATE_NEW = 0
TABLE_OFFSET = 4096
FUNCTION = np.dtype([("vaddr", "<u8"), ("label", "<u4"), ("kind", "<u4")])
NODE = np.dtype([("key", "<u8"), ("instructions", "<u8"), ("entries", "<u8")])
REPEAT = "something else wrote to it; run it again with a new probe"

LABEL_NONE, LABEL_USER, LABEL_UNKNOWN, LABEL_LOST, LABEL_FUNCTIONS = range(5)
ROOT = 0


class Kind(IntEnum):
    """What a function means for the stack; see `stacks.c`."""

    PLAIN = 0
    ENTRY = 1
    TASK = 2
    SWITCH = 3
    TRANSPARENT = 4
    EXIT = 5


@dataclass(frozen=True)
class Header:
    """The head of the file, as `struct stacks_header` in `stacks.c`."""

    vcpus: int
    functions: int
    late_room: int
    node_slots: int
    late: int
    generation: int
    state: int
    api_version: int
    nodes: int
    lost_frames: int
    lost_stacks: int
    functions_offset: int
    late_offset: int
    nodes_offset: int

    @classmethod
    def read(cls, data: bytes | mmap.mmap) -> Header:
        """Return the header of a file's content; `ProbeError` if it is none."""
        if len(data) < HEADER.size:
            raise ProbeError(f"{len(data)} bytes are no file of stacks", REPEAT)
        magic, layout, *rest = HEADER.unpack(data[: HEADER.size])
        if magic != MAGIC or layout != LAYOUT:
            raise ProbeError(
                f"not a file of stacks of layout {LAYOUT}: {magic!r}, {layout}", REPEAT
            )
        header = cls(*rest)
        if header.nodes_offset + header.node_slots * NODE.itemsize > len(data):
            raise ProbeError("the header of the file of stacks does not fit its size", REPEAT)
        return header


def new_file(
    vcpus: int, functions: Sequence[tuple[int, int, int]], late_room: int, node_slots: int
) -> bytes:
    """Return the content of a file that no plugin has used yet.

    `functions` are address, label and kind, by address; `node_slots` is a power of two.
    """
    late = TABLE_OFFSET + len(functions) * FUNCTION.itemsize
    nodes = late + late_room * FUNCTION.itemsize
    header = HEADER.pack(
        MAGIC, LAYOUT, vcpus, len(functions), late_room, node_slots,
        0, 0, STATE_NEW, 0, 0, 0, 0, TABLE_OFFSET, late, nodes,
    )  # fmt: skip
    table = np.array(functions, FUNCTION).tobytes()
    whole = header.ljust(TABLE_OFFSET, b"\0") + table
    return whole.ljust(nodes + node_slots * NODE.itemsize, b"\0")


def nodes(data: bytes | mmap.mmap) -> npt.NDArray[np.void]:
    """Return a copy of the table of nodes; the place of a node never changes."""
    header = Header.read(data)
    if header.state == STATE_NEW:
        raise ProbeError("no QEMU has loaded the probe", "start QEMU with the probe's arguments")
    found = np.frombuffer(data, NODE, header.node_slots, header.nodes_offset).copy()
    found.flags.writeable = False
    return found


def write_late(data: mmap.mmap, functions: Sequence[tuple[int, int, int]]) -> None:
    """Replace the late functions while a plugin may be reading them."""
    header = Header.read(data)
    if len(functions) > header.late_room:
        raise ProbeError(
            f"the modules have {len(functions)} functions, there is room for {header.late_room}",
            "raise LATE_ROOM in grader/probe/stacks.py",
        )
    odd = header.generation | 1
    struct.pack_into("<II", data, LATE_OFFSET_IN_HEADER, header.late, odd)
    table = np.array(functions, FUNCTION).tobytes()
    data[header.late_offset : header.late_offset + len(table)] = table
    struct.pack_into("<II", data, LATE_OFFSET_IN_HEADER, len(functions), odd)
    struct.pack_into("<II", data, LATE_OFFSET_IN_HEADER, len(functions), odd + 1)
