"""The guest's console: what it prints, kept within bounds, and the kernel's own reports in it.

Everything here is what the guest says about itself, so no point rests on it. It tells a person
why a kernel went down, and it tells `machine` that it did.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pexpect
import psutil

from grader import limits


class Kind(StrEnum):
    """What a kernel's report is about."""

    PANIC = "panic"
    OOPS = "oops"
    BUG = "bug"
    KASAN = "kasan"
    UBSAN = "ubsan"
    LOCKDEP = "lockdep"
    ATOMIC = "sleep-in-atomic"
    SLAB = "slab-corruption"
    LOCKUP = "lockup"
    STALL = "rcu-stall"
    HUNG_TASK = "hung-task"
    WARNING = "warning"
    LEAK = "leak"
    OOM = "out-of-memory"


@dataclass(frozen=True)
class Report:
    """One report of the kernel: its kind, the line that names it, and all of its lines."""

    kind: Kind
    first_line: str
    trace: str


# The first that matches names the kind, so that the particular comes before the general.
_STARTS: Sequence[tuple[Kind, re.Pattern[str]]] = [
    (kind, re.compile(pattern))
    for kind, pattern in (
        (Kind.PANIC, r"Kernel panic - not syncing"),
        (Kind.KASAN, r"BUG: KASAN: "),
        (Kind.UBSAN, r"UBSAN: "),
        (
            Kind.LOCKDEP,
            r"WARNING: (possible (circular|recursive) locking|inconsistent lock state|"
            r"possible irq lock inversion|[A-Za-z-]+ -> [A-Za-z-]+ (lock order|.*detected)|"
            r"bad unlock balance|suspicious RCU usage|held lock freed|lock held when returning|"
            r"Nested lock was not taken|.* still has locks held|still have locks held|"
            r"[A-Z]+-safe -> [A-Z]+-unsafe lock order)",
        ),
        (Kind.LOCKDEP, r"\[ BUG: Invalid wait context \]|DEBUG_LOCKS_WARN_ON"),
        (
            Kind.ATOMIC,
            r"BUG: (sleeping function called from invalid context|scheduling while atomic|"
            r"using (__this_cpu|smp_processor_id))",
        ),
        (Kind.LOCKUP, r"(watchdog: )?BUG: soft lockup|Watchdog detected hard LOCKUP"),
        (Kind.LOCKUP, r"BUG: (workqueue|spinlock) lockup|watchdog: CPU\d+: Watchdog detected"),
        (Kind.STALL, r"rcu: INFO: .*(detected.*stalls|self-detected stall)|rcu: .*kthread starved"),
        (Kind.HUNG_TASK, r"INFO: task .* blocked for more than \d+ seconds"),
        (Kind.OOPS, r"BUG: (unable to handle|kernel NULL pointer)|general protection fault"),
        (Kind.OOPS, r"Oops: |(stack|double|int3|divide) (segment|fault|error)?.*: 0000 \[#\d+\]"),
        (Kind.OOPS, r"(BUG: )?(TASK stack guard page|stack guard page) was hit"),
        (Kind.BUG, r"kernel BUG at |BUG: Bad (page|rss)|BUG: spinlock|Kernel mode fault at addr"),
        (Kind.SLAB, r"BUG \S+ \((Tainted: .*|Not tainted)\): "),
        (Kind.LEAK, r"kmemleak: \d+ new suspected memory leaks"),
        (Kind.OOM, r"(Out of memory|Memory cgroup out of memory): Killed process|oom-kill:"),
        (Kind.WARNING, r"WARNING: CPU: \d+ PID: |WARNING: .* at .*:\d+ "),
    )
]

# A cheap look at a flood: no line without one of these starts a report.
_HINT = re.compile(r"BUG|WARN|UBSAN|Oops|panic|INFO: |fault|LOCKUP|memory|oom-kill|rcu: |stack|\[#")

_PREFIX = re.compile(r"^(<\d+>)?\[ *\d+\.\d+\](\[ *[TC]\d+\])? ?")
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")
_END_TRACE = re.compile(r"---\[ end (trace|Kernel panic)")
_RULE = re.compile(r"^={20,}$")

# Reports that their own closing line ends, and reports that end with their stack.
_ENDS_WITH_MARK = {Kind.PANIC, Kind.OOPS, Kind.BUG, Kind.WARNING, Kind.UBSAN}
_ENDS_WITH_RULE = {Kind.KASAN, Kind.UBSAN, Kind.SLAB}
_ENDS_WITH_STACK = {Kind.LOCKDEP, Kind.ATOMIC, Kind.LOCKUP, Kind.STALL, Kind.HUNG_TASK}
_ONE_LINE = {Kind.LEAK, Kind.OOM}

_MAX_LINES = 160

