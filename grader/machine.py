"""The machine: a kernel booted in QEMU, inside a sandbox, with an agent that runs commands in it.

This is the only file that knows QEMU's command line. `Machine` owns everything that belongs to
one boot (namespaces, tap, emulator, console, the agent's line), and leaves none of it behind,
however it ends.

>>> with Machine(MachineConfig(kernel=vmlinux, initramfs=image.initramfs)) as machine:
...     machine.run("uname -r").output
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pexpect
from pexpect.fdpexpect import fdspawn

from grader import agent, confined, container, limits, lockstep, network
from grader.console import Console, Kind, Report, decode, essence
from grader.errors import UserError

QEMU = "qemu-system-x86_64"

# What the guest executes, and so what is counted, depends on the CPU model; it is therefore
# written out and the same everywhere. qemu64 is AMD's: not vulnerable to Meltdown, as the servers
# of today, so no page-table switch on each system call. Added is what such servers have and the
# kernel's measured paths use, as far as TCG has it: RDRAND (without it the random pool costs tens
# of thousands of instructions a connection), SMAP and SMEP, FSGSBASE, POPCNT. ARAT tells the kernel
# that the local timer never stops. Left out: ERMS and FSRM, because QEMU's versions count the
# rounds of a REP instruction differently; XSAVE, on some of whose variants under TCG the kernel
# hangs; MTRR, which would only be found inconsistent; CX16, for QEMU 7.2 makes the flags after
# CMPXCHG16B of what is stale: if interrupts come just before and behind, the second saves random
# ones, the kernel single-steps, and whoever allocated memory there gets what another has, too. That
# was once in some hundred boots; in exact mode, each time. What SLUB does instead costs as much
# (48,839 instructions for 48,999).
CPU_MODEL = (
    "qemu64,-svm,-mtrr,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand,+fsgsbase,+smep,"
    "+smap,+rdtscp,+arat,-cx16"
)

# microvm boots no faster, and has neither a PM timer nor a HPET: on a loaded host its kernel finds
# no frequency for its clocks, or a wrong one, and the TCP timers with it. What is switched off is
# not used and would be probed.
_BOARD = "q35,sata=off,smbus=off,usb=off,vmport=off"

# What boots without, and every third instruction of a boot is spent on otherwise: random numbers
# from jitter, keys, and what makes the formats and the filters of ftrace nicer to read.
_SKIPPED = (
    "jent_mod_init",
    "init_encrypted",
    "trace_eval_init",
    "ftrace_check_for_weak_functions",
)
# A clock that is not used, tried out for 22 ms, which is 22 million instructions in virtual time.
_SKIPPED_EXACTLY = ("init_acpi_pm_clocksource",)

# Once it runs, the emulator starts no process and does not become anybody else.
_SECCOMP = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_MAC = "52:54:00:12:34:56"

_PORT = "org.megapipe.control"

_OUTPUT_CAP = 1 << 20

# Of a trace, in a message; all of it is in the transcript.
_SHOWN_LINES = 60

# Seconds on the reference machine.
_BOOT_LIMIT = 90.0
_RUN_LIMIT = 30.0
_GRACE = 3.0
_DUMP_LIMIT = 5.0


class MachineError(UserError):
    """The guest cannot go on. `console` holds the last lines of its console."""

    def __init__(self, problem: str, todo: str, console: str = "") -> None:
        super().__init__(problem, todo)
        self.console = console

    def report(self) -> str:
        """Return the problem, what to do, and what the kernel said: a trace, or its last lines."""
        trace = getattr(self, "trace", "").splitlines()
        if len(trace) > _SHOWN_LINES:
            trace[_SHOWN_LINES:] = ["[...]"]
        said = "\n".join(trace) or self.console
        return super().report() + (f"\nwhat the kernel said:\n{said}" if said else "")


class NotBooted(MachineError):
    """The kernel did not come so far that its agent answered."""


class Panicked(MachineError):
    """The kernel panicked. `trace` is its report, with source lines where they are known."""

    def __init__(self, problem: str, todo: str, console: str, trace: str) -> None:
        super().__init__(problem, todo, console)
        self.trace = trace


class Hung(MachineError):
    """The guest did not answer in time. `trace` shows where its kernel was, if it could be had."""

    def __init__(self, problem: str, todo: str, console: str, trace: str) -> None:
        super().__init__(problem, todo, console)
        self.trace = trace


class TimedOut(MachineError):
    """A command took too long and was ended; the guest is well and can be used on.

    `output` is what the command had printed.
    """

    def __init__(self, problem: str, todo: str, console: str, output: bytes) -> None:
        super().__init__(problem, todo, console)
        self.output = output


class Lost(MachineError):
    """The emulator ended, or the agent's answers make no sense."""


