"""The module and the library in the machine: bad input, many connections, the debug kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grader import variant as variants
from grader.experiment import Session
from grader.lab import LoadShape, load_lab
from grader.machine import Machine
from grader.probe import REPORTERS
from grader.station import Station, build
from kernel.build import Kernel

LAB = load_lab("1-batching")
SEED = 7
BATCHED = "mp-server --batch"
SERVERS = [BATCHED, "mp-server", "epoll-server"]
# Loading a module from outside the tree taints; kmemleak is asked separately.
NOT_A_REPORT = {"taint", "kmemleak"}


@pytest.fixture(scope="module")
def station(kernel: Kernel) -> Iterator[Station]:
    with Station(build(LAB, variants.solution(LAB.folder), kernel)) as booted:
        yield booted


@pytest.fixture(scope="module")
def debug_station(debug_kernel: Kernel) -> Iterator[Station]:
    built = build(LAB, variants.solution(LAB.folder), debug_kernel)
    with Station(built, memory_mib=1536) as booted:
        yield booted


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    "shape",
    [
        LoadShape(32, 1, 1, close="fin"),
        LoadShape(8, 4, 65536),
        LoadShape(64, 16, 64, mode="rounds"),
    ],
    ids=["short", "large", "rounds"],
)
def test_servers_echo_every_byte(station: Station, server: str, shape: LoadShape) -> None:
    with Session(station, server, shape, SEED) as session:
        phase = session.run(4 * shape.connections * shape.transactions_per_connection)
    assert phase.error_count == 0
    assert phase.packets_dropped == 0


def test_5000_connections_at_a_time(station: Station) -> None:
    with Session(station, BATCHED, LoadShape(5000, 0, 64), SEED) as session:
        phase = session.run(5000)
    assert phase.max_established == 5000
    assert (phase.transactions, phase.error_count) == (5000, 0)


def test_each_counter_of_the_probe_is_executed(station: Station) -> None:
    before = station.probe.read()
    for server in (BATCHED, "epoll-server"):
        with Session(station, server, LoadShape(16, 2, 64), SEED) as session:
            session.run(64)
    moved = station.probe.read() - before
    expected = ["syscalls", "epoll_wait", "read", "write", "accept", "ioctl", "close", "file_alloc",
                "sock_inode_alloc", "dentry_alloc", "tcp_accept", "tcp_rcv", "tcp_sendmsg",
                "tcp_recvmsg", "wakeups", "schedules", "context_switches", "virtnet_poll",
                "start_xmit"]  # fmt: skip
    assert moved.never_executed(expected) == ()


def _conformance(machine: Machine, options: str = "", uid: int | None = None) -> None:
    done = machine.run(f"mp-test {options}", timeout=900, uid=uid)
    text = done.text
    assert done.status == 0, "\n".join(line for line in text.splitlines() if "FAIL" in line)
    assert text.count("\nok ") + text.startswith("ok ") > 40


def test_bad_input_gets_its_errno(station: Station) -> None:
    _conformance(station.machine)


def test_bad_input_of_an_ordinary_user(station: Station) -> None:
    _conformance(station.machine, uid=1000)


def _reports(station: Station) -> dict[str, int]:
    total = station.probe.read().total
    return {
        counted.name: total.functions[counted.name]
        for counted in REPORTERS
        if counted.name in total.functions and counted.name not in NOT_A_REPORT
    }


def test_the_debug_kernel_has_nothing_to_report(debug_station: Station) -> None:
    """The same bad input and load under KASAN, lockdep, kmemleak and UBSAN."""
    machine = debug_station.machine
    before = _reports(debug_station)
    assert before.keys() >= {"kasan", "lockdep", "ubsan", "warn", "oops", "panic"}
    # Each mode on the plain kernel, and batching, where the races are, on this one.
    _conformance(machine, "--batch --limit 150")
    for server in (BATCHED, "mp-server"):
        for shape in (LoadShape(64, 1, 64, close="fin"), LoadShape(16, 4, 65536)):
            with Session(debug_station, server, shape, SEED) as session:
                session.run(2 * shape.connections * shape.transactions_per_connection)
    assert _reports(debug_station) == before
    # A killed server leaves its channels to the kernel; what is then unreachable is a leak.
    leaks = "echo scan > /sys/kernel/debug/kmemleak"
    machine.run(leaks, timeout=120)
    machine.run("sleep 6; " + leaks, timeout=120)
    found = machine.run("cat /sys/kernel/debug/kmemleak", timeout=60).text
    assert "mp_" not in found, found
    assert machine.run("rmmod megapipe", timeout=60).status == 0
    # The module's own cache must be empty to be destroyed without a complaint.
    assert _reports(debug_station) == before
