"""The scaling model: arithmetic on counts, and what it says of itself."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from grader import scaling
from grader.experiment import Window
from grader.samples import Cell, Sample

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