class Misplaced(MachineError):
    """The network card's interrupts cannot be put on the CPUs they belong to."""


@dataclass(frozen=True)
class MachineConfig:
    """What a machine is made of."""

    kernel: Path
    """The vmlinux (ELF with a PVH note)."""
    initramfs: Path
    vcpus: int = 4
    queues: int | None = None
    """Queue pairs of the network card; None for one per CPU."""
    memory_mib: int = 512
    accelerator: Literal["tcg", "kvm"] = "tcg"
    exact: bool = False
    """In virtual time, without a network: the same instructions in each run."""
    command: str = ""
    """Run by init before the agent starts; see /run/boot.output and /run/boot.status."""
    extra_qemu: tuple[str, ...] = ()
    opened: tuple[Path, ...] = ()
    """Files and folders that `extra_qemu` names and QEMU opens, perhaps for writing."""
    kernel_args: tuple[str, ...] = ()
    seed: int = 1
    gdb: bool = False
    """Serve GDB on the socket `Machine.gdb_socket`."""
    shell: bool = False
    """A shell on the console, for people, and a talkative kernel."""
    disk: Path | None = None
    """A raw image for /dev/vda, changed by the guest."""
    disk_bytes_per_second: int = 0
    """How fast the disk is at most, for reads and writes each; 0: as fast as it can be."""
    symbols: tuple[Path, ...] = ()
    """ELF files with debug information, to explain a trace with."""
    slowness: float = 1.0
    """How many times slower than the lab's kernel this one is: time limits grow by it."""

    @property
    def queue_pairs(self) -> int:
        """How many queue pairs the network card has."""
        return self.vcpus if self.queues is None else self.queues

    def check(self) -> None:
        """Raise `ValueError` on what cannot be."""
        if not 1 <= self.vcpus <= 64:
            raise ValueError(f"a machine has 1 to 64 CPUs, not {self.vcpus}")
        if not 1 <= self.queue_pairs <= self.vcpus:
            raise ValueError(f"{self.queue_pairs} queues for {self.vcpus} CPUs: take 1 to as many")
        if self.exact and self.accelerator != "tcg":
            raise ValueError("exact runs need TCG")


@dataclass(frozen=True)
class CommandResult:
    """How a command ended: exit code or minus the signal, output, whether that was cut off."""

    status: int
    output: bytes
    truncated: bool

    @property
    def text(self) -> str:
        """The output as text."""
        return self.output.decode(errors="replace")


