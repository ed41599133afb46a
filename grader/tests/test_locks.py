"""The lock probe's file, and which functions it follows."""

from __future__ import annotations

import numpy as np
import pytest

from grader.probe import lock_file, locks
from grader.probe.errors import ProbeError
from grader.probe.lock_file import HEADER, SLOT, SLOTS_OFFSET, STATE_COUNTING, Header
from grader.probe.locks import Kind, LockProbe
from grader.probe.symbols import Symbols


def content(*rows: tuple[int, int, int, int], state: int = STATE_COUNTING, lost: int = 0) -> bytes:
    """Return a file with these locks: address, visits, held, hand-overs."""
    data = bytearray(lock_file.new_file(8))
    magic, layout, slots, offset, *_ = HEADER.unpack(data[: HEADER.size])
    data[: HEADER.size] = HEADER.pack(magic, layout, slots, offset, 0, state, 0, 4, lost)
    table = np.frombuffer(data, SLOT, slots, offset).copy()
    # As they come, not in the order of addresses.
    for at, row in enumerate(rows):
        table[7 - at] = (*row, 0, 0, 0)
    data[offset:] = table.tobytes()
    return bytes(data)


def test_a_difference_has_what_was_done_since() -> None:
    before = lock_file.parse(content((0x2000, 5, 50, 1)))
    after = lock_file.parse(content((0x2000, 8, 90, 2), (0x1000, 1, 7, 0)))
    used = after - before
    assert used.vaddr.tolist() == [0x1000, 0x2000]
    assert used.visits.tolist() == [1, 3]
    assert used.held.tolist() == [7, 40]
    assert used.handovers.tolist() == [0, 1]
    with pytest.raises(ProbeError, match="different probes, or the second"):
        _ = before - after


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"short", "5 bytes are no lock file"),
        (b"x" * 4096, "not a lock file of layout"),
        (lock_file.new_file(8)[:-1], "does not fit its size"),
        (content(state=lock_file.STATE_NEW), "no QEMU has loaded"),
        (content(lost=3), "no room for 3 takings"),
    ],
)
def test_a_file_that_is_none_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ProbeError, match=why):
        lock_file.parse(data)


def test_a_new_file_is_as_long_as_its_header_says() -> None:
    head, size = lock_file.header(locks.SLOTS)
    assert size == SLOTS_OFFSET + locks.SLOTS * SLOT.itemsize
    assert Header.read(head.ljust(size, b"\0")).slots == locks.SLOTS


def test_functions_end_where_the_next_one_begins() -> None:
    symbols = Symbols(
        {
            "release_sock": (0xFFFFFFFF81000100,),
            "mutex_lock": (0xFFFFFFFF81000040,),
            "something": (0xFFFFFFFF81000080,),
            "lock_sock_nested": (0xFFFFFFFF810000C0,),
            "last": (0xFFFFFFFF81000200,),
        },
        "here",
    )
    assert LockProbe(1, symbols).functions == (
        (0xFFFFFFFF81000040, 0xFFFFFFFF81000080, Kind.TAKES),
        (0xFFFFFFFF810000C0, 0xFFFFFFFF81000100, Kind.OWNS),
        (0xFFFFFFFF81000100, 0xFFFFFFFF81000200, Kind.GIVES),
    )
