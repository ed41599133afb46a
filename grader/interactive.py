"""`invoke boot` and `invoke load`: the machine for people."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from rich.console import Console as Terminal
from rich.table import Table

from grader import cache, given
from grader import variant as variants
from grader.errors import UserError
from grader.lab import LABS, Lab
from grader.load import Load, LoadError, LoadSpec, PhaseResult
from grader.machine import Machine, MachineConfig, kvm_works
from grader.network import Sandbox
from grader.progress import Progress
from grader.station import build, kernel_files, library_files
from images.build import GUEST
from kernel.build import UAPI, Module, build_kernel, compile_commands, source_key

SERVERS = "mp-server --batch --daemon --port 5000; epoll-server --daemon --port 5001"


def choose_variant(lab: Lab, name: str = "") -> variants.Variant:
    """Return the tree's variant of this name; without one, the usual variant."""
    known = {
        "mine": variants.mine,
        "solution": variants.solution,
        "starter": variants.starter,
    }
    choose = known.get(name or variants.usual(lab.folder))
    if choose is None:
        raise UserError(f"there is no variant called {name}", f"choose one of {', '.join(known)}")
    return choose(lab.folder)


def write_compile_commands(
    folder: Path, lab: Lab, variant: variants.Variant, module: Module
) -> Path:
    """Write compile_commands.json for editors: the module's files and the guest's programs."""
    commands = compile_commands(module, kernel_files(lab, variant))
    library = [path for path in library_files(lab, variant) if path.suffix == ".c"]
    sources = [*GUEST.glob("*.c"), *GUEST.glob("*/*.c"), *library]
    flags = f"-std=gnu11 -O2 -pthread -I{UAPI} -I{GUEST / 'libmegapipe'} -I{GUEST}"
    commands += [
        {"directory": str(GUEST), "file": str(path), "command": f"gcc {flags} -c {path}"}
        for path in sorted(sources)
    ]
    target = folder / "compile_commands.json"
    cache.write_whole(target, json.dumps(commands, indent=1) + "\n")
    return target


def boot(lab: Lab, variant: str, smp: int, gdb: bool, debug: bool, kvm: bool) -> None:
    """Boot a variant, start its servers, and give its console to this terminal."""
    if not 1 <= smp <= 16:
        raise UserError(f"--smp {smp}: a machine has 1 to 16 vCPUs", "choose --smp 4, say")
    chosen = choose_variant(lab, variant)
    given.check_source(LABS, source_key())
    progress = Progress()
    with progress.phase("build"):
        kernel = build_kernel(debug, progress)
        built = build(lab, chosen, kernel)
    if kvm:
        works, why = kvm_works(kernel.vmlinux)
        if not works:
            raise UserError(f"KVM does not work here: {why}", "leave --kvm out")
    config = MachineConfig(
        kernel=kernel.vmlinux,
        initramfs=built.image.initramfs,
        vcpus=smp,
        accelerator="kvm" if kvm else "tcg",
        shell=True,
        gdb=gdb,
        kernel_args=("loglevel=7",) if debug else (),
        symbols=(kernel.vmlinux, built.module.ko),
    )
    with ExitStack() as stack:
        with progress.phase("boot"):
            machine = stack.enter_context(Machine(config))
        stack.enter_context(_announced(machine.sandbox))
        terminal = Terminal()
        if gdb:
            terminal.print(
                f"gdb:  gdb {kernel.vmlinux} -ex 'target remote {machine.gdb_socket}' "
                f"-ex 'add-symbol-file {built.module.ko} {_text_address(machine)}'\n"
                "The servers do not run yet: set your breakpoints, `continue`, then press Enter "
                "here.",
                soft_wrap=True,
            )
            input()
        machine.run(SERVERS)
        hint = (
            f"\nLinux {kernel.release}, {smp} vCPUs, {chosen.name}: mp-server --batch listens on "
            "port 5000, epoll-server on 5001.\n"
            "Traffic, from another terminal:  invoke load     (or: invoke load --port 5001)\n"
            "Leave with Ctrl-] or `poweroff -f`.\n"
        )
        # Through the guest, so that it comes after what the kernel has said so far.
        machine.run(f"echo {shlex.quote(hint)} > /dev/console")
        machine.console.interact()


def _text_address(machine: Machine) -> str:
    """Return where the module's code lies, for gdb."""
    return machine.run("cat /sys/module/megapipe/sections/.text").text.strip()


def _state() -> Path:
    return cache.root() / "running.json"


@contextmanager
def _announced(sandbox: Sandbox) -> Iterator[None]:
    """Let `invoke load` in another terminal find this machine."""
    process = psutil.Process(sandbox.pid)
    state = {"pid": process.pid, "created": process.create_time()}
    cache.write_whole(_state(), json.dumps(state))
    try:
        yield
    finally:
        _state().unlink(missing_ok=True)


def _running() -> Sandbox:
    """Return the sandbox of the machine that `invoke boot` runs."""
    nothing = UserError("no machine is running", "start one in another terminal: invoke boot")
    try:
        state = json.loads(_state().read_text())
        process = psutil.Process(state["pid"])
        # A number alone might have been given to another process since.
        if process.create_time() != state["created"]:
            raise nothing
    except (OSError, ValueError, KeyError, psutil.Error):
        raise nothing from None
    return Sandbox.joined(process)


def load(spec: LoadSpec, transactions: int) -> int:
    """Send traffic to the running machine and print what came back; 1 if a byte was wrong."""
    sandbox = _running()
    # A whole number of connections.
    each = max(1, spec.transactions_per_connection)
    transactions = -(-transactions // each) * each

    def spawn(argv: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return sandbox.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe)

    terminal = Terminal()
    with Load(spec, spawn) as one:
        try:
            with terminal.status(f"{spec.connections} connections, {transactions} transactions"):
                one.start()
                phase = one.go(transactions)
                one.finish()
        except LoadError as error:
            raise UserError(str(error), "is the server still there? see its console") from error
    terminal.print(_table(phase))
    return 1 if phase.error_count else 0


def _table(phase: PhaseResult) -> Table:
    seconds = phase.wall_ns / 1e9
    rows = Table(show_header=False, box=None)
    rows.add_row("transactions", f"{phase.transactions}, errors {phase.error_count}")
    rows.add_row("time", f"{seconds:.2f} s, {phase.transactions / seconds:,.0f} per second")
    rows.add_row("packets", f"{phase.packets_dropped} dropped, {phase.retransmissions} sent again")
    if latency := phase.latency:
        rows.add_row(
            "latency",
            f"median {latency.p50:,.0f} µs, 99 % {latency.p99:,.0f} µs, most {latency.max:,.0f} µs",
        )
    for error in phase.details[:5]:
        rows.add_row(
            "error",
            f"{error.kind}: connection {error.connection}, transaction {error.transaction}, "
            f"byte {error.offset}",
        )
    return rows
