"""What each optimisation contributes, from made-up counts."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from grader import contributions
from grader.experiment import Window
from grader.samples import BadResult, Cell, Sample
from grader.sharing import read_transfers

CELL = Cell(4, 64, 1)
INSTRUCTIONS = {"epoll": 4000, "plain": 5000, "P": 4500, "B": 4000, "BP": 3000, "BPL": 2000}
TRANSFERS = {"epoll": 100.0, "plain": 100.0, "P": 20.0, "B": 100.0, "BP": 20.0, "BPL": 10.0}
ZERO = dict.fromkeys(("syscalls", "context_switches", "ipis", "doorbells"), 0)


def _samples() -> list[Sample]:
    def window(transactions: int, instructions: int) -> Window:
        return Window(transactions, 0, transactions * instructions, 0, ZERO)

    return [
        Sample(CELL, server, number, 1, 1.0, window(10, count), window(20, count))
        for number in range(2)
        for server, count in INSTRUCTIONS.items()
    ]


def _text(transfers: dict[Cell, dict[str, float]]) -> str:
    console = Console(file=io.StringIO(), width=200)
    contributions.report(_samples(), transfers, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_steps_are_shown_in_the_papers_order_and_alone() -> None:
    lines = [line.split() for line in _text({CELL: TRANSFERS}).splitlines()]
    (partition,) = [line for line in lines if line[:5] == ["in", "order:", "epoll", "->", "P"]]
    # 500 instructions more, 80 transfers of 109 cycles less.
    assert partition[5:] == ["-500", "80.0", "8,220", "+123.1", "+211.6"]
    (light,) = [line for line in lines if line[:5] == ["in", "order:", "BP", "->", "BPL"]]
    assert light[5:8] == ["1,000", "10.0", "2,090"]
    (alone,) = [line for line in lines if line[:4] == ["alone:", "plain", "->", "B"]]
    assert alone[4:7] == ["1,000", "0.0", "1,000"]


def test_without_transfers_the_model_has_none() -> None:
    text = _text({})
    assert "transfers x" not in text
    assert "instructions x 1" in text


def test_the_papers_figure_for_the_nearest_n_says_so() -> None:
    assert contributions.paper_at("L", 1) == "+352.1"
    assert contributions.paper_at("L", 10) == "+22.0 (n = 8)"


def test_transfers_of_another_module_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sharing.json"
    identity = {"kernel_key": "k", "module_key": "m"}
    servers = {"BPL": [{"moved": {"loads": 1.0, "stores": 2.0}}]}
    cell = {"vcpus": 4, "size": 64, "per_connection": 1, "servers": servers}
    path.write_text(json.dumps({"identity": identity, "cells": [cell]}))
    assert read_transfers(path, identity) == {CELL: {"BPL": 3.0}}
    with pytest.raises(BadResult, match="another module"):
        read_transfers(path, {**identity, "module_key": "n"})
    path.write_text("[]")
    with pytest.raises(BadResult, match="no result"):
        read_transfers(path, identity)
