"""Run a compiler on files of unknown origin, where it can neither see nor reach anything.

A `run` is a process in user, mount, network, PID and IPC namespaces of its own (bubblewrap): it
sees the system's programs and headers and the folders that it is given, all read-only, and two
folders in memory that it may write to. There is no network, no home directory, no /proc, no device
but /dev/null. Time, memory, disk, processes and what it prints are limited. For an ordinary user
and for root alike it has no capability, and where root starts it, it is another user besides.

However this process ends, the other one ends, too, and leaves nothing.

In a container that is thrown away (`grader.container`) it is a process like any other: of another
user if this is root, under the same limits, in a folder of its own.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import psutil

from grader import cache, container, limits
from grader.errors import UserError

# Where the writable folder lies inside; the same everywhere, so that what is built repeats.
PLACE = PurePosixPath("/build")

# Whom root's compilers run as: users above all others, who own nothing. Each process of this
# project has its own, for processes are limited by user.
_FIRST_USER = 0x70000000

_CAP_SYS_ADMIN = 21

# Text beyond it is not read: who reads a compiler's first megabyte has read enough.
_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a run may take. Seconds are those of the reference machine, sizes are in bytes."""

    seconds: float = 60.0
    """From start to end."""
    cpu_seconds: int = 30
    """Of each process."""
    memory: int = 1 << 30
    """Address space of each process; of these, make starts one for each CPU."""
    file: int = 64 << 20
    folder: int = 256 << 20
    """All files together, which lie in memory; and as much for temporary ones."""
    processes: int = 256


class Unavailable(UserError):
    """Nothing can be compiled apart from the rest of the machine here."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int
    text: str
    """What it printed, cut off after a megabyte."""
    files: Mapping[str, bytes]
    """The outputs by name; none unless the status is 0."""
    limit: str = ""
    """The limit that it ran into, as the end of a sentence; empty: none that is known."""

    @property
    def explained(self) -> str:
        """What it printed, beginning with the limit that it ran into."""
        if not self.limit:
            return self.text
        return f"gcc: error: stopped: {self.limit}\n{self.text}"


# The first process. What goes wrong after it has said that it is ready is the command's fault.
_READY = b"ready\n"
_SCRIPT = """
set -e
mkdir "$1"
cd "$1"
tar -xf -
outputs=$2
shift 2
echo ready
"$@" < /dev/null >&2
[ -z "$outputs" ] || exec tar -cf - $outputs
"""

# What tells that a limit was reached: the kernel's or the tools' own words for it.
_SIGNS = (
    (r"CPU time limit exceeded", "it took more than {cpu_seconds} s of CPU time"),
    (r"File size limit exceeded|File too (large|big)", "a file became larger than {file} MiB"),
    (r"No space left on device", "its files became larger than {folder} MiB together"),
    (
        r"out of memory|virtual memory exhausted|memory exhausted|Cannot allocate memory",
        "it needed more than {memory} MiB of memory",
    ),
    (
        r"Resource temporarily unavailable|Cannot fork",
        "it started more than {processes} processes",
    ),
)


def run(
    argv: Sequence[str],
    inputs: Mapping[str, bytes],
    outputs: Sequence[str],
    readable: Sequence[Path] = (),
    folder: str = "work",
    allowed: Limits | None = None,
) -> Outcome:
    """Run `argv` in the folder `PLACE`/`folder`, which holds the `inputs`; return what came of it.

    `inputs` are file contents by relative names, `outputs` patterns of the shell for the files to
    be brought out, `readable` folders that can be seen under their own paths.
    Raises `Unavailable` if this machine has no place to run it in.
    """
    allowed = allowed or Limits()
    with ExitStack() as stack:
        # Files without names: nothing is left of them, and what the run writes into them is
        # limited as all of its files are.
        given, made, said = (
            stack.enter_context(tempfile.TemporaryFile(dir=cache.root())) for _ in range(3)
        )
        _pack(given, inputs)
        script = ["sh", "-c", _SCRIPT, "sh", folder, " ".join(outputs), *argv]
        files = (given, made, said)
        if container.thrown_away():
            status, late = _run_here(script, files, readable, allowed, stack)
        else:
            status, late = _run_apart(script, files, readable, allowed, stack)
        text = _head(said, _TEXT_BYTES).decode(errors="replace")
        if _head(made, len(_READY)) != _READY:
            raise _unavailable(text.strip() or f"it ended with status {status}")
        if status != 0:
            return Outcome(status, text, {}, _limit_reached(text, _size(said), late, allowed))
        try:
            return Outcome(0, text, dict(_unpacked(made)))
        except (ValueError, tarfile.TarError) as error:
            return Outcome(1, text, {}, f"what it made cannot be used ({error})")


def _run_apart(
    script: Sequence[str],
    files: tuple[IO[bytes], IO[bytes], IO[bytes]],
    readable: Sequence[Path],
    allowed: Limits,
    stack: ExitStack,
) -> tuple[int, bool]:
    """Run it in namespaces of its own; return its status, and whether its time was over."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise Unavailable("bwrap is missing", "Debian: apt install bubblewrap")
    status_read, status_write = os.pipe()
    stack.callback(os.close, status_read)
    command = [bwrap, "--json-status-fd", str(status_write), *_apart(readable, allowed)]
    command += ["--", *_limited(allowed), *script]
    try:
        process = _start(command, files, pass_fds=(status_write,))
    finally:
        os.close(status_write)
    try:
        late = _waited(process, allowed)
    finally:
        _end(process, status_read)
    return process.returncode, late