# An oops goes on with these; they are not the next one.
_CONTINUATION = {Kind.OOPS, Kind.BUG}


def find_reports(text: str) -> list[Report]:
    """Return the kernel's reports in a console's text, in order, without times and escapes.

    The last one may still lack its end.
    """
    reports: list[Report] = []
    kind: Kind | None = None
    lines: list[str] = []

    def finish() -> None:
        nonlocal kind
        if kind is not None:
            reports.append(Report(kind, lines[0], "\n".join(lines)))
        kind = None

    for raw in text.splitlines():
        line = _plain(raw)
        start = _start(line)
        if start is not None and not (kind in _CONTINUATION and start in _CONTINUATION):
            finish()
            kind, lines = start, [line]
            if kind in _ONE_LINE:
                finish()
        elif kind is not None:
            lines.append(line)
            ended = (
                (kind in _ENDS_WITH_MARK and _END_TRACE.search(line))
                or (kind in _ENDS_WITH_RULE and _RULE.match(line) and len(lines) > 2)
                or (kind in _ENDS_WITH_STACK and line.strip() == "</TASK>")
                or len(lines) >= _MAX_LINES
            )
            if ended:
                finish()
    finish()
    return reports


def _plain(line: str) -> str:
    return _PREFIX.sub("", _ESCAPE.sub("", line)).rstrip()


def _start(line: str) -> Kind | None:
    if not _HINT.search(line):
        return None
    return next((kind for kind, pattern in _STARTS if pattern.search(line)), None)


# A registers' dump says little to whom has the lines of the code, and hides them.
_REGISTERS = re.compile(
    r"^ *(R(?!IP)[A-Z0-9]{2}: |RSP: |FS: |CS: |CR\d: |DR\d: |PGD |Code: |Hardware name: |Tainted: |"
    r"Modules linked in: |RIP: 0033:|Kernel Offset: |INFO: NMI handler)"
)
_CPU = re.compile(r"^(Sending NMI from CPU|NMI backtrace for cpu)")


def essence(trace: str) -> str:
    """Return a report's lines without registers, and without the stacks of idle CPUs."""
    parts: list[list[str]] = [[]]
    for raw in trace.splitlines():
        line = _plain(raw)
        if _CPU.match(line):
            parts.append([])
        if line and not _REGISTERS.match(line):
            parts[-1].append(line)
    # The CPU that reports stands in the first part already, before it asks the others.
    busy = [
        part
        for part in parts[1:]
        if part
        and part[0].startswith("NMI")
        and not any("nmi_trigger_cpumask_backtrace" in line for line in part)
        and not any(line.startswith((" default_idle", " cpu_startup_entry")) for line in part)
    ]
    return "\n".join("\n".join(part) for part in [parts[0], *busy])


# ---- addresses ---------------------------------------------------------------------------------

_PLACE = re.compile(
    r"(?P<symbol>(?!__pfx_)[A-Za-z_][\w.]*)\+0x(?P<offset>[0-9a-f]+)/0x(?P<size>[0-9a-f]+)"
    r"(?: \[(?P<module>[\w-]+)[^\]]*\])?"
)


def decode(trace: str, elves: Iterable[Path]) -> str:
    """Return `trace` with ``(folder/file.c:line)`` behind each address that `elves` explain.

    `elves` are vmlinux and modules built with debug information; a file without it, or a missing
    binutils, leaves the text as it is.
    """
    files = {path.stem.replace("-", "_"): path for path in elves if path.is_file()}
    wanted: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for line in trace.splitlines():
        for match in _PLACE.finditer(line):
            owner = match["module"] or "vmlinux"
            if owner in files:
                wanted.setdefault((owner, match["symbol"]), set()).add(_offset(match, line))
    places: dict[tuple[str, str, int], str] = {}
    for owner in {owner for owner, _ in wanted}:
        symbols = {symbol: where for (name, symbol), where in wanted.items() if name == owner}
        for (symbol, offset), place in _places(files[owner], symbols).items():
            places[owner, symbol, offset] = place

    def annotate(line: str) -> str:
        def with_place(match: re.Match[str]) -> str:
            key = (match["module"] or "vmlinux", match["symbol"], _offset(match, line)[0])
            return match[0] + (f" ({places[key]})" if key in places else "")

        return _PLACE.sub(with_place, line)

    return "\n".join(annotate(line) for line in trace.splitlines())


def _offset(match: re.Match[str], line: str) -> tuple[int, int]:
    """Return the offset of the instruction meant, and the function's size."""
    offset = int(match["offset"], 16)
    # In a stack stand the addresses to return to; the call is before them. RIP is itself.
    if "RIP:" not in line and offset > 0:
        offset -= 1
    return offset, int(match["size"], 16)


