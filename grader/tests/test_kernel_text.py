"""The kernel's code in a guest's memory: what is compared, and what a kernel may change itself."""

from __future__ import annotations

import numpy as np
import pytest

from grader import kernel_text
from grader.kernel_text import Layout, changed
from kernel.build import Kernel

BEGIN = 0xFFFFFFFF81000000


def layout() -> Layout:
    switched = np.zeros(64, dtype=np.bool_)
    switched[20:26] = True
    return Layout(BEGIN, BEGIN + 64, switched, (BEGIN, BEGIN + 16, BEGIN + 32), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([], ""),
        ([0], "a"),
        ([15, 16], "a, b"),
        ([20, 25], ""),
        ([19], "b"),
        ([26, 27], "b"),
        ([63], "c"),
    ],
)
def test_changes_are_named_unless_the_kernel_makes_them(places: list[int], names: str) -> None:
    found = bytearray(64)
    for place in places:
        found[place] = 1
    assert changed(layout(), [bytes(64), bytes(64)], bytes(found)) == names


def test_many_changes_are_counted() -> None:
    starts = tuple(BEGIN + 8 * number for number in range(8))
    place = Layout(BEGIN, BEGIN + 64, np.zeros(64, dtype=np.bool_), starts, tuple("abcdefgh"))
    assert changed(place, [bytes(64)], b"\1" * 64) == "a, b, c, d, e and 3 more"


def test_where_references_differ_nothing_is_said() -> None:
    other = bytes(40) + b"\2" + bytes(23)
    found = bytes(40) + b"\3" + bytes(23)
    assert changed(layout(), [bytes(64), other], found) == ""
    assert changed(layout(), [other, other], found) == "c"


def test_the_layout_of_the_labs_kernel(kernel: Kernel) -> None:
    place = kernel_text.layout(kernel)
    assert place.begin == BEGIN
    assert "do_syscall_64" in place.names
    # The address of a table whose place goes with the initramfs: in these, and not all over them.
    for name in ("__d_lookup", "__d_lookup_rcu", "___d_drop", "__d_rehash"):
        first = place.names.index(name)
        begin, end = (place.starts[index] - place.begin for index in (first, first + 1))
        assert 8 <= place.switched[begin:end].sum() < (end - begin) / 2
    # Jump labels and static calls: some, and a small part of it all.
    assert 10_000 < place.switched.sum() < (place.end - place.begin) / 50
