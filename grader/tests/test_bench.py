"""The table of servers, from recorded costs."""

import io

import pytest
from rich.console import Console

from grader import bench
from grader.errors import UsageError
from grader.experiment import Costs
from grader.lab import load_lab


def _costs(instructions: float, syscalls: float) -> Costs:
    calls = dict.fromkeys(bench.METRICS, 0.0) | {"syscalls": syscalls}
    return Costs(user_instructions=100, kernel_instructions=instructions - 100, calls=calls)


def test_the_table_shows_mean_and_interval() -> None:
    row = bench.Row(10, "epoll", (_costs(1000, 2.0), _costs(1000, 2.5), _costs(1000, 3.0)))
    console = Console(file=io.StringIO(), width=200)
    console.print(bench.table([row]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1,000 ± 0" in text
    # Student's t for 2 degrees of freedom is 4.30; the standard error is 0.5 / sqrt(3).
    assert "2.50 ± 1.24" in text


@pytest.mark.parametrize(("numbers", "rounds"), [([0], 3), ([], 3), ([1], 1)])
def test_what_cannot_be_measured_is_refused(numbers: list[int], rounds: int) -> None:
    with pytest.raises(UsageError):
        bench.run(load_lab("1-batching"), bench.choose("all"), numbers, rounds, 4)


def test_servers_are_chosen_by_name() -> None:
    assert list(bench.choose("epoll,BPL")) == ["epoll", "BPL"]
    assert bench.choose("all") == bench.SERVERS
    with pytest.raises(UsageError, match="tcp"):
        bench.choose("epoll,tcp")
