"""The sandbox: the namespaces that hold the emulator, every packet, and the load.

A `Sandbox` is a user, network, PID and mount namespace. Its first process does nothing but wait
for the end of a pipe whose other end only this process holds: however this process ends, SIGKILL
included, that process ends, and the kernel takes every other process of the namespace, its
interfaces and its private folder along.

Neither root nor any change to the machine is needed; what can stand in the way raises
`NetworkUnavailable` with what to do about it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from grader import cache, container, limits
from grader.errors import UserError

# The benchmarking range of RFC 2544: of no use to anybody else, here or outside.
HOST_ADDRESS = "198.18.0.1"
GUEST_ADDRESS = "198.18.0.2"
PREFIX_LENGTH = 15
NETWORK = f"198.18.0.0/{PREFIX_LENGTH}"

TAP_NAME = "tap0"

# A tap holds 500 packets per queue by default, and a burst of connections is longer than that:
# what does not fit is lost, and the client's retransmission time-out is what would be measured.
TAP_QUEUE_PACKETS = 32768

_TUN = Path("/dev/net/tun")

# Set for the namespace only.
_SYSCTLS: Mapping[str, str] = {
    # One client address has as many ports as TCP has.
    "net.ipv4.ip_local_port_range": "1024 65535",
    # A client that closes first must get its port back at once, and not after a minute.
    "net.ipv4.tcp_tw_reuse": "1",
    "net.ipv4.tcp_fin_timeout": "5",
    # A connection that the guest drops is the guest's loss, to be seen and not mended: the load
    # does not hide it behind cookies or forgotten time-waits.
    "net.ipv4.tcp_max_tw_buckets": "262144",
    "net.core.somaxconn": "16384",
    # Router solicitations of the host's side would wake the guest.
    "net.ipv6.conf.all.disable_ipv6": "1",
    "net.ipv6.conf.default.disable_ipv6": "1",
}

# The first process. It ignores SIGCHLD, which `cat` inherits, so that orphans that end in the
# sandbox do not stay as zombies. The private folder is its working directory, which is how this
# process reaches it.
_SETTINGS = "\n".join(
    # Absent where the kernel has no IPv6, or keeps the setting for the whole machine.
    f"(echo '{value}' > /proc/sys/{name.replace('.', '/')}) 2> /dev/null || :"
    for name, value in _SYSCTLS.items()
)
_FIRST_PROCESS = f"""
set -e
{_SETTINGS}
ip link set lo up
mount -t tmpfs -o mode=0755,size=256m sandbox "$1"
cd "$1"
trap '' CHLD
echo ready
exec cat > /dev/null
"""


class NetworkUnavailable(UserError):
    """No sandbox or no tap can be made here; the text says why and what to do."""


@dataclass(frozen=True)
class Tap:
    """A tap inside a sandbox: its name, its queues, and the host's address on it."""

    name: str
    queues: int
    address: str


