"""The stack probe: its plugin driven without a guest, and whose function is whose."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from grader import probe as probe_package
from grader.probe import ProbeError, files, sources, stack_file, stacks
from grader.probe.sources import Function, Site
from grader.probe.stacks import StackProbe, StackReading, kind_of
from kernel.build import Kernel

STACKS_C = Path(probe_package.__file__).with_name("stacks.c")
DATA = Path(__file__).with_name("probe")

BASE = 0xFFFFFFFF81000000
NAMES = (
    *("a", "b", "c", "d", "entry_SYSCALL_64", "asm_sysvec_x", "error_entry", "asm_exc_y"),
    *("common_interrupt_return", "__switch_to_asm", "__switch_to", "schedule", "ret_from_fork_asm"),
    *("__x86_indirect_thunk_array", "__x86_return_thunk", "handler", "thread"),
)
ADDRESSES = {name: BASE + 0x1000 * number for number, name in enumerate(NAMES)}
KERNEL = [
    *(Function(address, Site(name, "f.c")) for name, address in ADDRESSES.items()),
    Function(BASE + 0x1000 * len(NAMES), None),
]
USER = 0x401000
MODULE = 0xFFFFFFFFA0000000
# Each with its guard pages. Stacks grow down: the first return address lies below the top.
TASK, TASK2, IRQ, ENTRY = (0xFFFFC90000004000 + 0x8000 * number for number in range(4))


def block(where: str, end: str = "-", at: int = 0, n: int = 10, vcpu: int = 0) -> str:
    """Return the harness's line for a block; `where` is a function, perhaps with +offset."""
    name, _, offset = where.partition("+")
    start = {"user": USER, "module": MODULE, **ADDRESSES}[name]
    return f"{vcpu} {start + int(offset or '0', 16):x} {n} {end} {at:x}\n"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("harness") / "harness"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-DPROBE_API_VERSION=1"]
    source = DATA / "stacks_harness.c"
    subprocess.run(["cc", *flags, f"-I{STACKS_C.parent}", "-o", output, source], check=True)
    return output


