"""The io_uring server in the machine: every byte right, also when it runs out of something."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from grader import variant as variants
from grader.experiment import PORT, Session
from grader.lab import LoadShape, load_lab
from grader.station import Station, build
from kernel.build import Kernel

LAB = load_lab("1-batching")
SEED = 7
SHARED = "uring-server"
OWN = "uring-server --reuseport"
# One pair of buffers for each thread: most receives find none.
STARVING = "uring-server --reuseport --buffers 2"


@pytest.fixture(scope="module")
def station(kernel: Kernel) -> Iterator[Station]:
    with Station(build(LAB, variants.solution(LAB.folder), kernel), counted=False) as booted:
        yield booted


def _serve(station: Station, server: str, shape: LoadShape, rounds: int = 4) -> None:
    with Session(station, server, shape, SEED) as session:
        phase = session.run(rounds * shape.connections * max(1, shape.transactions_per_connection))
    assert phase.error_count == 0
    assert phase.packets_dropped == 0


@pytest.mark.parametrize("server", [SHARED, OWN, STARVING])
@pytest.mark.parametrize(
    "shape",
    [
        LoadShape(64, 1, 64, mode="rounds"),
        LoadShape(64, 10, 64, mode="rounds"),
        LoadShape(64, 0, 64, mode="rounds"),
        LoadShape(32, 1, 1, close="fin"),
        LoadShape(64, 10, 16384, mode="rounds", close="fin"),
        LoadShape(16, 4, 65536),
        LoadShape(16, 0, 65536, close="fin"),
    ],
    ids=["n1", "n10", "n0", "fin", "16K", "64K", "64K-open"],
)
def test_every_byte_comes_back(station: Station, server: str, shape: LoadShape) -> None:
    _serve(station, server, shape)


@pytest.mark.parametrize("server", [OWN, STARVING])
def test_5000_connections_at_a_time(station: Station, server: str) -> None:
    with Session(station, server, LoadShape(5000, 0, 64), SEED) as session:
        phase = session.run(5000)
    assert phase.max_established == 5000
    assert (phase.transactions, phase.error_count) == (5000, 0)


def _clients(station: Station, server: str, script: str) -> None:
    """Run a client of `server`, a Python program, until it has ended well."""
    machine = station.machine
    started = machine.run(f"{server} --daemon --port {PORT}")
    assert started.status == 0, started.text
    try:
        argv = [sys.executable, "-c", CLIENT + script, machine.address, str(PORT)]
        with machine.host(argv) as client:
            assert machine.wait(client, timeout=60) == 0
    finally:
        machine.run("killall -9 uring-server; while pidof uring-server; do usleep 10000; done")


CLIENT = """
import selectors, socket, sys, threading

def connect():
    return socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)

def message(number, size):
    return b"".join(b"%d.%d " % (number, word) for word in range(size // 4))[:size]

def expect(connection, wanted):
    got = bytearray()
    while len(got) < len(wanted) and (part := connection.recv(65536)):
        got += part
    assert got == wanted, (len(got), len(wanted))

def echo(connection, number):
    connection.sendall(message(number, 3000))
    expect(connection, message(number, 3000))
"""

# More than the sockets of both ends hold: the server cannot send, and has to stop receiving.
UNREAD = """
size = 12 << 20
def small():
    connection = socket.socket()
    connection.settimeout(60)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, 65536)
    connection.connect((sys.argv[1], int(sys.argv[2])))
    return connection

def write(connection, number):
    try:
        connection.sendall(message(number, size))
    except BrokenPipeError:
        assert number == 1

silent = [small(), small()]
writers = [threading.Thread(target=write, args=pair) for pair in zip(silent, range(2))]
for writer in writers:
    writer.start()
for number in range(20):
    with connect() as other:
        echo(other, number)
assert all(writer.is_alive() for writer in writers)
# Closed with data unread: the server gets a reset.
gone = silent.pop()
gone.shutdown(socket.SHUT_RDWR)
writers.pop().join()
gone.close()
(connection,) = silent
expect(connection, message(0, size))
writers[0].join()
connection.shutdown(socket.SHUT_WR)
assert connection.recv(1) == b""
"""


@pytest.mark.parametrize("options", ["--buffer 4096", "--buffer 4096 --buffers 2"])
def test_a_client_that_does_not_read_holds_up_nobody(station: Station, options: str) -> None:
    _clients(station, f"{SHARED} --threads 1 {options}", UNREAD)


# The request and the end of the stream at once; the client still reads.
HALF_CLOSED = """
for number in range(20):
    with connect() as connection:
        sent = message(number, 200000)
        writer = threading.Thread(target=lambda: (
            connection.sendall(sent), connection.shutdown(socket.SHUT_WR)))
        writer.start()
        expect(connection, sent)
        assert connection.recv(1) == b""
        writer.join()
"""


def test_all_is_sent_before_the_connection_is_closed(station: Station) -> None:
    _clients(station, f"{SHARED} --buffer 4096", HALF_CLOSED)


# An operation of an older connection must not keep a later one's socket.
BESIDE_IDLE = """
with connect() as idle:
    echo(idle, 0)
    for number in range(100):
        with connect() as connection:
            echo(connection, number)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    echo(idle, 1)
"""


def test_an_idle_connection_keeps_no_other_open(station: Station) -> None:
    _clients(station, f"{SHARED} --threads 1", BESIDE_IDLE)


# Those that are accepted late are served as the others leave, many at once. In any order: it is
# that in which the machine's CPUs have ended the handshakes.
MANY = """
wanted, together = message(0, 3000), 16
selector = selectors.DefaultSelector()
for _ in range(100):
    connection = connect()
    connection.sendall(wanted)
    selector.register(connection, selectors.EVENT_READ, bytearray())
served = []
while selector.get_map():
    ready = selector.select(timeout=60)
    assert ready, (len(served), len(selector.get_map()))
    for key, _ in ready:
        part = key.fileobj.recv(65536)
        assert part
        key.data.extend(part)
        if len(key.data) >= len(wanted):
            assert key.data == wanted
            selector.unregister(key.fileobj)
            served.append(key.fileobj)
    if len(served) >= together or not selector.get_map():
        for connection in served:
            connection.close()
        served = []
with connect() as last:
    echo(last, 0)
"""


def test_more_connections_than_descriptors(station: Station) -> None:
    _clients(station, f"ulimit -n 24; {SHARED} --threads 1", MANY)