class Sandbox:
    """User, network, PID and mount namespaces that live as long as the ``with`` block.

    >>> with Sandbox() as sandbox:
    ...     sandbox.run(["ip", "link"])
    """

    def __init__(self) -> None:
        self._keeper: subprocess.Popen[bytes] | None = None
        self._first: psutil.Process | None = None

    @classmethod
    def joined(cls, first: psutil.Process) -> Sandbox:
        """Return a sandbox that another process holds, by its first process: for `command` etc."""
        sandbox = cls()
        sandbox._first = first
        return sandbox

    def __enter__(self) -> Sandbox:
        for tool, package in (
            ("unshare", "util-linux"),
            ("nsenter", "util-linux"),
            ("setpriv", "util-linux"),
            ("ip", "iproute2"),
            ("tc", "iproute2"),
        ):
            if _which(tool) is None:
                raise NetworkUnavailable(f"{tool} is missing", f"Debian: apt install {package}")
        self.folder_inside.mkdir(parents=True, exist_ok=True)
        # Where /proc is partly covered, as in most containers, a fresh one may not be mounted;
        # the sandbox then sees the machine's process numbers, and works all the same.
        failure = self._start(["--mount-proc"])
        if failure is not None and "proc" in failure:
            failure = self._start([])
        if failure is not None:
            raise _unavailable(failure)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, options: Sequence[str]) -> str | None:
        """Start the namespaces; return why that failed, or None."""
        command = [
            *("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
            *("--mount", *options, "sh", "-c", _FIRST_PROCESS, "sandbox", str(self.folder_inside)),
        ]
        # A session of its own: Ctrl-C must not end it before what runs inside it has ended.
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=_environment(),
        )
        assert keeper.stdin and keeper.stdout and keeper.stderr
        try:
            if keeper.stdout.readline() == b"ready\n":
                self._keeper = keeper
                self._first = psutil.Process(keeper.pid).children()[0]
                return None
        except BaseException:
            _end(keeper)
            raise
        text = keeper.stderr.read().decode(errors="replace").strip()
        _end(keeper)
        return text or f"unshare ended with status {keeper.returncode}"

    @property
    def pid(self) -> int:
        """The first process's number, as the machine sees it."""
        if self._first is None:
            raise RuntimeError("the sandbox is not open")
        return self._first.pid

    @property
    def folder(self) -> Path:
        """The private folder as this process sees it; it goes when the sandbox goes."""
        return Path(f"/proc/{self.pid}/cwd")

    @property
    def folder_inside(self) -> Path:
        """The private folder as the sandbox's processes see it."""
        return cache.root() / "sandbox"

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` inside the sandbox, as its root.

        The command ends as `argv` ends, with the same status. If it is killed, `argv` gets
        SIGKILL; signals are not passed on otherwise.
        """
        proc = f"/proc/{self.pid}/ns"
        return [
            *("nsenter", f"--user={proc}/user", f"--net={proc}/net", f"--pid={proc}/pid"),
            *(f"--mount={proc}/mnt", f"--wd={Path.cwd()}", "--preserve-credentials", "--"),
            # nsenter stays outside and waits for its child, which must not outlive it.
            *("setpriv", "--pdeathsig", "KILL", "--", *argv),
        ]

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `argv` inside; `options` are those of `subprocess.Popen`."""
        options.setdefault("env", _environment())
        return subprocess.Popen(self.command(argv), **options)

    def run(
        self, argv: Sequence[str], *, timeout: float = 30.0, input: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `argv` inside and return its status and its two outputs, whatever the status is.

        `timeout` is in seconds of the reference machine.
        """
        # An empty input, not an inherited one: nothing in there may wait for a terminal.
        return subprocess.run(
            self.command(argv),
            input=input if input is not None else b"",
            capture_output=True,
            timeout=limits.scaled(timeout),
            env=_environment(),
            check=False,
        )

    def add_tap(self, queues: int) -> Tap:
        """Make the tap that the guest's network card is on, up and with the host's address.

        Raises `NetworkUnavailable` if the machine does not allow it.
        """
        # A tap with the flag carries packets only once every queue is attached, and a card with
        # one queue attaches it without the flag.
        flag = "multi_queue" if queues > 1 else ""
        commands = [
            # The emulator may attach to what belongs to its user, and needs no privilege to.
            f"ip tuntap add dev {TAP_NAME} mode tap {flag} user 0",
            f"ip link set dev {TAP_NAME} txqueuelen {TAP_QUEUE_PACKETS}",
            # Straight into the tap's own queues: a discipline before them would drop by its own
            # law, and 256 of them, one for each queue a tap might have, take half a second.
            f"tc qdisc replace dev {TAP_NAME} root noqueue",
            f"ip address add {HOST_ADDRESS}/{PREFIX_LENGTH} dev {TAP_NAME}",
            f"ip link set dev {TAP_NAME} up",
            # As in the guest: see images/guest/quickack.c.
            f"ip route replace {NETWORK} dev {TAP_NAME} src {HOST_ADDRESS} quickack 1",
        ]
        done = self.run(["sh", "-c", " &&\n".join(commands)])
        if done.returncode != 0:
            raise _unavailable(done.stderr.decode(errors="replace").strip())
        return Tap(TAP_NAME, queues, HOST_ADDRESS)

    def close(self) -> None:
        """End the sandbox and everything in it; returns when all of it has gone."""
        keeper, self._keeper, self._first = self._keeper, None, None
        if keeper is not None:
            _end(keeper)


class Uncontained(Sandbox):
    """A sandbox that holds nothing apart, for a container that is thrown away; and has no network.

    So it is for exact mode; see `grader.container`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Uncontained:
        self._folder = tempfile.TemporaryDirectory(prefix="megapipe-machine-")
        return self

    def close(self) -> None:
        """Remove the private folder."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def folder(self) -> Path:
        """The private folder; it goes when this does."""
        if self._folder is None:
            raise RuntimeError("it is not open")
        return Path(self._folder.name)

    @property
    def folder_inside(self) -> Path:
        """The same, as the processes see it."""
        return self.folder

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` for as long as this process lives."""
        return ["setpriv", "--pdeathsig", "KILL", "--", *argv]


def _end(keeper: subprocess.Popen[bytes]) -> None:
    for stream in (keeper.stdin, keeper.stdout, keeper.stderr):
        assert stream is not None
        _close(stream)
    try:
        # The first process sees the end of its input, and unshare ends after it.
        keeper.wait(timeout=limits.scaled(5.0))
    except subprocess.TimeoutExpired:
        # Its parent's death is a SIGKILL to the first process (--kill-child).
        keeper.send_signal(signal.SIGKILL)
        keeper.wait()


def _close(stream: IO[bytes]) -> None:
    # What was still to be written has no reader any more.
    with suppress(BrokenPipeError):
        stream.close()


def _environment() -> dict[str, str]:
    """Return an environment in which tools are found and speak English."""
    environment = {**os.environ, "LC_ALL": "C"}
    # On many machines an ordinary user's path lacks the folder that ip lies in.
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), *_SBIN])
    return environment


_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=_environment()["PATH"])


def _unavailable(failure: str) -> NetworkUnavailable:
    """Return the error for `failure`, a tool's message, with the reasons found on this machine."""
    advice = []
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        advice.append(
            "User namespaces are switched off: sudo sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if _sysctl("user/max_user_namespaces") == "0":
        advice.append(
            "User namespaces are switched off: sudo sysctl -w user.max_user_namespaces=1024"
        )
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        advice.append(
            "AppArmor takes all rights from an ordinary user's namespaces: "
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if not _TUN.exists():
        advice.append(
            "/dev/net/tun does not exist: sudo modprobe tun "
            "(in a container, start it with --device /dev/net/tun)"
        )
    elif not os.access(_TUN, os.R_OK | os.W_OK):
        advice.append("/dev/net/tun is not open to you: sudo chmod 0666 /dev/net/tun")
    if not advice:
        advice.append(
            "Inside a container, allow it user namespaces and mounts "
            "(podman and docker: --security-opt seccomp=unconfined --device /dev/net/tun); or, "
            f"if it is made for one submission, grade without any: {container.VARIABLE}=1 with "
            "--exact, see README.md"
        )
    return NetworkUnavailable(f"no network sandbox can be made here: {failure}", "\n".join(advice))


def _sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None
