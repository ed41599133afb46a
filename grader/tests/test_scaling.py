"""The scaling model: arithmetic on counts, and what it says of itself."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from grader import model, scaling
from grader.experiment import Window
from grader.samples import Cell, LockUse, Sample

WEIGHT_OF_A_TRANSFER = 109


def sample(server: str, vcpus: int, instructions: int, transfers: int, n: int = 1) -> Sample:
    def window(length: int) -> Window:
        # The clock's are no work.
        clock = 10 * length
        calls = {"transfers": transfers * length, "syscalls": 0}
        return Window(length, 0, instructions * length + clock, clock, calls)

    return Sample(Cell(vcpus, 64, n), server, 0, 1, 0.5, window(1000), window(2000))


FOUND = [
    sample("epoll", 4, 10_000, 100),
    sample("epoll", 1, 10_000, 0),
    sample("BPL", 1, 8_000, 0),
    sample("BPL", 4, 8_000, 10),
]


def test_cycles_are_the_cost_models_and_vcpus_ascend() -> None:
    servers = scaling.grown(FOUND)[1, 64]
    assert list(servers) == ["epoll", "BPL"]
    assert scaling.cycles(servers["epoll"]) == [
        (1, 10_000),
        (4, 10_000 + 100 * WEIGHT_OF_A_TRANSFER),
    ]


def test_a_server_that_moves_nothing_scales_as_the_cores_do() -> None:
    still = scaling.grown([sample("a", v, 5_000, 0) for v in (2, 4, 16)])[1, 64]["a"]
    assert scaling.speed(still) == [(2, 1), (4, 2), (16, 8)]


def test_lines_that_move_take_throughput_away() -> None:
    servers = scaling.grown(FOUND)[1, 64]
    assert dict(scaling.speed(servers["epoll"]))[4] == pytest.approx(4 * 10_000 / 20_900)
    gained = dict(scaling.gain(servers["BPL"], servers["epoll"]))
    assert gained == pytest.approx({1: 1.25, 4: 20_900 / 9_090})


def test_a_gain_is_told_where_both_were_measured() -> None:
    servers = scaling.grown(FOUND[1:])[1, 64]
    assert [vcpus for vcpus, _ in scaling.gain(servers["BPL"], servers["epoll"])] == [1]


def test_the_report_says_that_it_is_a_model() -> None:
    out = io.StringIO()
    scaling.report([*FOUND, sample("limit", 1, 5_000, 0, n=10)], Console(file=out, width=120))
    text = out.getvalue()
    assert "A model, not validated here" in text and "waits" in text
    assert "n = 1, 64 B: times epoll's throughput on as many vCPUs" in text
    # Without epoll there is nothing to compare with.
    assert "n = 10, 64 B: times epoll's" not in text


def locked(vcpus: int, held: int, handovers: float, locks: int = 1) -> Sample:
    """Return a sample of 10,000 cycles, of which each transaction holds a lock for some."""
    plain = sample("a", vcpus, 10_000, 0)
    transactions = plain.short.transactions + plain.long.transactions
    use = LockUse("l", locks, transactions, held * transactions, round(handovers * transactions))
    return dataclasses.replace(plain, locks=(use,))


def test_waiting_is_that_of_the_machine_repairman() -> None:
    # Two cores, one lock: the exact solution of the closed network (MVA) is R = Z + D (1 + Q(1)),
    # with Q(1) = D / (Z + D). Schweitzer's approximation is within a few percent of it.
    held, cores = 2_000, 2
    alone = 10_000.0
    exactly = alone + held * held / alone
    found = scaling.waiting(locked(cores, held, 0.0))
    assert found == scaling.Waiting(10_000, 0, "")
    half = dataclasses.replace(locked(cores, held, 0.5))
    moved = model.cycles({"transfers": 0.5})
    found = scaling.waiting(half)
    assert found.cycles == pytest.approx(exactly, rel=0.03) and found.lock == "l"
    assert found.waited == pytest.approx(found.cycles - 10_000)
    assert moved < 0.03 * exactly


def test_throughput_never_exceeds_what_a_lock_lets_through() -> None:
    # A fifth of each transaction under one lock: never more than five cores' worth.
    many = {n: locked(n, 2_000, 1 - 1 / n) for n in (1, 2, 4, 8, 16, 32)}
    speeds = [value for _, value in scaling.speed(many)]
    assert speeds == sorted(speeds) and speeds[1] > 1.8
    assert speeds[-1] < 10_000 / 2_000
    parts = [part for _, part in scaling.waited(many)]
    assert parts[0] == 0 and parts == sorted(parts)


def test_locks_of_one_name_share_its_visits() -> None:
    one, many = (scaling.waiting(locked(16, 2_000, 0.9, locks)) for locks in (1, 1000))
    assert many.waited < one.waited / 100


def test_the_report_says_where_it_is_waited() -> None:
    out = io.StringIO()
    found = [dataclasses.replace(locked(4, 2_000, 0.75), server=s) for s in ("a", "epoll")]
    scaling.report(found, Console(file=out, width=120))
    text = out.getvalue()
    assert "waiting for locks" in text and "% l" in text and "its queueing" in text