def _places(path: Path, symbols: Mapping[str, set[tuple[int, int]]]) -> dict[tuple[str, int], str]:
    """Return ``folder/file:line`` by symbol and offset for what addr2line knows about `path`."""
    table = _tool(["objdump", "--syms", str(path)], "")
    candidates: dict[str, list[tuple[str, int, int]]] = {}
    for row in table.splitlines():
        head, _, tail = row.partition("\t")
        fields, ends = head.split(), tail.split()
        if len(fields) < 3 or len(ends) < 2 or ends[-1] not in symbols or " F " not in head:
            continue
        value, size, section, symbol = int(fields[0], 16), int(ends[0], 16), fields[-1], ends[-1]
        candidates.setdefault(symbol, []).append((section, value, size))
    addresses: dict[str, list[tuple[str, int, int]]] = {}
    for symbol, found_at in candidates.items():
        for offset, expected in symbols[symbol]:
            # Static functions of one name are told apart by their size; the kernel's idea of it
            # reaches to the next function, so the nearest is taken.
            nearest = min(found_at, key=lambda place: abs(place[2] - expected))
            addresses.setdefault(nearest[0], []).append((symbol, offset, nearest[1] + offset))
    found: dict[tuple[str, int], str] = {}
    for section, places in addresses.items():
        output = _tool(
            ["addr2line", "-e", str(path), "-j", section],
            "".join(f"{address:#x}\n" for _, _, address in places),
        )
        for (symbol, offset, _), line in zip(places, output.splitlines(), strict=False):
            file, _, number = line.split(" (discriminator")[0].rpartition(":")
            if file and file != "??" and number not in {"?", "0"}:
                found[symbol, offset] = "/".join(Path(file).parts[-2:]) + f":{number}"
    return found


