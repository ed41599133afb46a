"""What the tree keeps of a bench, and what it is laid beside."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from grader import recorded, samples
from grader.bench import SERVERS
from grader.lab import METRICS, LoadShape, known_labs, load_lab

BENCH, SAMPLES = samples.read(recorded.BENCH)
LONG: dict[str, Any] = asdict(LoadShape(256, 0, 64, mode="rounds"))


def test_the_recorded_bench_is_whole() -> None:
    assert set(BENCH["identity"]["servers"]) == set(SERVERS)
    assert BENCH["identity"]["per_connection"] == [0, 1, 10, 32]
    rounds = {(s.server, s.cell): s for s in SAMPLES if s.round >= 2}
    assert len(rounds) == len(SERVERS) * 4


def test_the_limit_is_below_everything_else() -> None:
    limit = recorded.limit(LONG, "instructions", 4)
    assert limit is not None
    others = [s.costs.instructions for s in SAMPLES if s.cell.per_connection == 0
              and s.server != "limit"]  # fmt: skip
    assert 0 < limit.count.mean < min(others)
    syscalls = recorded.limit(LONG, "syscalls", 4)
    assert syscalls is not None
    assert syscalls.count.mean < 0.01


@pytest.mark.parametrize(
    "other",
    [{"connections": 64}, {"mode": "closed"}, {"size": 65}, {"transactions_per_connection": 7}],
)
def test_another_load_has_no_limit(other: dict[str, Any]) -> None:
    assert recorded.limit({**LONG, **other}, "syscalls", 4) is None


def test_neither_has_another_machine_or_what_a_bench_does_not_count() -> None:
    assert recorded.limit(LONG, "syscalls", 2) is None
    assert recorded.limit(LONG, "remote", 4) is None


def test_it_has_what_the_labs_count() -> None:
    metrics = {
        check.metric
        for lab in map(load_lab, known_labs())
        for check in lab.checks
        if check.kind == "reduction"
    }
    assert metrics <= set(METRICS)
    known = {metric for metric in metrics if recorded.limit(LONG, metric, 4)}
    assert known == metrics - {"remote"}
