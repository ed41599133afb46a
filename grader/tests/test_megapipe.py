"""The module and the library in the machine: bad input, many connections, the debug kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from grader import limits
from grader import variant as variants
from grader.experiment import Session
from grader.lab import LoadShape, load_lab
from grader.machine import Machine
from grader.network import HOST_ADDRESS
from grader.station import Station, build
from kernel.build import Kernel

LAB = load_lab("1-batching")
SEED = 7
BATCHED = "mp-server --batch"
EVERYTHING = "mp-server --batch --partition --lwsocket"
SERVERS = [EVERYTHING, BATCHED, "mp-server --partition --lwsocket", "mp-server", "epoll-server"]
SHAPES = [
    LoadShape(32, 1, 1, close="fin"),
    LoadShape(8, 4, 65536),
    LoadShape(64, 16, 64, mode="rounds"),
]
ON_DEBUG = [
    "echo",
    "bad-buffer",
    "indices",
    "foreign-thread",
    "fork",
    "close-pending",
    "kill",
    "no-memory",
    "part-storm",
    "light-convert-traffic",
    "light-short",
    "light-charges",
    "light-buffers",
    "light-storm",
    "signalfd",
    "file-ends",
    "kmemleak",
]

ON_DEBUG_LOAD = [
    LoadShape(64, 1, 64, mode="rounds"),
    LoadShape(64, 10, 64, mode="rounds"),
    LoadShape(64, 0, 64, mode="rounds"),
    LoadShape(8, 2, 65536, close="fin"),
]

COUNTED_SLABS = ["TCP", "request_sock_TCP", "tw_sock_TCP", "sock_inode_cache", "filp", "dentry",
                 "skbuff_head_cache", "skbuff_fclone_cache"]  # fmt: skip
# Where an ordinary user's path lacks it.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


# A machine for each test: one that is lost costs no other test.
@pytest.fixture
def station(kernel: Kernel) -> Iterator[Station]:
    with Station(build(LAB, variants.solution(LAB.folder), kernel)) as booted:
        yield booted


@pytest.mark.parametrize("server", SERVERS)
def test_servers_echo_every_byte(station: Station, server: str) -> None:
    for shape in SHAPES:
        with Session(station, server, shape, SEED) as session:
            phase = session.run(4 * shape.connections * shape.transactions_per_connection)
        assert phase.error_count == 0, shape
        assert phase.packets_dropped == 0, shape


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
                "start_xmit", "fd_alloc", "tcp_close"]  # fmt: skip
    assert moved.never_executed(expected) == ()


def test_a_lightweight_socket_has_no_file_inode_dentry_or_descriptor(station: Station) -> None:
    shape = LoadShape(64, 1, 64, mode="rounds")
    with Session(station, EVERYTHING, shape, SEED) as session:
        light = session.costs(512, 1024).calls
    with Session(station, BATCHED, shape, SEED) as session:
        plain = session.costs(512, 1024).calls
    for name in ("file_alloc", "inode_alloc", "dentry_alloc", "fd_alloc"):
        assert light[name] == 0, name
        assert plain[name] == pytest.approx(1, abs=0.05), name
    assert light["tcp_accept"] == pytest.approx(1, abs=0.05)


def _sources_of_queues(station: Station, each: int) -> dict[int, list[str]]:
    """Find, for each queue, so many addresses of the load whose connections arrive on it.

    The tap chooses a new flow's queue by a hash that only this machine knows.
    """
    found: dict[int, list[str]] = {queue: [] for queue in range(4)}
    port = 20000
    # The first reply waits for ARP and leaves from wherever that is answered: the tap takes the
    # flow there, and on.
    with Session(station, EVERYTHING, LoadShape(1, 1), SEED) as session:
        session.run(1)
    while any(len(sources) < each for sources in found.values()):
        port += 1
        source = f"{HOST_ADDRESS}:{port}"
        before = station.probe.read()
        with Session(station, EVERYTHING, LoadShape(1, 1), SEED, [source]) as session:
            session.run(4)
        arrived = (station.probe.read() - before).functions["tcp_rcv"]
        queue = int(arrived.argmax())
        # One that was dragged elsewhere under way may be dragged back.
        if arrived[queue] == arrived.sum() and len(found[queue]) < each:
            found[queue].append(source)
    return found


def _alone(station: Station, source: str) -> Mapping[str, Any]:
    """Return, by vCPU, what is counted while one flow is driven that stays on its queue.

    The tap moves a flow to the queue of its replies, and on a loaded host one of these can leave
    from elsewhere: then it is driven once more.
    """
    for _ in range(5):
        with Session(station, EVERYTHING, LoadShape(1, 1), SEED, [source]) as session:
            before = station.probe.read()
            session.run(30)
            calls = (station.probe.read() - before).functions
        if calls["tcp_rcv"].max() >= 0.99 * calls["tcp_rcv"].sum():
            break
    return calls


def test_partitioned_work_is_done_where_it_arrives(station: Station) -> None:
    driven = set()
    for sources in _sources_of_queues(station, 3).values():
        for source in sources:
            calls = _alone(station, source)
            queue = int(calls["tcp_rcv"].argmax())
            driven.add(queue)
            for name in ("tcp_accept", "tcp_rcv", "tcp_recvmsg", "tcp_sendmsg", "tcp_close"):
                assert calls[name].sum() >= 30, name
                assert calls[name][queue] >= 0.99 * calls[name].sum(), (queue, name, calls[name])
    assert driven == {0, 1, 2, 3}


def test_a_channel_answers_while_a_file_on_a_slow_disk_is_read(
    kernel: Kernel, tmp_path: Path
) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, env={**os.environ, "PATH": PATH})
    built = build(LAB, variants.solution(LAB.folder), kernel)
    with Station(built, counted=False, disk=image, disk_bytes_per_second=2 << 20) as station:
        mounted = station.machine.run("mkdir /mnt && mount -t ext4 /dev/vda /mnt")
        assert mounted.status == 0, mounted.text
        done = station.machine.run("mp-test --disk /mnt/file", timeout=120)
        assert done.status == 0, done.text
        assert done.text.endswith("ok disk\n")


def _slabs(station: Station) -> dict[str, int]:
    """Return the objects in use of each slab cache, after everything that can go has gone."""
    run = station.machine.run
    run("sync; echo 3 > /proc/sys/vm/drop_caches; sleep 1")
    run("for cache in /sys/kernel/slab/*/shrink; do echo 1 > $cache; done", timeout=120)
    rows = [line.split() for line in run("cat /proc/slabinfo").text.splitlines()[2:]]
    return {row[0]: int(row[1]) for row in rows}


def test_50000_short_connections_leave_nothing(kernel: Kernel) -> None:
    built = build(LAB, variants.solution(LAB.folder), kernel)
    with Station(built, counted=False, kernel_args=["slab_nomerge"]) as station:
        shape = LoadShape(64, 1, 64)
        with Session(station, EVERYTHING, shape, SEED) as session:
            session.run(1000)
        before = _slabs(station)
        with Session(station, EVERYTHING, shape, SEED) as session:
            session.run(50_000)
        after = _slabs(station)
    print({name: (before[name], after[name]) for name in sorted(after) if name in COUNTED_SLABS})
    assert (after["mp_handle"], after["mp_lwsocket"]) == (0, 0)
    for name in COUNTED_SLABS:
        # Per-processor lists keep some; one object for each hundred connections would be a leak.
        assert after[name] <= before[name] + 500, (name, before[name], after[name])


def test_an_ordinary_user_cannot_exhaust_memory_through_channels(station: Station) -> None:
    run = station.machine.run
    limit = run("mkdir /sys/fs/cgroup/user && echo 32M > /sys/fs/cgroup/user/memory.max")
    assert limit.status == 0, limit.text
    done = run(
        "echo $$ > /sys/fs/cgroup/user/cgroup.procs && ulimit -n 100000 && "
        "exec su lab -c 'mp-test --exhaust'",
        timeout=120,
    )
    # Stopped by its limit: refused, or ended by the kernel for its group alone.
    assert done.status in (0, -9), done.text
    events = run("cat /sys/fs/cgroup/user/memory.events").text
    assert "max 0\n" not in events, events
    with Session(station, EVERYTHING, LoadShape(64, 4, 64), SEED) as session:
        session.run(1024)


def _conformance(machine: Machine, options: str = "", uid: int | None = None) -> None:
    done = machine.run(f"mp-test {options}", timeout=900, uid=uid)
    text = done.text
    assert done.status == 0, "\n".join(line for line in text.splitlines() if "FAIL" in line)
    assert text.count("\nok ") + text.startswith("ok ") > 40


def test_bad_input_gets_its_errno(station: Station) -> None:
    _conformance(station.machine)


def test_bad_input_of_an_ordinary_user(station: Station) -> None:
    _conformance(station.machine, uid=1000)


def test_the_debug_kernel_has_nothing_to_report(
    debug_kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured load, bad input and work left pending, under KASAN, lockdep, kmemleak, UBSAN.

    Bad input is a selection, and nothing is counted: this kernel is some twenty times slower.
    mp-test without arguments runs everything; each case fails if the kernel's log gets a report.
    """
    usual = limits.factor()
    monkeypatch.setattr(limits, "factor", lambda: 5 * usual)
    built = build(LAB, variants.solution(LAB.folder), debug_kernel)
    with Station(built, memory_mib=1536, counted=False) as station:
        machine = station.machine
        for server in (BATCHED, "mp-server"):
            for shape in ON_DEBUG_LOAD:
                with Session(station, server, shape, SEED) as session:
                    each = max(1, shape.transactions_per_connection)
                    session.run(2 * shape.connections * each)
        done = machine.run(f"mp-test --batch --limit 100 {' '.join(ON_DEBUG)}", timeout=400)
        assert done.status == 0, done.text
        assert done.text.count("ok ") == len(ON_DEBUG)
        # The module's own cache must be empty to be destroyed without a complaint.
        assert machine.run("rmmod megapipe", timeout=60).status == 0
        machine.watch()
        assert machine.console.transcript.reports() == []
