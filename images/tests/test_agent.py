"""The guest's agent, run on this machine over a socket: the same program, the same frames."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grader import agent
from grader.agent import Exit, Frame, Frames, Malformed, Type, pack, pack_run, unpack_exit

AGENT = Path(__file__).parents[1] / "guest" / "agent.c"
PATIENCE = 20.0


class Line:
    """The other end of an agent's socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._frames = Frames()
        self._pending: list[Frame] = []

    def send(self, data: bytes) -> None:
        self.end.sendall(data)

    def next(self) -> Frame:
        while not self._pending:
            data = self.end.recv(1 << 16)
            assert data, "the agent has gone"
            self._pending += self._frames.feed(data)
        return self._pending.pop(0)

    def finish(self, number: int) -> tuple[Exit, bytes]:
        output = b""
        while (frame := self.next()).type is Type.OUTPUT:
            assert frame.id == number
            output += frame.payload
        assert frame.type is Type.EXIT and frame.id == number
        return unpack_exit(frame), output

    def run(self, command: str, uid: int = 0, cap: int = 1 << 20) -> tuple[Exit, bytes]:
        self.send(pack_run(5, command, uid, cap))
        return self.finish(5)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agent") / "agent"
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, AGENT, "-o", path], check=True)
    return path


@pytest.fixture
def line(program: Path) -> Iterator[Line]:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    process = subprocess.Popen([str(program), "-"], stdin=theirs.fileno(), stderr=subprocess.PIPE)
    theirs.close()
    opened = Line(ours)
    assert opened.next().type is Type.HELLO
    yield opened
    ours.close()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and b"Sanitizer" not in errors, errors.decode()


def test_status_and_both_outputs(line: Line) -> None:
    assert line.run("echo out; echo err >&2; exit 7") == (Exit(7, False, False), b"out\nerr\n")
    assert line.run("true") == (Exit(0, False, False), b"")
    assert line.run("exit 255")[0].status == 255


def test_a_signal_is_told_from_a_status(line: Line) -> None:
    assert line.run("kill -SEGV $$")[0].status == -signal.SIGSEGV
    assert line.run("exit 139")[0].status == 139


def test_standard_input_is_empty_and_the_session_its_own(line: Line) -> None:
    done, output = line.run("cat; ps -o sid= -p $$ | tr -d ' '; echo $$")
    assert done.status == 0
    session, shell = output.split()
    assert session == shell and int(session) != os.getsid(0)


def test_binary_output_comes_unchanged(line: Line, tmp_path: Path) -> None:
    content = os.urandom(64 << 10) + pack(Type.EXIT, 5, bytes(8))
    (tmp_path / "bytes").write_bytes(content)
    assert line.run(f"cat {tmp_path}/bytes") == (Exit(0, False, False), content)


def test_a_flood_is_cut_off_marked_and_the_command_still_ends(line: Line) -> None:
    done, output = line.run("head -c 5000000 /dev/zero; exit 4", cap=100_000)
    assert done == Exit(4, True, False) and output == bytes(100_000)


