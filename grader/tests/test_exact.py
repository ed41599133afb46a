"""Exact mode: the same to the last instruction, and wrong bytes or lost clients are no result."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from grader import exact, latency, lockstep
from grader.errors import UsageError
from grader.experiment import ExperimentFailed, slope
from grader.lab import LoadShape, load_lab
from grader.probe.loading import compile_library
from grader.probe.lock_file import Locks
from grader.progress import Progress
from grader.samples import Cell, LockUse, Sample
from grader.station import Built, Stopped, build_solution
from images.build import Image

LAB = "3-lwsocket"
RESULT = json.dumps({"outcome": "complete"})
BAD_RESULT = json.dumps({"outcome": "errors"})


@pytest.mark.parametrize("vcpus", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("per_connection", [0, 1, 10, 128])
def test_windows_are_whole_lives_of_all_connections(vcpus: int, per_connection: int) -> None:
    load = exact.shape(Cell(vcpus, 64, per_connection))
    warm_up, short, long = exact.windows(load)
    for length in (warm_up, short, long):
        # Each client has a whole number of lives, too.
        assert length % (load.connections * max(1, per_connection)) == 0
        assert length % vcpus == 0
    assert long == 2 * short


def test_the_command_says_all_that_the_load_is() -> None:
    load = LoadShape(8, 3, 100, mode="closed", close="fin", pause_us=7)
    made = Image(Path("initramfs"), "key")
    words = exact.script("server --batch", load, 4, exact.Setting(turn=5), made).command.split()
    assert words[:5] == ["exact", "4", "4", "5", "5000"]
    options = dict(zip(words[6:-4:2], words[7:-4:2], strict=False))
    assert options["--connections"] == "2" and options["--pause"] == "7"
    assert options["--mode"] == "closed" and options["--close"] == "fin"
    assert words[words.index("--") + 1 :] == ["server", "--batch", "--buffer", "4096"]
    # The kernel's command line has 2,048 characters, most of them taken.
    assert len(" ".join(words)) < 500


def test_connections_that_cannot_be_shared_out_are_refused() -> None:
    made = Image(Path("initramfs"), "key")
    with pytest.raises(ValueError, match="6 connections for 4 clients"):
        exact.script("server", LoadShape(6, 1), 4, exact.Setting(), made)


@pytest.mark.parametrize("turn", [-1, 1, 65536])
def test_turns_that_cannot_be(turn: int) -> None:
    with pytest.raises(UsageError, match="--turn"):
        exact.Setting(turn)


@pytest.mark.parametrize(
    ("said", "clients", "problem"),
    [
        ("", 1, "ended with status"),
        ("1\nexact: no veth\n", 1, "status 1: exact: no veth"),
        (f"0\n{RESULT}\n", 2, "of 2 clients 1 had"),
        (f"0\n{RESULT}\n{BAD_RESULT}\n", 2, "of 2 clients 1 had"),
        ("0\n{cut off", 1, "makes no sense"),
    ],
)
def test_what_is_no_result(said: str, clients: int, problem: str) -> None:
    with pytest.raises(ExperimentFailed, match=problem):
        exact.check(said, clients)


def test_what_is_a_result() -> None:
    exact.check(f"0\n{RESULT}\n{RESULT}\n", 2)


def test_numbers_of_latency() -> None:
    assert latency.numbers("--thresholds", (), (1, 2)) == (1, 2)
    assert latency.numbers("--thresholds", (1, 7), latency.THRESHOLDS) == (1, 7)
    with pytest.raises(UsageError, match="--thresholds: numbers from 1 to 256"):
        latency.numbers("--thresholds", (257,), latency.THRESHOLDS)


def test_busy_locks_stand_alone_and_others_by_their_name() -> None:
    names = {
        1: "listener",
        2: "socket",
        3: "socket",
        4: "socket",
        5: "never",
        6: "once",
        7: "twice",
    }
    used = Locks(
        vaddr=np.arange(1, 8, dtype=np.uint64),
        visits=np.array([1000, 15, 10, 300, 0, 1, 2]),
        held=np.array([500, 100, 50, 9000, 0, 7, 3]),
        handovers=np.array([900, 0, 1, 0, 0, 1, 1]),
    )
    assert exact.lock_uses(used, names.__getitem__, 1000) == (
        # One that is taken often, and by one CPU alone, is like the others of its name.
        LockUse("socket", 3, 325, 9150, 1),
        LockUse("listener", 1, 1000, 500, 900),
        LockUse(exact.OTHER_LOCKS, 2, 3, 10, 2),
    )


# --- in a machine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Built:
    return build_solution(load_lab(LAB), Progress(quiet=True))


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    yield threading.Event()


@pytest.mark.vm
@pytest.mark.parametrize("turn", [0, exact.TURN])
def test_two_runs_are_identical(built: Built, turn: int) -> None:
    setting = exact.Setting(turn, sharing=True)
    made = exact.image(built)
    with exact.machines() as (pool, stop):
        runs = [
            pool.submit(exact.measure_cell, built, made, Cell(2, 64, 1), "BPL", setting, stop)
            for _ in range(2)
        ]
        first, second = (run.result() for run in runs)
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(second, seconds=0.0)
    calls = slope(first.short, first.long).calls
    # What it is about was counted: a connection each, on the server's side alone, and lines.
    # (With turns some entries in a thousand are counted twice: of functions, it seems, in whose
    # first instructions a turn ends.)
    assert calls["tcp_accept"] == pytest.approx(1, abs=0.01) and calls["file_alloc"] == 0
    assert calls[exact.TRANSFERS] > calls[exact.HANDOVERS] > 0
    # Each connection takes the lock of its socket several times, and nobody else does.
    sockets = [use for use in first.locks if use.name.startswith("TCP+") and use.locks > 1]
    transactions = first.short.transactions + first.long.transactions
    assert sum(use.visits for use in sockets) > transactions
    assert all(use.held > use.visits >= use.handovers for use in first.locks)


RESTLESS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

/* The main loop wakes up by itself, 300 us after the last time at most. */
__attribute__((visibility("default")))
int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
	static int (*real)(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);
	struct timespec soon = { .tv_nsec = rand() % 300000 };

	if (!real)
		real = dlsym(RTLD_NEXT, "ppoll");
	return real(fds, count, gettid() == getpid() ? &soon : timeout, mask);
}
"""