class Driven:
    """A plugin that runs what it is told."""

    def __init__(self, harness: Path, probe: StackProbe, api: int) -> None:
        self.probe = probe
        option = probe.qemu_arguments()[1].partition(",")[2]
        self._process = subprocess.Popen(
            [harness, option],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "API": str(api)},
        )

    def __call__(self, *blocks: str) -> dict[str, int]:
        """Execute blocks and return instructions by path, the names with spaces between."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("".join(blocks) + "?\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
        return readable(self.probe.read())

    def end(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def readable(reading: StackReading) -> dict[str, int]:
    return {" ".join(site.name for site in path): n for path, n in reading.paths().items()}


@pytest.fixture(params=[1, 5])
def drive(
    request: pytest.FixtureRequest, harness: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, int]]:
    monkeypatch.setattr(files, "plugin", lambda *_: Path("stacks.so"))
    probe = StackProbe(2, KERNEL, node_slots=1 << 10)
    probe.__enter__()
    request.addfinalizer(lambda: probe.__exit__(None, None, None))
    driven = Driven(harness, probe, request.param)
    request.addfinalizer(driven.end)
    return driven


SYSCALL = (
    block("user"),
    block("entry_SYSCALL_64", "call", TASK - 0x100),
    block("a"),
)


def test_calls_and_returns(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        block("b", "call*reg", TASK - 0x180),
        block("c", "ret", TASK - 0x180),
        block("b+50", "ret", TASK - 0x140),
        block("a+60", "call*mem", TASK - 0x140),
        block("d", "bndret", TASK - 0x140),
        block("a+100", "ret", TASK - 0x100),
        block("entry_SYSCALL_64+50", "sysret"),
        block("user"),
    )
    assert found == {
        "user": 20,
        "entry_SYSCALL_64": 20,
        "entry_SYSCALL_64 a": 40,
        "entry_SYSCALL_64 a b": 20,
        "entry_SYSCALL_64 a b c": 10,
        "entry_SYSCALL_64 a d": 10,
    }


def test_tail_call_renames_the_frame(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        block("b", "jmp*mem", 0xFFFFFFFF82200000),
        block("c", "ret", TASK - 0x140),
        block("a+60"),
    )
    assert found["entry_SYSCALL_64 a"] == 30
    assert found["entry_SYSCALL_64 a b"] == 10
    assert found["entry_SYSCALL_64 a c"] == 10


def test_thunks_are_counted_where_they_were_called(drive: Driven) -> None:
    # Call the thunk; it calls itself, overwrites the return address, and "returns" to b. b jumps
    # to the thunk that returns for it.
    found = drive(
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        block("__x86_indirect_thunk_array", "call", TASK - 0x148),
        block("__x86_indirect_thunk_array+80", "ret", TASK - 0x148),
        block("b"),
        block("__x86_return_thunk", "ret", TASK - 0x140),
        block("a+60"),
    )
    assert found["entry_SYSCALL_64 a"] == 50
    assert found["entry_SYSCALL_64 a b"] == 20
    assert sum(found.values()) == 90


def test_recursion_from_one_place(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        block("b", "call", TASK - 0x180),
        block("b", "call", TASK - 0x1C0),
        block("b", "ret", TASK - 0x1C0),
        block("b+50", "ret", TASK - 0x180),
        block("b+50", "ret", TASK - 0x140),
        block("a+60"),
    )
    assert found["entry_SYSCALL_64 a b"] == 20
    assert found["entry_SYSCALL_64 a b b"] == 20
    assert found["entry_SYSCALL_64 a"] == 30


# What the entry of an interrupt does: on this stack it calls error_entry, which moves its own
# return address down and goes back; the handler is called where it then is.
def interrupt(stack: int, handler_stack: int) -> tuple[str, ...]:
    return (
        block("asm_sysvec_x", "call", stack),
        block("error_entry", "ret", stack - 0x78),
        block("asm_sysvec_x+50", "call", handler_stack),
        block("handler"),
    )


def returned(handler_stack: int) -> tuple[str, ...]:
    return (
        block("handler+50", "ret", handler_stack),
        block("asm_sysvec_x+a0"),
        block("common_interrupt_return", "iret", handler_stack + 0x78),
    )


def test_interrupt_is_a_root_and_what_it_interrupted_goes_on(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        block("b"),
        *interrupt(TASK - 0x200, TASK - 0x280),
        *returned(TASK - 0x280),
        block("b+50"),
        block("b+a0", "ret", TASK - 0x140),
        block("a+60"),
    )
    assert found["entry_SYSCALL_64 a b"] == 30
    assert found["entry_SYSCALL_64 a"] == 30
    assert found["asm_sysvec_x"] == 40
    assert found["asm_sysvec_x error_entry"] == 10
    assert found["asm_sysvec_x handler"] == 20
    assert sum(found.values()) == 10 + 10 + 30 + 30 + 40 + 10 + 20


def test_interrupt_between_a_call_and_its_function(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        *interrupt(TASK - 0x200, TASK - 0x280),
        *returned(TASK - 0x280),
        block("b", "ret", TASK - 0x140),
        block("a+60"),
    )
    assert found["entry_SYSCALL_64 a b"] == 10
    assert found["entry_SYSCALL_64 a"] == 30


def test_exception_within_an_interrupt(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        *interrupt(TASK - 0x200, TASK - 0x280),
        block("asm_exc_y", "call", TASK - 0x300),
        block("b", "ret", TASK - 0x300),
        block("asm_exc_y+50", "iret"),
        block("handler+50"),
        *returned(TASK - 0x280),
        block("a+60"),
    )
    assert found["asm_exc_y"] == 20
    assert found["asm_exc_y b"] == 10
    assert found["asm_sysvec_x handler"] == 30
    assert found["entry_SYSCALL_64 a"] == 20


def test_interrupt_from_user_mode_moves_to_the_tasks_stack(drive: Driven) -> None:
    # Twice: what the entry stack and the task's hold of the first time is no longer true.
    once = (block("user"), *interrupt(ENTRY - 0x40, TASK - 0x100), *returned(TASK - 0x100))
    found = drive(*once, *once)
    assert found == {
        "user": 20,
        "asm_sysvec_x": 80,
        "asm_sysvec_x error_entry": 20,
        "asm_sysvec_x handler": 40,
    }


def test_interrupt_at_once_after_sysret(drive: Driven) -> None:
    found = drive(
        *SYSCALL,
        block("a+8", "ret", TASK - 0x100),
        block("entry_SYSCALL_64+50", "sysret"),
        *interrupt(ENTRY - 0x40, TASK - 0x100),
        block("handler+50", "call", TASK - 0x140),
        block("b"),
    )
    assert found["asm_sysvec_x handler"] == 20
    assert found["asm_sysvec_x handler b"] == 10


def test_irq_stack_goes_on_from_the_tasks(drive: Driven) -> None:
    on_irq_stack = (
        block("handler+50", "call", IRQ - 0x10),
        block("c", "call", IRQ - 0x40),
        block("d", "ret", IRQ - 0x40),
        block("c+50", "ret", IRQ - 0x10),
    )
    found = drive(
        *SYSCALL,
        *interrupt(TASK - 0x200, TASK - 0x280),
        *on_irq_stack,
        *on_irq_stack,
        *returned(TASK - 0x280),
        block("a+60"),
    )
    assert found["asm_sysvec_x handler"] == 40
    assert found["asm_sysvec_x handler c"] == 40
    assert found["asm_sysvec_x handler c d"] == 20
    assert found["entry_SYSCALL_64 a"] == 20


def switch(before: int, after: int) -> tuple[str, ...]:
    """Return a switch from a task to another, whose return addresses lie there."""
    return (
        block("schedule", "call", before),
        block("__switch_to_asm"),
        block("__switch_to", "ret", after),
    )


def test_context_switch(drive: Driven) -> None:
    found = drive(
        # One task sleeps in a system call, and a new one begins.
        *SYSCALL,
        block("a+8", "call", TASK - 0x140),
        *switch(TASK - 0x180, TASK2 - 0x80),
        block("ret_from_fork_asm", "call", TASK2 - 0x80),
        block("thread", "call", TASK2 - 0xC0),
        # And back, on another vCPU.
        block("a", vcpu=1),
        *(line.replace("0 ", "1 ", 1) for line in switch(TASK2 - 0x100, TASK - 0x180)),
        block("schedule+50", "ret", TASK - 0x140, vcpu=1),
        block("a+60", vcpu=1),
    )
    assert found["entry_SYSCALL_64 a schedule"] == 20
    assert found["entry_SYSCALL_64 a"] == 30
    assert found["ret_from_fork_asm"] == 10
    assert found["ret_from_fork_asm thread"] == 10


def test_iret_that_only_serialises(drive: Driven) -> None:
    found = drive(*SYSCALL, block("a+8", "iret"), block("a+60"))
    assert found["entry_SYSCALL_64 a"] == 30


def test_modules_become_known_while_the_guest_runs(drive: Driven) -> None:
    call = (block("a+8", "call", TASK - 0x140), block("module", "ret", TASK - 0x140))
    assert drive(*SYSCALL, *call)["entry_SYSCALL_64 a [unknown]"] == 10
    site = Site("mp_read", "megapipe/")
    megapipe = [Function(MODULE, site), Function(MODULE + 0x1000, None)]
    drive.probe.set_modules(megapipe)
    found = drive(*call)
    assert found["entry_SYSCALL_64 a mp_read"] == 10
    # Another one, at the place of the first.
    limit = [Function(MODULE, Site("mp_limit", "mp_limit/")), Function(MODULE + 0x100, None)]
    drive.probe.set_modules([*limit, Function(MODULE + 0x2000, site)])
    found = drive(*call)
    assert found["entry_SYSCALL_64 a mp_read"] == 10
    assert found["entry_SYSCALL_64 a mp_limit"] == 10
    assert found["entry_SYSCALL_64 a [unknown]"] == 10
    too_many = [Function(MODULE + i, site) for i in range(stacks.LATE_ROOM + 1)]
    with pytest.raises(ProbeError, match="there is room for"):
        drive.probe.set_modules(too_many)


def test_what_does_not_fit_is_counted_as_lost(drive: Driven) -> None:
    # Two functions call each other, each path a new one, deeper than the table has nodes for.
    calls = [
        block(name, "call", TASK - 0x100 - 8 * depth)
        for depth, name in enumerate(itertools.islice(itertools.cycle("ab"), 300), 1)
    ]
    found = drive(*SYSCALL, *calls)
    reading = drive.probe.read()
    assert reading.lost_frames == 300 + 2 - 256
    assert reading.total == sum(found.values()) == 30 + 3000

    many: list[str] = []
    for five in itertools.product("abcd", repeat=5):
        many += SYSCALL
        many += [block(name, "call", TASK - 0x140 - 8 * i) for i, name in enumerate(five)]
    found = drive(*many)
    assert found["[lost]"] > 0
    assert drive.probe.read().total == 30 + 3000 + 4**5 * 80


def test_difference(drive: Driven) -> None:
    before = drive.probe
    first = (drive(*SYSCALL), before.read())[1]
    second = (drive(*SYSCALL, block("a+8", "call", TASK - 0x140), block("b")), before.read())[1]
    assert readable(second - first) == {
        "user": 10,
        "entry_SYSCALL_64": 10,
        "entry_SYSCALL_64 a": 20,
        "entry_SYSCALL_64 a b": 10,
    }
    with pytest.raises(ProbeError, match="different probes"):
        _ = first - second
    with pytest.raises(ValueError, match="read-only"):
        first.instructions[0] = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than its header"),
        (b"?" * 4096, "not a file of stacks"),
        (stack_file.new_file(1, [], 1, 64), "2 vCPUs .* room for 1"),
        (stack_file.new_file(2, [], 1, 64)[:-1], "does not fit"),
        (stack_file.new_file(65, [], 1, 64), "does not fit"),
        (stack_file.new_file(2, [], 1, 65), "does not fit"),
    ],
)
def test_plugin_refuses(harness: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "counters"
    path.write_bytes(content)
    run = subprocess.run(
        [harness, f"counters={path}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "API": "1"},
    )
    assert run.returncode == 1
    assert run.stderr.startswith("stacks: ")
    assert re.search(message, run.stderr)
    assert path.read_bytes() == content


def test_bad_files() -> None:
    with pytest.raises(ProbeError, match="no file of stacks"):
        stack_file.Header.read(b"")
    with pytest.raises(ProbeError, match=f"layout {stack_file.LAYOUT}"):
        stack_file.Header.read(b"?" * 4096)
    with pytest.raises(ProbeError, match="does not fit its size"):
        stack_file.Header.read(stack_file.new_file(1, [], 1, 64)[:-1])
    with pytest.raises(ProbeError, match="no QEMU has loaded"):
        stack_file.nodes(stack_file.new_file(1, [], 1, 64))


def test_life(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="for 0 vCPUs"):
        StackProbe(0, KERNEL)
    with StackProbe(1, KERNEL, parent=tmp_path) as probe:
        command = ["qemu-system-x86_64", "-M", "none", "-accel", "tcg", "-display", "none"]
        command += ["-nodefaults", "-S", "-monitor", "stdio", *probe.qemu_arguments()]
        subprocess.run(command, input=b"quit\n", capture_output=True, check=True, timeout=60)
        assert probe.read().total == 0
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ProbeError, match="its QEMU runs already"):
            probe.qemu_arguments()
    with pytest.raises(ProbeError, match="not open"):
        probe.read()


# -- Whose function is whose


def symbol(name: str, address: int, file: str = "", group: int = -1) -> sources.Symbol:
    return sources.Symbol(name, address, file, group, rank=100 * bool(file))


def test_functions_and_their_files() -> None:
    symbols = [
        symbol("helper", 0x10, "core.c", 0),
        symbol("own_a", 0x20, "core.c", 0),
        symbol("helper", 0x110, "core.c", 1),
        symbol("own_b.isra.0", 0x120, "core.c", 1),
        symbol("own_b.cold", 0x900, "core.c", 1),
        symbol("error_entry", 0x200, "entry.o", 2),
        symbol("global_a", 0x30),
        symbol("made_by_macro", 0x18),
        symbol("__alias", 0x30),
        symbol("twice", 0x130),
    ]
    tags = {
        "helper": {"a/core.c", "b/core.c"},
        "own_a": {"a/core.c"},
        "own_b": {"b/core.c"},
        "error_entry": {"arch/entry.S"},
        "global_a": {"a/core.c", "not/linked.c"},
        "twice": {"a/core.c", "b/core.c"},
    }
    found = {one.address: one.site for one in sources.place(symbols, tags, [0x1000])}
    assert found == {
        0x10: Site("helper", "a/core.c"),
        0x18: Site("made_by_macro", "a/core.c"),
        0x20: Site("own_a", "a/core.c"),
        0x30: Site("__alias", "a/core.c"),
        0x110: Site("helper", "b/core.c"),
        0x120: Site("own_b", "b/core.c"),
        0x130: Site("twice", "b/core.c"),
        0x200: Site("error_entry", "arch/entry.S"),
        0x900: Site("own_b", "b/core.c"),
        0x1000: None,
    }


def test_kinds() -> None:
    kinds = stack_file.Kind
    assert kind_of("asm_sysvec_apic_timer_interrupt") is kinds.ENTRY
    assert kind_of("__x86_indirect_thunk_array") is kinds.TRANSPARENT
    assert kind_of("ret_from_fork_asm") is kinds.TASK
    assert kind_of("tcp_v4_rcv") is kinds.PLAIN


def test_the_kernels_functions(kernel: Kernel) -> None:
    sites = {one.site for one in sources.of_kernel(kernel) if one.site}
    assert {
        Site("tcp_v4_rcv", "net/ipv4/tcp_ipv4.c"),
        Site("do_epoll_wait", "fs/eventpoll.c"),
        Site("__x64_sys_epoll_wait", "fs/eventpoll.c"),
        Site("entry_SYSCALL_64", "arch/x86/entry/entry_64.S"),
        Site("common_interrupt", "arch/x86/kernel/irq.c"),
        Site("virtnet_poll", "drivers/net/virtio_net.c"),
        Site("__schedule", "kernel/sched/core.c"),
        Site("_raw_spin_lock", "kernel/locking/spinlock.c"),
        Site("siphash_3u32", "lib/siphash.c"),
    } <= sites
    # What no file is found for would be nobody's.
    assert all(site.file for site in sites)


def test_functions_are_plain_data() -> None:
    assert dataclasses.asdict(Function(1, None)) == {"address": 1, "site": None}