def _run_here(
    script: Sequence[str],
    files: tuple[IO[bytes], IO[bytes], IO[bytes]],
    readable: Sequence[Path],
    allowed: Limits,
    stack: ExitStack,
) -> tuple[int, bool]:
    """Run it in this machine, which is thrown away; otherwise as `_run_apart`."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megapipe-build-")))
    place.chmod(0o1777)
    if os.geteuid() == 0:
        _must_be_open(readable)
    # The folder has another name here, and what is built must not differ by it.
    words = [word.replace(str(PLACE), str(place)) for word in script]
    process = _start([*_limited(allowed), *words], files, cwd=place, env=_environment())
    try:
        late = _waited(process, allowed)
    finally:
        _end_here(process)
    return process.returncode, late


def _start(
    command: Sequence[str], files: tuple[IO[bytes], IO[bytes], IO[bytes]], **options: Any
) -> subprocess.Popen[bytes]:
    given, made, said = files
    # Ctrl-C is for this process, which then ends the other.
    return subprocess.Popen(
        command, stdin=given, stdout=made, stderr=said, start_new_session=True, **options
    )


def _waited(process: subprocess.Popen[bytes], allowed: Limits) -> bool:
    """Wait for the end; return whether the time was over before."""
    try:
        process.wait(timeout=limits.scaled(allowed.seconds))
    except subprocess.TimeoutExpired:
        return True
    return False


def _end_here(process: subprocess.Popen[bytes]) -> None:
    """End the process, its session, and all of the user that it was, if it was another one."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if os.geteuid() != 0:
        return
    # What has begun meanwhile has its turn in the next round.
    while mine := [one for one in psutil.process_iter(["uids"]) if _is_ours(one)]:
        for one in mine:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(mine, timeout=1)


def _is_ours(process: psutil.Process) -> bool:
    uids = process.info["uids"]
    return uids is not None and uids.real == _user()


def _must_be_open(folders: Sequence[Path]) -> None:
    for folder in folders:
        for one in (folder, *folder.parents):
            if not one.stat().st_mode & stat.S_IXOTH:
                raise Unavailable(
                    f"the compiler, which is another user, cannot look into {one}",
                    "keep caches where everybody may: XDG_CACHE_HOME=/var/cache, or chmod o+x",
                )


def _apart(readable: Sequence[Path], allowed: Limits) -> Iterator[str]:
    """Yield the options that make the place which the command sees."""
    for kind in ("ipc", "pid", "net", "uts"):
        yield f"--unshare-{kind}"
    if _privileged():
        # Taken off again by the next program, which becomes another user with them.
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield "--unshare-user"
    yield from ("--die-with-parent", "--new-session", "--clearenv", "--hostname", "compiler")
    for name, value in _environment().items():
        yield from ("--setenv", name, value)
    yield from system_files()
    yield from ("--perms", "0755", "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null")
    for place in ("/tmp", str(PLACE)):
        yield from ("--perms", "1777", "--size", str(allowed.folder), "--tmpfs", place)
    for path in readable:
        yield from visible(path)
    yield from ("--remount-ro", "/", "--chdir", str(PLACE))


