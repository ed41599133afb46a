"""The bench: what is measured, what is kept, and what is said of it; from made-up counts."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from grader import bench, compare, samples
from grader.errors import UsageError, UserError
from grader.experiment import Window
from grader.lab import load_lab
from grader.samples import Cell, Journal, Sample

CELL = Cell(4, 64, 10)
IDENTITY = {
    "servers": ["epoll"],
    "per_connection": [10],
    "sizes": [64],
    "vcpus": [4],
    "seed": 1,
    "commands": {"epoll": "epoll-server"},
    "kernel_key": "k",
    "module_key": "m",
    "image_key": "i",
}
ENVIRONMENT = {
    "qemu": "QEMU 7.2",
    "cpu_model": "EPYC",
    "accelerator": "tcg",
    "host_processor": "some",
    "host_cpus": 2,
    "commit": "",
    "time": "2026-11-26T00:00:00+0000",
}


def _sample(server: str, number: int, instructions: int, syscalls: float = 2.0) -> Sample:
    """Return a sample with so many instructions per transaction, and 5,000 beside them."""

    def window(transactions: int) -> Window:
        calls = {"syscalls": round(transactions * syscalls), "wakeups": 0, "file_alloc": 0}
        kernel = 5000 + (instructions + 30) * transactions
        return Window(transactions, 100 * transactions, kernel, 30 * transactions, calls)

    return Sample(CELL, server, number, 1 + number, 1.5, window(2560), window(5120))


def test_a_cost_is_the_slope_between_the_windows() -> None:
    costs = _sample("epoll", 0, 900).costs
    assert costs.instructions == 1030
    assert costs.work == 1000
    assert costs.calls["syscalls"] == 2.0


def test_in_exact_mode_a_cost_is_all_that_was_counted() -> None:
    sample = dataclasses.replace(_sample("epoll", 0, 900), exact=True)
    assert sample.costs.work == pytest.approx(1000 + 2 * 5000 / (2560 + 5120))
    assert sample.costs.calls["syscalls"] == 2.0
    assert Sample.from_json(sample.as_json(), {**IDENTITY, "exact": {"turn": 12}}) == sample
    assert Sample.from_json(sample.as_json(), IDENTITY) != sample


def test_ratio_and_tax_are_taken_round_by_round() -> None:
    # The second round was dearer for everybody; the ratios are the same in both.
    found = [
        _sample(server, number, instructions - 100)
        for number, factor in enumerate((1, 2))
        for server, instructions in (
            ("epoll", 2000 * factor),
            ("BPL", 1100 * factor),
            ("limit", 1000 * factor),
        )
    ]
    (one,) = compare.compare(found)
    ratio = one.ratio("BPL", compare.instructions)
    tax, removed = (f("BPL", compare.instructions) for f in (one.tax, one.removed))
    assert ratio and tax and removed
    assert ratio.mean == pytest.approx(0.55)
    assert ratio.half == pytest.approx(0)
    assert tax.mean == pytest.approx(0.1)
    assert removed.mean == pytest.approx(0.9)
    assert one.spread("epoll", compare.instructions).half > 1000


def test_a_round_that_was_cut_short_is_left_out() -> None:
    found = [_sample("epoll", number, 900) for number in range(3)]
    found += [_sample("limit", number, 400) for number in range(2)]
    (one,) = compare.compare(found)
    assert {name: len(s) for name, s in one.samples.items()} == {"epoll": 2, "limit": 2}
    assert one.tax("epoll", compare.calls("wakeups")) is None  # 0 by 0
    assert compare.compare(found[:1]) == []


def test_the_table_shows_mean_interval_and_tax() -> None:
    found = [
        _sample(server, number, instructions - 100, syscalls)
        for number, syscalls in enumerate((2.0, 2.5, 3.0))
        for server, instructions in (("epoll", 1500), ("limit", 1000))
    ]
    console = Console(file=io.StringIO(), width=200)
    bench.report(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1,500 ± 0" in text
    assert "50.0% ± 0.0%" in text
    # Student's t for 2 degrees of freedom is 4.30; the standard error is 0.5 / sqrt(3).
    assert "2.50 ± 1.24" in text
    (drawn,) = compare.compare(found)
    columns = {column.header: list(column.cells) for column in bench.table(drawn).columns}
    assert columns["clock"] == ["30", "30"]
    assert columns["system calls"][0] == "2.50 ± 1.24"
    assert columns["files"][0] == "0.00 ± 0.00"


def test_an_interrupted_bench_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    journal = Journal(out, IDENTITY)
    with journal.open():
        journal.add(_sample("epoll", 0, 900))
    assert not out.exists()
    with journal.path.open("a") as file:
        file.write('{"vcpus": 4, "si')  # the disk was full, or the power gone
    journal = Journal(out, IDENTITY)
    with journal.open():
        assert journal.samples == [_sample("epoll", 0, 900)]
        journal.add(_sample("epoll", 1, 901))
        journal.finish(samples.document(IDENTITY, ENVIRONMENT, journal.samples))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json"]
    found, read = samples.read(out)
    assert found["identity"] == IDENTITY
    assert read == [_sample("epoll", 0, 900), _sample("epoll", 1, 901)]


def test_another_bench_is_not_gone_on_with(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "bench.json", IDENTITY)
    with journal.open():
        journal.add(_sample("epoll", 0, 900))
    other = Journal(tmp_path / "bench.json", {**IDENTITY, "module_key": "n"})
    with pytest.raises(samples.BadResult, match="module_key"), other.open():
        pass
    with other.open(fresh=True):
        assert other.samples == []


def test_two_benches_do_not_share_a_file(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / "bench.json", IDENTITY) for _ in range(2))
    with first.open(), pytest.raises(UserError, match="another bench"), second.open():
        pass


@pytest.mark.parametrize("text", ["", "[]", "nonsense", json.dumps({"version": 9})])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(samples.BadResult, match=r"other\.json"):
        samples.read(path)


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json.journal").write_text("nonsense\n")
    with (
        pytest.raises(samples.BadResult, match="journal"),
        Journal(tmp_path / "bench.json", IDENTITY).open(),
    ):
        pass


@pytest.mark.parametrize(
    ("numbers", "rounds", "sizes", "vcpus"),
    [
        ((-1,), 3, (64,), (4,)),
        ((), 3, (64,), (4,)),
        ((1,), 1, (64,), (4,)),
        ((1,), 3, (0,), (4,)),
        ((1,), 3, (64,), (65,)),
    ],
)
def test_what_cannot_be_measured_is_refused(
    numbers: tuple[int, ...], rounds: int, sizes: tuple[int, ...], vcpus: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError):
        bench.Grid(("epoll",), numbers, sizes, vcpus, rounds)


def test_servers_are_chosen_by_name() -> None:
    assert bench.choose("epoll,BPL,epoll") == ("epoll", "BPL")
    assert bench.choose("all") == tuple(bench.SERVERS)
    with pytest.raises(UsageError, match="tcp"):
        bench.choose("epoll,tcp")


def test_a_bench_with_all_its_samples_needs_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The disk was full at the very end, say.
    grid = bench.Grid(("epoll",), (10,), rounds=2)
    monkeypatch.setattr(bench, "build_solution", lambda *_: None)
    monkeypatch.setattr(bench, "identity", lambda *_: IDENTITY)
    monkeypatch.setattr(bench, "Station", None)
    journal = Journal(tmp_path / "bench.json", IDENTITY)
    with journal.open():
        for number in range(2):
            journal.add(_sample("epoll", number, 900))
    bench.run(load_lab("1-batching"), grid, tmp_path / "bench.json")
    assert samples.read(tmp_path / "bench.json")[1] == journal.samples


def test_windows_are_whole_lives_of_all_connections() -> None:
    for n in (1, 10, 128):
        short, long = bench.windows(Cell(4, 64, n))
        assert short % (256 * n) == 0
        assert long == 2 * short


def test_a_connection_that_stays_open_has_short_windows() -> None:
    open_ended = Cell(4, 64, 0)
    assert bench.windows(open_ended) == (1024, 2048)
    assert open_ended.life == "connections stay open"
    assert bench.Grid(("epoll",), (0,)).seconds < bench.Grid(("epoll",), (1,)).seconds


def test_every_count_is_shown_when_asked_for() -> None:
    found = [_sample("epoll", number, 900, 2.5) for number in range(2)]
    (comparison,) = compare.compare(found)
    columns = {c.header: list(c.cells) for c in bench.counts_table(comparison).columns}
    shown = dict(zip(columns["counter"], columns["epoll"], strict=True))
    # What these samples have not counted is not shown as 0.
    assert shown == {
        "user": "100 ± 0",
        "kernel": "900 ± 0",
        "syscalls": "2.50 ± 0.00",
        "file_alloc": "0.00 ± 0.00",
        "wakeups": "0.00 ± 0.00",
    }
