"""The cost model: weights times counts, and what hangs on a weight."""

import pytest

from grader import model

COUNTS = {"instructions": 1000.0, "syscalls": 2.0}


def test_cycles_are_the_weighted_sum_of_what_was_counted() -> None:
    assert model.cycles(COUNTS) == pytest.approx(1000 + 2 * 150)


def test_each_weight_says_where_it_comes_from() -> None:
    assert all(weight.source for weight in model.WEIGHTS)


def test_an_order_that_hangs_on_a_weight_is_found_out() -> None:
    # One server has the instructions, the other the transfers; they are close.
    servers = {
        "many instructions": {"instructions": 1000.0},
        "many transfers": {"instructions": 100.0, "transfers": 8.0},
    }
    assert model.order(servers) == ("many transfers", "many instructions")
    changed = {(s.weight.count, s.factor) for s in model.sensitivity(servers) if s.changed}
    assert changed == {("transfers", 2.0), ("instructions", 0.5)}


def test_an_order_that_does_not_hang_on_weights_stays() -> None:
    servers = {"less": COUNTS, "more": {name: 10 * count for name, count in COUNTS.items()}}
    assert not any(s.changed for s in model.sensitivity(servers))
