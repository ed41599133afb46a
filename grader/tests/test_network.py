"""The sandbox: what is inside, what stays outside, and that nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grader import limits, network
from grader.network import NetworkUnavailable, Sandbox

ROOT = Path(__file__).parents[2]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not waited for has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(*pids: int) -> bool:
    limit = time.monotonic() + limits.scaled(10)
    while not all(gone(pid) for pid in pids):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        opened.add_tap(4)
        yield opened


def test_inside_is_its_own_world(sandbox: Sandbox) -> None:
    inside = sandbox.run(["sh", "-c", "id -u; readlink /proc/self/ns/net /proc/self/ns/pid"])
    user, net, pid = inside.stdout.decode().split()
    assert user == "0"
    assert net != str(Path("/proc/self/ns/net").readlink())
    assert pid != str(Path("/proc/self/ns/pid").readlink())


def test_status_output_and_signal_come_through(sandbox: Sandbox) -> None:
    done = sandbox.run(["sh", "-c", "cat; echo bad >&2; exit 7"], input=b"given")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"given", b"bad\n")
    assert sandbox.run(["sh", "-c", "kill -9 $$"]).returncode == -signal.SIGKILL


def test_the_working_folder_is_kept(sandbox: Sandbox) -> None:
    assert sandbox.run(["pwd"]).stdout.decode().strip() == str(Path.cwd())


def test_the_tap(sandbox: Sandbox) -> None:
    shown = sandbox.run(["ip", "-d", "address", "show", network.TAP_NAME]).stdout.decode()
    assert f"inet {network.HOST_ADDRESS}/{network.PREFIX_LENGTH}" in shown
    assert f"qlen {network.TAP_QUEUE_PACKETS}" in shown
    assert "numtxqueues 1 " not in shown
    assert "qdisc noqueue" in shown and "UP" in shown and "inet6" not in shown
    outside = subprocess.run(["ip", "address"], capture_output=True, text=True, check=True)
    assert network.HOST_ADDRESS not in outside.stdout


def test_one_queue_needs_a_plain_tap() -> None:
    with Sandbox() as sandbox:
        sandbox.add_tap(1)
        shown = sandbox.run(["ip", "-d", "link", "show", network.TAP_NAME]).stdout.decode()
        assert "numtxqueues 1 " in shown


def test_a_second_tap_is_a_named_error(sandbox: Sandbox) -> None:
    with pytest.raises(NetworkUnavailable) as caught:
        sandbox.add_tap(4)
    assert caught.value.problem and caught.value.todo


def test_settings_hold_inside_only(sandbox: Sandbox) -> None:
    name = "/proc/sys/net/ipv4/ip_local_port_range"
    outside = Path(name).read_text()
    assert sandbox.run(["cat", name]).stdout.split() == [b"1024", b"65535"]
    assert Path(name).read_text() == outside


def test_the_private_folder_is_seen_from_both_sides(sandbox: Sandbox) -> None:
    (sandbox.folder / "word").write_text("said")
    assert sandbox.run(["cat", str(sandbox.folder_inside / "word")]).stdout == b"said"
    assert list(sandbox.folder_inside.iterdir()) == []


def test_killing_a_command_kills_what_it_ran(sandbox: Sandbox) -> None:
    with sandbox.popen(["sleep", "1000"]) as process:
        limit = time.monotonic() + limits.scaled(10)
        while not any(c.name() == "sleep" for c in psutil.Process(process.pid).children()):
            assert time.monotonic() < limit
            time.sleep(0.02)
        (inner,) = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    assert wait_gone(inner.pid)


def test_close_ends_everything() -> None:
    with Sandbox() as sandbox:
        sandbox.run(["sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 &"])
        first = sandbox.pid
        inner = [p.pid for p in psutil.process_iter() if _net(p.pid) == _net(first)]
        assert len(inner) >= 2
    assert wait_gone(first, *inner)


def _net(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return str(pid)


KILLED = """
import sys, time
from grader.network import Sandbox
with Sandbox() as sandbox:
    process = sandbox.popen(["sleep", "1000"])
    print(sandbox.pid, process.pid, flush=True)
    time.sleep(1000)
"""


def test_sigkill_leaves_nothing() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout
    first, outer = map(int, holder.stdout.readline().split())
    namespace = _net(first)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert wait_gone(first, outer)
    assert not [p for p in psutil.process_iter() if _net(p.pid) == namespace and not gone(p.pid)]


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_which", lambda tool: None if tool == "tc" else "/bin/true")
    with pytest.raises(NetworkUnavailable, match="tc is missing") as caught, Sandbox():
        pass
    assert "iproute2" in caught.value.todo


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_advice_names_what_is_switched_off(
    setting: str, value: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_sysctl", lambda name: value if name == setting else None)
    assert advice in network._unavailable("Operation not permitted").todo


def test_advice_names_a_closed_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "_TUN", tmp_path / "none")
    assert "modprobe tun" in network._unavailable("x").todo


# ---- as an ordinary user -----------------------------------------------------------------------

# Imports come before the change of user, who may not be able to read this tree.
ORDINARY = """
import os, sys
import grader.agent, grader.console, grader.machine, grader.network, psutil
from pathlib import Path
os.chdir("/")
os.setgroups([]); os.setgid(54321); os.setuid(54321)
os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = sys.argv[1]
"""


def as_ordinary_user(code: str, *arguments: str, mode: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as a user without rights, with a /dev/net/tun of this mode of its own."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    home = tempfile.mkdtemp()
    os.chown(home, 54321, 54321)
    prepare = (
        "mount -t tmpfs -o mode=755 tmpfs /dev/net && mknod /dev/net/tun c 10 200 && "
        f'chmod {mode} /dev/net/tun && exec "$@"'
    )
    try:
        return subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", prepare, "sh"),
                *(sys.executable, "-c", ORDINARY + code, home, *arguments),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=limits.scaled(60),
            check=False,
        )
    finally:
        shutil.rmtree(home)


SANDBOX = """
with grader.network.Sandbox() as sandbox:
    print(sandbox.add_tap(2))
    print(sandbox.run(["id", "-u"]).stdout, os.getuid())
"""


def test_an_ordinary_user_can() -> None:
    done = as_ordinary_user(SANDBOX, mode="0666")
    assert done.returncode == 0, done.stderr
    assert "Tap(name='tap0', queues=2" in done.stdout and "b'0\\n' 54321" in done.stdout


def test_an_ordinary_user_with_a_closed_device_is_told() -> None:
    done = as_ordinary_user(SANDBOX, mode="0600")
    assert done.returncode != 0
    assert "NetworkUnavailable" in done.stderr
    report = as_ordinary_user(
        "try:\n    with grader.network.Sandbox() as s: s.add_tap(2)\n"
        "except grader.network.NetworkUnavailable as error: print(error.report())",
        mode="0600",
    )
    assert "sudo chmod 0666 /dev/net/tun" in report.stdout
