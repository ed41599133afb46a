"""The servers beside MegaPipe: each echoes every byte, whatever the sizes and the endings."""

from collections.abc import Iterator

import pytest

from grader import bench
from grader import variant as variants
from grader.experiment import Session
from grader.lab import LoadShape, load_lab
from grader.station import Station, build
from kernel.build import Kernel

# MegaPipe and io_uring have tests of their own.
PEERS = [
    name
    for name, command in bench.SERVERS.items()
    if not command.startswith(("mp-server", "uring-server"))
]


@pytest.fixture(scope="module")
def station(kernel: Kernel) -> Iterator[Station]:
    lab = load_lab("1-batching")
    with Station(build(lab, variants.solution(lab.folder), kernel)) as booted:
        yield booted


@pytest.mark.parametrize("close", ["rst", "fin"])
@pytest.mark.parametrize(
    ("connections", "per_connection", "size"),
    [(64, 1, 64), (32, 10, 64), (64, 0, 1), (16, 3, 65536), (2000, 1, 64)],
)
@pytest.mark.parametrize("server", PEERS)
def test_every_byte_comes_back(
    station: Station,
    server: str,
    connections: int,
    per_connection: int,
    size: int,
    close: str,
) -> None:
    shape = LoadShape(connections, per_connection, size, close="fin" if close == "fin" else "rst")
    with Session(station, bench.SERVERS[server], shape, 1) as session:
        done = session.run(2 * connections * max(1, per_connection))
    assert done.transactions == 2 * connections * max(1, per_connection)


def test_the_limit_has_nothing_of_a_server(station: Station) -> None:
    shape = LoadShape(256, 1, 64, mode="rounds")
    with Session(station, bench.SERVERS["limit"], shape, 1) as session:
        limit = session.costs(1024, 2048).calls
    for nothing in ("syscalls", "file_alloc", "inode_alloc", "dentry_alloc", "fd_alloc"):
        assert limit[nothing] < 0.02, nothing
    assert limit["sock_alloc"] == pytest.approx(1, abs=0.02)
    # As many packets as any server sends: SYN-ACK, ACK, reply.
    with Session(station, bench.SERVERS["epoll"], shape, 1) as session:
        epoll = session.costs(1024, 2048).calls
    assert limit["start_xmit"] == pytest.approx(epoll["start_xmit"], abs=0.1)
    assert limit["tcp_rcv"] == pytest.approx(epoll["tcp_rcv"], abs=0.1)


def test_the_limit_leaves_nothing(station: Station) -> None:
    session = Session(station, bench.SERVERS["limit"], LoadShape(64, 0, 64), 1).__enter__()
    try:
        session.run(640)
        assert station.machine.run("limit-server --daemon --port 5001").status != 0, "one at a time"
        # Killed with its connections open: they are reset, and nothing is left of them.
        station.machine.run("killall -9 limit-server; sleep 0.5")
        assert station.machine.run("grep -c :1388 /proc/net/tcp").text.strip() == "0"
    finally:
        # As if something had gone wrong: the connections cannot be closed in order any more.
        session.__exit__(KeyboardInterrupt, None, None)
    assert station.machine.run("rmmod mp_limit").status == 0


def test_with_listeners_of_their_own_threads_accept_where_it_arrives(station: Station) -> None:
    shape = LoadShape(256, 1, 64, mode="rounds")
    with Session(station, bench.SERVERS["epoll-reuseport"], shape, 1) as session:
        before = station.probe.read()
        session.run(1024)
        accepted = (station.probe.read() - before).functions["tcp_accept"]
    assert (accepted > 0).all()