def system_files() -> Iterator[str]:
    """Yield the options of bwrap that show the system's programs and libraries, read-only."""
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    # Some tools are found through it (awk), and libraries are found faster.
    for path in (Path("/etc/alternatives"), Path("/etc/ld.so.cache")):
        yield from visible(path)


def visible(path: Path, writable: bool = False) -> Iterator[str]:
    """Yield the options of bwrap that show `path`; the folders above it show nothing else."""
    for parent in reversed(path.parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(parent))
    yield from ("--bind-try" if writable else "--ro-bind-try", str(path), str(path))


def _environment() -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        # The kernel's makefiles drop LC_ALL, and the compiler then takes the next.
        **dict.fromkeys(("LC_ALL", "LC_CTYPE", "LC_MESSAGES"), "C"),
        # It would want a home.
        "CCACHE_DISABLE": "1",
    }


def _limited(allowed: Limits) -> Iterator[str]:
    """Yield the command that runs another one under limits, and as another user if this is root."""
    if _privileged() or (container.thrown_away() and os.geteuid() == 0):
        yield from ("setpriv", f"--reuid={_user()}", f"--regid={_user()}", "--clear-groups")
        yield from ("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--")
    cpu = round(limits.scaled(allowed.cpu_seconds))
    # The first of the two ends it with a signal that is told apart from others.
    yield from ("prlimit", f"--cpu={cpu}:{cpu + 5}", f"--as={allowed.memory}")
    yield from (f"--fsize={allowed.file}", f"--nproc={allowed.processes}", "--core=0", "--")


def _user() -> int:
    """Return the number of the user that root's compilers are, in this process."""
    return _FIRST_USER + os.getpid()


def _privileged() -> bool:
    """Whether this is a root that needs no user namespace: not the one of most containers."""
    if os.geteuid() != 0:
        return False
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.M)
    return found is not None and bool(int(found[1], 16) >> _CAP_SYS_ADMIN & 1)


def _end(process: subprocess.Popen[bytes], status: int) -> None:
    """End the run if it has not ended; returns when none of its processes is left."""
    if process.poll() is None:
        # The first process of the namespace takes all others along, and then bwrap ends.
        os.set_blocking(status, False)
        try:
            first = json.loads(os.read(status, 4096).splitlines()[0])["child-pid"]
            os.kill(first, signal.SIGKILL)
        except (OSError, ValueError, LookupError):
            # It has no processes yet, or no longer.
            process.kill()
        process.wait()


def _pack(target: IO[bytes], inputs: Mapping[str, bytes]) -> None:
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, content in inputs.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    target.seek(0)


def _unpacked(source: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the outputs. Raises `ValueError` if one is no ordinary file."""
    if _size(source) == len(_READY):
        return
    source.seek(len(_READY))
    with tarfile.open(fileobj=source, mode="r|") as archive:
        for entry in archive:
            parts = PurePosixPath(entry.name).parts
            if not entry.isreg() or entry.name.startswith("/") or ".." in parts:
                raise ValueError(f"{entry.name!r} is no ordinary file")
            content = archive.extractfile(entry)
            assert content is not None
            yield entry.name, content.read()


def _head(file: IO[bytes], size: int) -> bytes:
    file.seek(0)
    return file.read(size)


def _size(file: IO[bytes]) -> int:
    return file.seek(0, os.SEEK_END)


def _limit_reached(text: str, printed: int, late: bool, allowed: Limits) -> str:
    """Return which limit a run that failed has run into, if any."""
    if late:
        return f"it took more than {limits.scaled(allowed.seconds):.0f} s"
    if printed >= allowed.file:
        return f"it printed more than {allowed.file >> 20} MiB"
    shown = {
        "cpu_seconds": round(limits.scaled(allowed.cpu_seconds)),
        "file": allowed.file >> 20,
        "folder": allowed.folder >> 20,
        "memory": allowed.memory >> 20,
        "processes": allowed.processes,
    }
    for sign, limit in _SIGNS:
        if re.search(sign, text):
            return limit.format(**shown)
    return ""


def _unavailable(failure: str) -> Unavailable:
    return Unavailable(
        f"no place to compile students' files in can be made here: {failure}",
        "bubblewrap needs user namespaces, as every run does: see `invoke doctor`, line "
        "namespaces. As root with a umask that hides files from others, build the kernel anew "
        "with umask 022 (invoke clean)",
    )