@pytest.mark.vm
def test_when_the_host_wakes_the_main_loop_does_not_matter(
    built: Built, stop: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, restless = tmp_path / "restless.c", tmp_path / "restless.so"
    source.write_text(RESTLESS)
    compile_library(source, restless)
    lockstep_itself = lockstep.libraries()
    made = exact.image(built)

    def measured(*libraries: Path) -> Sample:
        monkeypatch.setattr(lockstep, "libraries", lambda: list(libraries))
        sample = exact.measure_cell(built, made, Cell(1, 64, 1), "P", exact.Setting(), stop)
        return dataclasses.replace(sample, seconds=0.0)

    expected = measured(*lockstep_itself)
    assert measured(*lockstep_itself, restless) == expected
    # It would, if the main loop came in whenever it likes.
    assert any(measured(restless) != expected for _ in range(2))


@pytest.mark.vm
def test_shorter_turns_interleave_more(built: Built) -> None:
    made = exact.image(built)
    load = exact.shape(Cell(2, 64, 1))
    settings = [exact.Setting(turn, sharing=True) for turn in (0, exact.TURN)]
    with exact.machines() as (pool, stop):
        runs = [
            pool.submit(exact.measure, built, made, "epoll-server", load, 2, setting, stop)
            for setting in settings
        ]
        longest, shorter = (run.result().costs.calls[exact.TRANSFERS] for run in runs)
    assert shorter > 1.1 * longest


@pytest.mark.vm
def test_a_server_that_does_not_start_is_no_result(built: Built, stop: threading.Event) -> None:
    made = exact.image(built)
    with pytest.raises(ExperimentFailed, match="the server does not start"):
        exact.measure(
            built, made, "mp-server --no-such", LoadShape(2, 1), 1, exact.Setting(0), stop
        )


@pytest.mark.vm
def test_a_run_that_is_given_up_ends_at_once(built: Built, stop: threading.Event) -> None:
    made = exact.image(built)
    stop.set()
    with pytest.raises(Stopped):
        exact.measure_cell(built, made, Cell(1, 64, 1), "BPL", exact.Setting(0), stop)


@pytest.mark.vm
def test_latency_comes_from_the_clients_own_samples(built: Built, stop: threading.Event) -> None:
    row = latency.measure(built, exact.image(built), 32, 8, stop)
    assert row.latency.count == 2 * exact.windows(LoadShape(8, 0))[1]
    assert 0 < row.latency.p50 <= row.latency.p99 <= row.latency.max
    assert 0 < row.system_calls < 1