def _tool(argv: Sequence[str], text: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    try:
        done = subprocess.run(
            argv,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limits.scaled(20.0),
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return done.stdout if done.returncode == 0 else ""


# ---- the console itself ------------------------------------------------------------------------

_HEAD_BYTES = 1 << 20
_TAIL_BYTES = 1 << 18
_MAX_REPORTS = 100
_MATCHED = 1 << 16
# For a program that was killed to be gone.
_END_LIMIT = 3.0


class Transcript:
    """What a console printed: the beginning and the end of it, in a file and in memory.

    However much is printed, the file stays under 1.3 MB, and so does what is held here.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("wb") if path is not None else None
        self._head_left = _HEAD_BYTES
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0
        self._window = ""
        self._found: list[Report] = []

    def write(self, data: bytes) -> None:
        """Take what the console printed."""
        # The kernel ends a line with a carriage return, and the terminal adds another.
        data = data.replace(b"\r", b"")
        head = data[: self._head_left]
        if head:
            self._head_left -= len(head)
            if self._file is not None:
                self._file.write(head)
        late = data[len(head) :]
        if late:
            self._tail.append(late)
            self._tail_size += len(late)
            while self._tail_size - len(self._tail[0]) >= _TAIL_BYTES:
                self._tail_size -= len(self._tail[0])
                self._dropped += len(self._tail.popleft())
        self._window += data.decode(errors="replace")
        if len(self._window) > 2 * _TAIL_BYTES:
            # Let the older half go, at the end of a line, and with it no report.
            cut = self._window.rfind("\n", 0, _TAIL_BYTES) + 1 or _TAIL_BYTES
            room = _MAX_REPORTS - len(self._found)
            self._found += find_reports(self._window[:cut])[:room]
            self._window = self._window[cut:]

    def flush(self) -> None:
        """Bring the file up to date."""
        if self._file is not None:
            self._file.flush()

    @property
    def text(self) -> str:
        """The recent text, at most 0.5 MB of it."""
        return self._window

    def reports(self) -> list[Report]:
        """Return the kernel's reports so far, the first hundred at most before the recent text."""
        return self._found + find_reports(self._window)

    def close(self) -> None:
        """Write the end of the text and close the file."""
        if self._file is None:
            return
        if self._dropped:
            self._file.write(b"\n[... %d bytes left out ...]\n" % self._dropped)
        for piece in self._tail:
            self._file.write(piece)
        self._file.close()
        self._file = None


class _Spawn(pexpect.spawn):  # type: ignore[type-arg]
    """A program on a pseudo terminal that also inherits given descriptors."""

    def __init__(self, command: str, argv: list[str], descriptors: Sequence[int], **options: Any):
        self._descriptors = tuple(descriptors)
        super().__init__(command, argv, preexec_fn=self._keep_descriptors, **options)

    def _keep_descriptors(self) -> None:
        # In the child: this process's other children must not get them.
        for descriptor in self._descriptors:
            os.set_inheritable(descriptor, True)

    def _spawnpty(self, args: list[str], **options: Any) -> Any:
        # The one thing that pexpect's own interface cannot ask of ptyprocess.
        return super()._spawnpty(args, pass_fds=self._descriptors, **options)  # type: ignore[misc]


class Console:
    """A program on a pseudo terminal of its own, which is the guest's serial console.

    `argv` is the program; it inherits `descriptors`. What it prints goes to the file `transcript`
    (bounded), and on to whoever asks. Closing the console ends the program.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        transcript: Path | None = None,
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.transcript = Transcript(transcript)
        self._child = _Spawn(
            argv[0],
            list(argv[1:]),
            descriptors,
            timeout=None,
            echo=False,
            dimensions=(50, 132),
            env=dict(environment) if environment is not None else None,
        )
        self._child.delaybeforesend = None
        self._child.delayafterclose = self._child.delayafterterminate = 0.02
        self._child.logfile_read = self
        self._unmatched = ""
        self._ended = False

    def write(self, data: bytes) -> None:
        """Take what the program printed; called by pexpect whoever reads."""
        self.transcript.write(data)
        text = data.decode(errors="replace").replace("\r", "")
        self._unmatched = (self._unmatched + text)[-_MATCHED:]

    def flush(self) -> None:
        """Bring the transcript's file up to date; called by pexpect."""
        self.transcript.flush()

    @property
    def pid(self) -> int:
        """The program's number."""
        number = self._child.pid
        assert number is not None
        return number

    def fileno(self) -> int:
        """Return the terminal's descriptor, readable when there is something to `poll`."""
        number = self._child.fileno()
        assert number is not None
        return number

    @property
    def alive(self) -> bool:
        """Whether the program runs."""
        return not self._child.closed and bool(self._child.isalive())

    @property
    def exit_status(self) -> str:
        """How the program ended, in words."""
        if self.alive:
            return "still running"
        status = self._child.exitstatus or 0
        # Who runs it for us (bwrap) tells a signal as shells do.
        number = self._child.signalstatus or (status - 128 if status > 128 else 0)
        try:
            return f"ended by {signal.Signals(number).name}"
        except ValueError:
            return f"ended with status {status}"

    def poll(self) -> bool:
        """Read what is there, without waiting, at most 1 MB.

        Return False once the program has closed its end.
        """
        for _ in range(64):
            if self._ended or self._child.closed:
                return False
            try:
                if not self._child.read_nonblocking(16384, timeout=0):
                    break
            except pexpect.TIMEOUT:
                break
            except pexpect.EOF:
                self._ended = True
        return not self._ended

    @property
    def panicked(self) -> Report | None:
        """The kernel's panic, if it has printed one."""
        if "Kernel panic" not in self.transcript.text:
            return None
        return next((r for r in self.transcript.reports() if r.kind is Kind.PANIC), None)

    def tail(self, lines: int = 30) -> str:
        """Return the last lines printed."""
        return "\n".join(_ESCAPE.sub("", self.transcript.text).splitlines()[-lines:])

    def expect_ready(self, pattern: str = r"[#$] ", timeout: float = 30.0) -> bool:
        """Wait for `pattern`, such as a shell's prompt, behind what was last waited for.

        Return whether it came within `timeout` seconds of the reference machine.
        """
        limit = time.monotonic() + limits.scaled(timeout)
        while True:
            more = self.poll()
            match = re.search(pattern, self._unmatched)
            if match:
                self._unmatched = self._unmatched[match.end() :]
                return True
            if not more or time.monotonic() >= limit:
                return False
            select.select([self], [], [], 0.1)

    def send(self, text: str) -> None:
        """Type `text`."""
        self._child.send(text)

    def interact(self) -> None:
        """Give the terminal to the person at the keyboard until Ctrl-] or the program's end."""
        size = shutil.get_terminal_size()
        self._child.setwinsize(size.lines, size.columns)
        # What was read up to now would be missed, the prompt above all.
        sys.stdout.write(self.transcript.text)
        sys.stdout.flush()
        self._child.interact(escape_character=chr(29))

    def close(self) -> None:
        """End the program, read the rest, and close the terminal and the transcript."""
        if not self._child.closed:
            if self.alive:
                self._end()
            self.poll()
            self._child.close(force=True)
        self.transcript.close()

    def _end(self) -> None:
        # Who runs a program in a sandbox for us (nsenter) stays outside, waits for it and ends
        # with it. If it ended first, the program would be left to the machine's first process,
        # which may take seconds to notice, and in some containers never does; until then the
        # sandbox does not go away.
        inner = psutil.Process(self.pid).children()
        if not inner:
            os.kill(self.pid, signal.SIGTERM)
            return
        for process in inner:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        limit = time.monotonic() + limits.scaled(_END_LIMIT)
        while self.alive and time.monotonic() < limit:
            time.sleep(0.01)