class Machine:
    """A booted machine that lives as long as the ``with`` block.

    Entering it boots the kernel and returns when the agent has answered; raises
    `NetworkUnavailable` if there can be no sandbox, `NotBooted` or `Panicked` if the kernel does
    not come up. `transcript` is the file for what the console prints.
    """

    def __init__(self, config: MachineConfig, transcript: Path | None = None) -> None:
        config.check()
        self.config = config
        self.boot_seconds = 0.0
        self._transcript = transcript
        self._stack = ExitStack()
        self._frames = agent.Frames()
        self._pending: deque[agent.Frame] = deque()
        self._numbers = itertools.count(1)
        self._argv: list[str] = []
        self._started_at = self._begin = 0.0
        self._load = (0.0, 0.0, 0.0)

    # ---- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the emulator without waiting for its kernel: ``with`` does the rest.

        Only for whoever has something else to do meanwhile, such as starting another machine;
        must be followed by ``with`` or by `close`. Raises `NetworkUnavailable`, or `NotBooted`
        if there is nothing to boot.
        """
        for path in (self.config.kernel, self.config.initramfs):
            if not path.is_file():
                raise NotBooted(f"{path} does not exist", "build it first")
        needed = [(QEMU, "qemu-system-x86"), ("setpriv", "util-linux")]
        if not self._uncontained():
            needed.append(("bwrap", "bubblewrap"))
        for tool, package in needed:
            if shutil.which(tool) is None:
                raise NotBooted(f"{tool} is missing", f"Debian: apt install {package}")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Machine:
        if not self._argv:
            self.start()
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the emulator and everything that ran beside it in the sandbox."""
        with _uninterrupted():
            self._stack.close()

    def scaled(self, seconds: float) -> float:
        """Return a time limit, given for the lab's kernel on the reference machine."""
        return limits.scaled(seconds) * self.config.slowness

    def _start(self) -> None:
        self._load = os.getloadavg()
        self._started_at = time.time()
        self._begin = time.monotonic()
        self.sandbox = network.Uncontained() if self._uncontained() else network.Sandbox()
        self._stack.enter_context(self.sandbox)
        if not self.config.exact:
            self.sandbox.add_tap(self.config.queue_pairs)
        # Socket pairs: unlike a socket with a name, they leave nothing to clear away.
        self._link, agent_end = socket.socketpair()
        monitor, monitor_end = socket.socketpair()
        self._monitor = fdspawn(
            monitor, timeout=self.scaled(_GRACE), encoding="utf-8", codec_errors="replace"
        )
        for end in (self._link, monitor):
            self._stack.callback(end.close)
        self._link.setblocking(False)
        with agent_end, monitor_end:
            self._argv = self._command_line(agent_end.fileno(), monitor_end.fileno())
            libraries = lockstep.libraries() if self.config.exact else []
            if libraries:
                self._argv[:0] = lockstep.prefix(libraries)
            self.console = Console(
                self.sandbox.command([*self._apart(libraries), *self._argv]),
                transcript=self._transcript,
                descriptors=(agent_end.fileno(), monitor_end.fileno()),
            )
        self._stack.callback(self.console.close)

    def _wait(self) -> None:
        """Wait until the agent has answered and the interrupts are where they belong."""
        try:
            hello = self._next(time.monotonic() + self.scaled(_BOOT_LIMIT))
            if hello is None:
                raise self.hung(f"no answer within {self.scaled(_BOOT_LIMIT):.0f} s")
            if hello.type is not agent.Type.HELLO:
                raise self._lost(f"the agent's first frame is {hello.type.name}")
        except (Lost, Hung) as error:
            raise NotBooted(
                f"the kernel did not come up: {error.problem}",
                "see the console's last lines for what it did last",
                "\n".join(filter(None, [error.console, getattr(error, "trace", "")])),
            ) from None
        if not self.config.exact:
            self._place_interrupts()
        self.boot_seconds = time.monotonic() - self._begin

    def _uncontained(self) -> bool:
        """Whether nothing holds the emulator apart but the machine, which is thrown away."""
        return self.config.exact and container.thrown_away()

    def _apart(self, libraries: Sequence[Path]) -> list[str]:
        """Return the command that runs the emulator where it sees only what it opens.

        It has no capability there: a guest that breaks out of it finds nothing to go on with.
        """
        if self._uncontained():
            return []
        config = self.config
        argv = ["bwrap", "--die-with-parent", "--cap-drop", "ALL", *confined.system_files()]
        for path in (config.kernel, config.initramfs, *libraries):
            argv += confined.visible(path.absolute())
        for path in (*([config.disk] if config.disk else []), *config.opened):
            argv += confined.visible(path.absolute(), writable=True)
        argv += confined.visible(self.sandbox.folder_inside, writable=True)
        for device in ("null", "zero", "random", "urandom", "kvm", "net/tun"):
            argv += ["--dev-bind-try", f"/dev/{device}", f"/dev/{device}"]
        return [*argv, "--remount-ro", "/", "--chdir", "/", "--"]

    def _command_line(self, agent_fd: int, monitor_fd: int) -> list[str]:
        config = self.config
        cpus, pairs = config.vcpus, config.queue_pairs
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-sandbox", _SECCOMP]
        # With a HPET, which takes over its interrupt, the PIT would not count: see mp_turns.c.
        board = f"{_BOARD},hpet=off" if config.exact else _BOARD
        argv += ["-machine", board, "-m", str(config.memory_mib), "-smp", str(cpus)]
        if config.accelerator == "kvm":
            argv += ["-accel", "kvm", "-cpu", "host"]
        else:
            # One CPU at a time, in turns: on a host with fewer cores than the guest, threads of
            # their own would only make counts vary with the host's scheduler.
            argv += ["-accel", "tcg,thread=single", "-cpu", CPU_MODEL]
            argv += ["-seed", str(config.seed)]
        argv += ["-kernel", str(config.kernel.absolute())]
        argv += ["-initrd", str(config.initramfs.absolute())]
        argv += ["-append", self._kernel_command_line()]
        # Ctrl-C belongs to the guest's shell.
        argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        argv += ["-chardev", f"socket,id=agent,fd={agent_fd}"]
        if config.exact:
            # A virtio port speaks when the host's event loop comes round to it; a serial line says
            # nothing by itself. Slow, but nothing is said before the command has ended.
            argv += ["-serial", "chardev:agent"]
        else:
            argv += ["-device", "virtio-serial-pci,max_ports=2"]
            argv += ["-device", f"virtserialport,chardev=agent,name={_PORT}"]
        # The one for people: QMP would have a thread of its own, woken whenever virtual time is
        # asked for, which in exact mode is at each turn's end.
        argv += ["-chardev", f"socket,id=monitor,fd={monitor_fd}"]
        argv += ["-mon", "chardev=monitor,mode=readline"]
        if config.exact:
            # Time is the number of instructions executed. It skips what nobody would execute.
            argv += ["-icount", "shift=0,sleep=off", "-rtc", "base=2012-10-08,clock=vm"]
        else:
            # A multi-queue tap steers a flow to the queue on which the guest last sent for it, as
            # Intel's Flow Director did in the paper's testbed. rss=on would steer by hash alone,
            # but in 7.2 it stalls under a burst of connections.
            tap = f"tap,id=net,ifname={network.TAP_NAME},script=no,downscript=no,vhost=off"
            card = f"virtio-net-pci,netdev=net,mac={_MAC},romfile="
            if pairs > 1:
                tap += f",queues={pairs}"
                # Two for each pair, one for the control queue, one for the configuration.
                card += f",mq=on,vectors={2 * pairs + 2}"
            argv += ["-netdev", tap, "-device", card]
        if config.disk is not None:
            limit = config.disk_bytes_per_second
            drive = f"file={config.disk.absolute()},format=raw,if=none,id=disk"
            if limit:
                drive += f",throttling.bps-read={limit},throttling.bps-write={limit}"
            argv += ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
        if config.gdb:
            path = self.sandbox.folder_inside / _GDB
            argv += ["-chardev", f"socket,id=gdb,path={path},server=on,wait=off"]
            argv += ["-gdb", "chardev:gdb"]
        return [*argv, *config.extra_qemu]

    def _kernel_command_line(self) -> str:
        config = self.config
        # In virtual time it does not matter how fast the host is, and all must be as last time.
        factor = 1.0 if config.exact else self.scaled(1.0)
        words = [
            "console=ttyS0",
            # Warnings and worse; the rest is in dmesg. The serial line is slow, and a flood of
            # notices would be measured with the rest.
            *(["loglevel=7"] if config.shell else ["quiet", "loglevel=5"]),
            # TCG's CPUs share one time-stamp counter. The kernel would rather believe jiffies,
            # of which CPUs that wait for their turn lose some, and fall back to them as its clock.
            "tsc=reliable",
            # Built in only for what it selects (see kernel/config/lab.config): no such devices.
            "ifb.numifbs=0",
            # Otherwise each CPU measures it for itself, one after the other, in 80 ms. In ticks of
            # the counter per jiffy, rather too many: a delay may be longer than asked for.
            "lpj=20000000",
            # The check of the timer's interrupt takes a turn of every CPU.
            "no_timer_check",
            # At boot they test what nothing here uses, at the emulator's speed.
            "cryptomgr.notests",
            f"initcall_blacklist={','.join(_SKIPPED + (_SKIPPED_EXACTLY if config.exact else ()))}",
            # A kernel that has gone wrong ends at once (-no-reboot), with its report.
            "panic=-1",
            "oops=panic",
            "softlockup_panic=1",
            "sysctl.kernel.panic_on_rcu_stall=1",
            # A CPU that spins and a host that is slow look alike from the inside.
            f"watchdog_thresh={min(60, round(10 * factor))}",
            f"rcupdate.rcu_cpu_stall_timeout={min(300, round(21 * factor))}",
            # How this process gets a trace out of a kernel that does nothing else any more: an NMI
            # to the first CPU, which panics, and then (0x40) asks all CPUs for their stacks.
            "unknown_nmi_panic",
            "panic_print=0x40",
            "sysrq_always_enabled",
        ]
        if config.accelerator == "tcg":
            # QEMU's local timers count nanoseconds (patch 7 of the kernel's).
            words.append("lapic_timer_khz=1000000")
        if config.exact:
            words.append("lab.port=/dev/ttyS1")
        else:
            words.append(f"lab.addr={network.GUEST_ADDRESS}/{network.PREFIX_LENGTH}")
        if config.shell:
            words.append("lab.shell")
        words += config.kernel_args
        if config.command:
            words += ["--", config.command]
        return " ".join(words)

    # ---- use -----------------------------------------------------------------------------------

    def speaks(self) -> bool:
        """Say whether the agent has said something: of a command line's run, that it is over."""
        return bool(self._pending or select.select([self._link], [], [], 0)[0])

    @property
    def address(self) -> str:
        """The guest's address on the tap."""
        return network.GUEST_ADDRESS

    @property
    def gdb_socket(self) -> Path:
        """What to say to GDB: ``target remote <this>`` (with `MachineConfig.gdb`)."""
        return self.sandbox.folder / _GDB

    def run(
        self,
        command: str,
        *,
        timeout: float = _RUN_LIMIT,
        uid: int | None = None,
        cap: int = _OUTPUT_CAP,
    ) -> CommandResult:
        """Run `command` with /bin/sh in the guest; return when its shell has ended.

        `timeout` is in seconds of the reference machine. `uid` is the user (None: root). Output
        beyond `cap` bytes is dropped and marked. What the command leaves in the background lives
        on, if it has sent its output elsewhere and left the session (setsid).
        Raises `TimedOut` if the command had to be ended, `Hung` if the guest does not even do
        that, `Panicked` or `Lost` if there is no guest any more.
        """
        number = next(self._numbers) & 0xFFFF
        self._send(agent.pack_run(number, command, uid or 0, cap))
        output = bytearray()
        limit = time.monotonic() + self.scaled(timeout)
        done = self._finish(number, output, limit)
        if done is None:
            self._send(agent.pack(agent.Type.KILL, number))
            limit = time.monotonic() + self.scaled(_GRACE)
            done = self._finish(number, output, limit)
            if done is None:
                raise self.hung(f"the command {_short(command)} does not end")
            if done.killed:
                raise TimedOut(
                    f"the command {_short(command)} took longer than "
                    f"{self.scaled(timeout):.0f} s and was ended",
                    "if it only needs more time on this machine, raise "
                    f"{limits.ENVIRONMENT_VARIABLE} (now {limits.factor():.1f})",
                    self.console.tail(),
                    bytes(output),
                )
        return CommandResult(done.status, bytes(output), done.truncated)

    def _finish(self, number: int, output: bytearray, limit: float) -> agent.Exit | None:
        """Collect `output` until the command `number` has ended, or the limit has passed."""
        while (frame := self._next(limit)) is not None:
            if frame.type is agent.Type.ERROR:
                raise self._lost(f"the agent refused: {frame.payload.decode(errors='replace')}")
            # A reply to a command that was given up may still be on its way.
            if frame.id != number:
                continue
            if frame.type is agent.Type.OUTPUT:
                output += frame.payload
            elif frame.type is agent.Type.EXIT:
                try:
                    return agent.unpack_exit(frame)
                except agent.Malformed as error:
                    raise self._lost(str(error)) from None
        return None

    def watch(self) -> None:
        """Look whether the guest is still there, without waiting.

        For callers that wait for something else meanwhile, some times a second: it also keeps a
        console that prints a lot from filling up. Raises `Panicked` or `Lost`.
        """
        more = self.console.poll()
        if self.console.panicked:
            raise self._panicked()
        if not more or not self.console.alive:
            raise self._lost(f"the emulator {self.console.exit_status}")

    def host(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process in the sandbox, on the host's side of the tap."""
        return self.sandbox.popen(argv, **options)

    def wait(self, process: subprocess.Popen[Any], *, timeout: float = _RUN_LIMIT) -> int:
        """Wait for a process of `host` and return its status, watching the guest meanwhile.

        Its output must not go to a pipe that nobody reads. Raises what `watch` raises, and `Hung`
        after `timeout` seconds of the reference machine; the process is ended in all these cases.
        """
        limit = time.monotonic() + self.scaled(timeout)
        try:
            while process.poll() is None:
                self.watch()
                if time.monotonic() >= limit:
                    raise self.hung(
                        f"{_name(process)} had not ended after {self.scaled(timeout):.0f} s"
                    )
                # Wakes up early when the console has something.
                select.select([self.console], [], [], 0.05)
            self.watch()
        except BaseException:
            process.kill()
            process.wait()
            raise
        return int(process.returncode)

    def memory(self, address: int, size: int) -> bytes:
        """Return what lies in the guest's physical memory, while it runs on."""
        name = "memory"
        try:
            inside = self.sandbox.folder_inside / name
            self._ask(f'pmemsave {address:#x} {size} "{inside}"')
            return (self.sandbox.folder / name).read_bytes()
        except OSError as error:
            raise self._lost(f"the guest's memory cannot be read: {error}") from None
        finally:
            (self.sandbox.folder / name).unlink(missing_ok=True)

    def _ask(self, command: str) -> None:
        """Have the emulator's monitor do something. Raises `OSError` if it does not."""
        prompt = "(qemu) "
        try:
            if self._monitor.after is None:
                self._monitor.expect_exact(prompt)
            self._monitor.sendline(command)
            self._monitor.expect_exact(prompt)
        except pexpect.ExceptionPexpect as error:
            raise OSError("the emulator's monitor does not answer") from error
        # First the command itself, as it was typed, then what went wrong, if anything did.
        _, _, problem = str(self._monitor.before).partition("\r\n")
        if problem:
            raise OSError(problem.strip())

    def environment(self) -> dict[str, Any]:
        """Return what is needed to repeat this boot, as plain data for a result file."""
        return {
            "qemu": qemu_version(),
            "qemu_command": self._argv,
            "cpu_model": CPU_MODEL if self.config.accelerator == "tcg" else "host",
            "accelerator": self.config.accelerator,
            "exact": self.config.exact,
            "vcpus": self.config.vcpus,
            "queues": 0 if self.config.exact else self.config.queue_pairs,
            "memory_mib": self.config.memory_mib,
            "seed": self.config.seed,
            "boot_seconds": round(self.boot_seconds, 3),
            "started_at": self._started_at,
            "timeout_factor": round(limits.factor(), 2),
            "host_load": list(self._load),
            "host_cpus": len(os.sched_getaffinity(0)),
            "host_kernel": platform.release(),
            "python": platform.python_version(),
        }

    # ---- the agent's line ----------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        limit = time.monotonic() + self.scaled(_GRACE)
        view = memoryview(data)
        while view:
            self.watch()
            try:
                view = view[self._link.send(view) :]
            except BlockingIOError:
                select.select([self.console], [self._link], [], 0.05)
            except OSError as error:
                raise self._gone(f"the agent's line broke: {error.strerror}") from None
            if view and time.monotonic() >= limit:
                raise self.hung("the agent does not take a command")

    def _next(self, limit: float) -> agent.Frame | None:
        """Return the agent's next frame, or None at `limit`, with an eye on the console."""
        while True:
            if self._pending:
                return self._pending.popleft()
            left = limit - time.monotonic()
            if left <= 0:
                return None
            sources: list[socket.socket | Console] = [self._link, self.console]
            ready, _, _ = select.select(sources, [], [], min(left, 0.5))
            # The agent's line first: what was said before the end still counts.
            if self._link in ready:
                self._receive()
            else:
                self.watch()

    def _receive(self) -> None:
        try:
            data = self._link.recv(1 << 16)
        except OSError as error:
            raise self._gone(f"the agent's line broke: {error.strerror}") from None
        if not data:
            raise self._gone("the agent's line was closed")
        try:
            self._pending.extend(self._frames.feed(data))
        except agent.Malformed as error:
            raise self._lost(f"the agent's answer makes no sense: {error}") from None

    # ---- what goes wrong -----------------------------------------------------------------------

    def _drain(self, seconds: float) -> None:
        """Read the console until the emulator has ended, or for `seconds`."""
        limit = time.monotonic() + seconds
        while self.console.poll() and time.monotonic() < limit:
            select.select([self.console], [], [], 0.05)

    def _gone(self, problem: str) -> MachineError:
        """Return the error for a line that broke: a panic, if the console shows one."""
        self._drain(self.scaled(_GRACE))
        if self.console.panicked:
            return self._panicked()
        return self._lost(f"{problem} (the emulator {self.console.exit_status})")

    def _lost(self, problem: str) -> MachineError:
        return Lost(
            problem,
            "run it again; if it repeats, see the console's last lines",
            self.console.tail(),
        )

    def _panicked(self) -> MachineError:
        # The report comes in pieces, and the emulator ends (panic=-1) when it is complete.
        self._drain(self.scaled(_DUMP_LIMIT))
        reports = self.console.transcript.reports()
        cause = _cause(reports)
        faults = [report for report in reports if report.kind is not Kind.PANIC]
        trace = "\n\n".join(essence(report.trace) for report in faults or reports)
        return Panicked(
            f"the kernel panicked: {cause}",
            "the trace names the function and, where the file was built with debug information, "
            "the line",
            self.console.tail(),
            decode(trace, self.config.symbols),
        )

    def hung(self, problem: str) -> MachineError:
        """Return the error for a guest that does not answer, with a trace taken from outside."""
        before = len(self.console.transcript.reports())
        begin = len(self.console.transcript.text)
        # Tasks that sleep in the kernel, if there is still an agent to ask.
        with suppress(OSError):
            self._link.send(agent.pack(agent.Type.SYSRQ, 0, b"9w"))
        self._drain(1.0)
        blocked = self.console.transcript.text[begin:]
        self._inject_nmi()
        self._drain(self.scaled(_DUMP_LIMIT))
        reports = self.console.transcript.reports()[before:]
        trace = "\n\n".join(essence(text) for text in [blocked, *(r.trace for r in reports)])
        return Hung(
            problem,
            "the trace shows where the CPUs and the sleeping tasks were: look for a lock that is "
            "never released, or a wake-up that never comes",
            self.console.tail(),
            decode(trace, self.config.symbols),
        )

    def _inject_nmi(self) -> None:
        # An emulator that is gone or stuck does not take it, and the error is about that anyway.
        with suppress(OSError):
            self._ask("nmi")

    # ---- interrupts ----------------------------------------------------------------------------

    def _place_interrupts(self) -> None:
        """See to it that queue i's interrupts and transmit path are on the CPUs they belong to."""
        pairs = self.config.queue_pairs
        if pairs == 1:
            return
        wanted = share_cpus(self.config.vcpus, pairs)
        found = self._placement()
        if not found.fits(wanted):
            # The driver does this by itself; where it did not, it takes the wish of the user.
            self.run(found.command(wanted))
            found = self._placement()
        if not found.fits(wanted):
            raise Misplaced(
                f"the network card's queues are placed {found}, where {wanted} is needed",
                "counts per CPU would be wrong: try another version of QEMU, or of the kernel",
                self.console.tail(),
            )

    def _placement(self) -> Placement:
        return parse_placement(self.run(_SHOW_PLACEMENT).text)


# The wish, which the kernel fulfils at the interrupt's next arrival (an MSI is not moved while it
# may be under way), and not the effective affinity, which is still the old one after a boot.
_SHOW_PLACEMENT = (
    "cat /proc/interrupts; cd /proc/irq; grep . */smp_affinity_list; "
    "cd /sys/class/net/eth0/queues; grep . tx-*/xps_cpus"
)


@dataclass(frozen=True)
class Placement:
    """Where a multi-queue card's interrupts go, and which CPUs send on which queue."""

    interrupts: dict[int, list[tuple[int, frozenset[int]]]]
    """By queue: each interrupt's number and CPUs."""
    senders: dict[int, frozenset[int]]
    """By queue: the CPUs (XPS)."""

    def fits(self, wanted: Sequence[frozenset[int]]) -> bool:
        """Tell whether every queue has two interrupts, and all is where it should be."""
        return all(
            len(self.interrupts.get(queue, [])) == 2
            and all(place and place <= cpus for _, place in self.interrupts[queue])
            and self.senders.get(queue) == cpus
            for queue, cpus in enumerate(wanted)
        )

    def command(self, wanted: Sequence[frozenset[int]]) -> str:
        """Return the shell command that asks for it."""
        lines = []
        for queue, cpus in enumerate(wanted):
            listed = ",".join(map(str, sorted(cpus)))
            for number, _ in self.interrupts.get(queue, []):
                lines.append(f"echo {listed} > /proc/irq/{number}/smp_affinity_list")
            mask = sum(1 << cpu for cpu in cpus)
            words = [f"{mask >> 32:x}", f"{mask & 0xFFFFFFFF:08x}"] if mask >> 32 else [f"{mask:x}"]
            lines.append(f"echo {','.join(words)} > /sys/class/net/eth0/queues/tx-{queue}/xps_cpus")
        return "\n".join(lines)


def share_cpus(cpus: int, queues: int) -> list[frozenset[int]]:
    """Return each queue's CPUs, as the driver shares them out: in order, the rest to the first."""
    size, rest = divmod(cpus, queues)
    shares, first = [], 0
    for queue in range(queues):
        after = first + size + (1 if queue < rest else 0)
        shares.append(frozenset(range(first, after)))
        first = after
    return shares


def parse_placement(text: str) -> Placement:
    """Read what ``_SHOW_PLACEMENT`` prints."""
    queues: dict[int, int] = {}
    for match in re.finditer(r"^ *(\d+):.* virtio\d+-(?:input|output)\.(\d+)$", text, re.M):
        queues[int(match[1])] = int(match[2])
    interrupts: dict[int, list[tuple[int, frozenset[int]]]] = {}
    for match in re.finditer(r"^(\d+)/smp_affinity_list:(\S+)$", text, re.M):
        number = int(match[1])
        if number in queues:
            interrupts.setdefault(queues[number], []).append((number, _cpu_list(match[2])))
    senders = {}
    for match in re.finditer(r"^tx-(\d+)/xps_cpus:([0-9a-f,]+)$", text, re.M):
        mask = int(match[2].replace(",", ""), 16)
        senders[int(match[1])] = frozenset(
            cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1
        )
    return Placement(interrupts, senders)


def _cpu_list(text: str) -> frozenset[int]:
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


# ---- the host ----------------------------------------------------------------------------------


@functools.cache
def qemu_version() -> str:
    """Return the first line that QEMU says about itself."""
    done = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


def kvm_works(kernel: Path) -> tuple[bool, str]:
    """Tell whether KVM runs `kernel` on this machine, and if not, why; within a few seconds.

    The device can exist, open, and create a machine, and still run nothing: only a booted kernel
    proves it. It boots without a root file system, and panics when it has come that far.
    """
    device = Path("/dev/kvm")
    if not device.exists():
        return False, "there is no /dev/kvm: virtualisation is off in the firmware, or not offered"
    if not os.access(device, os.R_OK | os.W_OK):
        return False, "/dev/kvm is not open to you: sudo usermod -aG kvm $USER, then log in again"
    argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", _BOARD, "-m", "256", "-accel", "kvm", "-cpu", "host"]
    argv += ["-kernel", str(kernel.absolute()), "-append", "console=ttyS0 quiet panic=-1"]
    argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    with network.Sandbox() as sandbox:
        console = Console(sandbox.command(argv))
        try:
            limit = time.monotonic() + _KVM_LIMIT
            while console.poll() and not console.panicked and time.monotonic() < limit:
                select.select([console], [], [], 0.1)
            said = console.tail(3).strip()
            if console.panicked and "Unable to mount root fs" in console.panicked.first_line:
                return True, ""
        finally:
            console.close()
    if said:
        return False, f"KVM does not run a kernel here: {said}"
    return False, f"KVM does not run a kernel here: it showed nothing for {_KVM_LIMIT:.0f} s"


# Not scaled: a kernel under KVM takes a fraction of it even on a slow machine.
_KVM_LIMIT = 6.0

_GDB = "gdb"


# ---- small things ------------------------------------------------------------------------------


def _cause(reports: Sequence[Report]) -> str:
    """Return the line that says best why: the first report of a fault, or else the panic's own."""
    causes = [r for r in reports if r.kind in _FAULTS] or [
        r for r in reports if r.kind is Kind.PANIC
    ]
    return causes[0].first_line if causes else "for an unknown reason"


_FAULTS = {Kind.OOPS, Kind.BUG, Kind.LOCKUP, Kind.STALL, Kind.HUNG_TASK}


def _name(process: subprocess.Popen[Any]) -> str:
    """Return the command that a process of the sandbox runs, without what takes it there."""
    words = [str(word) for word in process.args] if isinstance(process.args, list) else []
    return _short(" ".join(words[words.index("KILL") + 2 :] if "KILL" in words else words))


def _short(command: str) -> str:
    line = " ".join(command.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C until the block has ended: clearing up must not be stopped half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