def test_a_daemon_does_not_hold_up_the_reply_and_lives_on(line: Line, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 1000' > /dev/null 2>&1 & echo up"
    assert line.run(command) == (Exit(0, False, False), b"up\n")
    limit = time.monotonic() + PATIENCE
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    daemon = int(pid_file.read_text())
    assert line.run("echo again")[1] == b"again\n"
    os.kill(daemon, 0)
    os.kill(daemon, signal.SIGKILL)


def test_a_daemon_that_keeps_the_output_does_not_hold_up_the_reply(line: Line) -> None:
    begin = time.monotonic()
    done, output = line.run("sleep 100 & echo $!")
    assert done.status == 0 and time.monotonic() - begin < 50
    os.kill(int(output), signal.SIGKILL)


def test_a_command_that_closes_its_output_is_waited_for(line: Line) -> None:
    assert line.run("exec > /dev/null 2>&1; sleep 0.2; exit 9") == (Exit(9, False, False), b"")


def test_kill_ends_a_command_and_is_marked(line: Line) -> None:
    line.send(pack_run(8, "echo started; sleep 1000", 0, 1000))
    assert line.next().payload == b"started\n"
    line.send(pack(Type.KILL, 8))
    assert line.finish(8) == (Exit(-signal.SIGKILL, False, True), b"")
    assert line.run("echo next") == (Exit(0, False, False), b"next\n")


def test_kill_reaches_a_flood(line: Line) -> None:
    line.send(pack_run(8, "yes", 0, 1000))
    line.send(pack(Type.KILL, 8))
    done, output = line.finish(8)
    assert done.killed and len(output) <= 1000


def test_kill_with_nothing_to_kill_is_harmless(line: Line) -> None:
    line.send(pack(Type.KILL, 3))
    assert line.run("true")[0].status == 0


def test_ping_is_answered_while_a_command_runs(line: Line) -> None:
    line.send(pack_run(8, "sleep 1000", 0, 1000))
    line.send(pack(Type.PING, 9, b"any bytes"))
    assert line.next() == Frame(Type.PONG, 9, b"any bytes")
    line.send(pack(Type.KILL, 8))
    assert line.finish(8)[0].killed


def test_one_command_at_a_time(line: Line) -> None:
    line.send(pack_run(8, "sleep 1000", 0, 1000))
    line.send(pack_run(9, "true", 0, 1000))
    refused = line.next()
    assert refused.type is Type.ERROR and refused.id == 9 and b"busy" in refused.payload
    line.send(pack(Type.KILL, 8))
    assert line.finish(8)[0].killed


def test_junk_is_reported_once_and_skipped(line: Line) -> None:
    line.send(b"no frame at all, and then " + pack_run(4, "echo found", 0, 1000))
    error = line.next()
    assert error.type is Type.ERROR and b"malformed" in error.payload
    assert line.finish(4) == (Exit(0, False, False), b"found\n")


def test_an_absurd_length_is_junk(line: Line) -> None:
    header = pack(Type.RUN, 4)[:8] + (0xFFFFFFFF).to_bytes(4, "little")
    line.send(header + pack(Type.PING, 1))
    assert line.next().type is Type.ERROR
    assert line.next() == Frame(Type.PONG, 1, b"")


def test_a_short_run_frame_and_an_unknown_type_are_refused(line: Line) -> None:
    line.send(pack(Type.RUN, 2, b"abc"))
    assert line.next().type is Type.ERROR
    line.send(pack(Type.HELLO, 3))
    assert b"unknown" in line.next().payload


def test_a_frame_in_pieces(line: Line) -> None:
    for byte in pack_run(6, "echo pieces", 0, 1000):
        line.send(bytes([byte]))
    assert line.finish(6)[1] == b"pieces\n"


def test_an_ordinary_user(line: Line) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    done, output = line.run("id -u; id -g; id -G; grep CapEff /proc/self/status", uid=1000)
    assert done.status == 0
    assert output.split() == [b"1000", b"1000", b"1000", b"CapEff:", b"0" * 16]


# ---- the other side's own functions ------------------------------------------------------------


def test_frames_come_out_of_any_pieces() -> None:
    stream = pack(Type.OUTPUT, 1, b"abc") + pack(Type.EXIT, 1, bytes(8)) + pack(Type.PONG, 2)
    frames = Frames()
    found = [frame for byte in stream for frame in frames.feed(bytes([byte]))]
    assert [frame.type for frame in found] == [Type.OUTPUT, Type.EXIT, Type.PONG]


@pytest.mark.parametrize(
    "data",
    [
        b"Kernel panic",
        pack(Type.OUTPUT, 1)[:8] + b"\xff\xff\xff\xff",
        pack(Type.OUTPUT, 1)[:4] + b"\x63" + pack(Type.OUTPUT, 1)[5:],
    ],
)
def test_what_is_no_frame_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        list(Frames().feed(data))


def test_limits_of_what_can_be_asked() -> None:
    with pytest.raises(ValueError, match="NUL"):
        pack_run(1, "a\0b", 0, 1)
    with pytest.raises(ValueError, match="at most"):
        pack_run(1, "x" * (300 << 10), 0, 1)
    with pytest.raises(Malformed):
        unpack_exit(Frame(agent.Type.EXIT, 1, b"short"))
