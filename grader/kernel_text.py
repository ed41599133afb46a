"""The kernel's code as it lies in a guest's memory, read and compared from outside.

Guests that booted the same kernel have the same code, but for places that the kernel's own tables
list: what it switches at run time, and addresses that it writes into its code at its start and that
go with the size of the initramfs.
"""

from __future__ import annotations

import bisect
import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from elftools.elf.elffile import ELFFile

from grader.machine import Machine
from kernel.build import Kernel

# Where the kernel's image is mapped; without KASLR the rest of an address is the physical one.
_IMAGE = 0xFFFFFFFF80000000
# Borders of the tables of what is switched (jump labels, static calls), and the form of an entry,
# which begins with the distance from itself to the place in the code.
_TABLES = (
    ("__start___jump_table", "__stop___jump_table", "<iiq"),
    ("__start_static_call_sites", "__stop_static_call_sites", "<ii"),
)
_TRAMPOLINE = "__SCT__"
# Sections of the kernel's that list, in the same form, where such addresses are written.
_RUNTIME = "runtime_"
# Of such a place: an address is the longest.
_SWITCH_BYTES = 8
_SHOWN = 5


@dataclass(frozen=True)
class Layout:
    """Where the code of a kernel lies."""

    begin: int
    end: int
    switched: npt.NDArray[np.bool_]
    """For each byte from `begin` on: whether the kernel itself may change it at run time."""
    starts: tuple[int, ...]
    """Of the functions, sorted."""
    names: tuple[str, ...]


@functools.cache
def layout(kernel: Kernel) -> Layout:
    """Read what is needed for comparing."""
    rows = [line.split() for line in kernel.system_map.read_text().splitlines()]
    symbols = {name: int(address, 16) for address, _, name in rows}
    begin, end = symbols["_stext"], symbols["_etext"]
    switched = np.zeros(end - begin, dtype=np.bool_)
    with kernel.vmlinux.open("rb") as file:
        for address in _switches(ELFFile(file), symbols):
            if begin <= address < end:
                switched[address - begin : address - begin + _SWITCH_BYTES] = True
    functions = sorted(
        (int(address, 16), name)
        for address, kind, name in rows
        if kind in "tTwW" and begin <= int(address, 16) < end
    )
    starts, names = zip(*functions, strict=True)
    return Layout(begin, end, switched, starts, names)


def _switches(elf: Any, symbols: dict[str, int]) -> Iterator[int]:
    for first, last, form in _TABLES:
        begin, size = symbols[first], symbols[last] - symbols[first]
        (segment,) = (s for s in elf.iter_segments("PT_LOAD") if _holds(s, begin))
        offset = begin - segment["p_vaddr"]
        data = segment.data()[offset : offset + size]
        for position, entry in enumerate(struct.iter_unpack(form, data)):
            yield begin + position * struct.calcsize(form) + entry[0]
    for section in elf.iter_sections():
        if section.name.startswith(_RUNTIME):
            for position, (distance,) in enumerate(struct.iter_unpack("<i", section.data())):
                yield section["sh_addr"] + 4 * position + distance
    for name, address in symbols.items():
        if name.startswith(_TRAMPOLINE):
            yield address


def _holds(segment: Any, address: int) -> bool:
    return bool(0 <= address - segment["p_vaddr"] < segment["p_filesz"])


def of(machine: Machine, place: Layout) -> bytes:
    """Return the code of a running guest's kernel."""
    return machine.memory(place.begin - _IMAGE, place.end - place.begin)


def changed(place: Layout, references: Sequence[bytes], found: bytes) -> str:
    """Return in which functions `found` differs from all `references`; empty: in none.

    Where these differ among themselves nothing is said.
    """
    first, *others = (np.frombuffer(one, np.uint8) for one in references)
    different = first != np.frombuffer(found, np.uint8)
    for other in others:
        different &= first == other
    names = dict.fromkeys(
        place.names[max(bisect.bisect_right(place.starts, place.begin + int(offset)) - 1, 0)]
        for offset in np.flatnonzero(different & ~place.switched)
    )
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
