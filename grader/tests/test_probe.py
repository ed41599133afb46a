"""The probe: its file, its symbols, its plugin in the real QEMU, and its counts in a real guest."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pexpect
import pytest

from grader import probe as probe_package
from grader.probe import (
    EVENTS,
    REPORTERS,
    STANDARD,
    Counted,
    Counters,
    PluginUnavailable,
    Probe,
    ProbeConfig,
    ProbeError,
    Symbols,
    UnknownSymbol,
    counters,
    loading,
    parse,
    plugin,
    select,
)
from kernel.build import Kernel

PROBE_C = Path(probe_package.__file__).with_name("probe.c")
DATA = Path(__file__).with_name("probe")

# Lines of a System.map of 6.12, with their clones as GCC 12 made them.
SYSTEM_MAP = """\
0000000000000000 D __per_cpu_start
0000000000024a40 A cpu_hw_events
ffffffff81000000 T _text
ffffffff81002750 T x64_sys_call
ffffffff81083a70 T panic
ffffffff810c8a80 t __schedule_bug
ffffffff81100000 T with_part
ffffffff81100080 t with_part.part.0
ffffffff81100100 t only_part.part.0
ffffffff81100200 t renamed.isra.0
ffffffff81100300 t renamed.constprop.0.isra.0
ffffffff81100380 t renamed.isra.0.cold
ffffffff81100400 T specialised
ffffffff81100480 t specialised.constprop.0
ffffffff81100500 t homonym
ffffffff81100600 t homonym
ffffffff81100700 t far.cold
ffffffff81100800 W __ubsan_handle_out_of_bounds
ffffffff81100900 T __ubsan_handle_shift_out_of_bounds
ffffffff81100980 t __ubsan_handle_shift_out_of_bounds.cold
ffffffff8143ac80 T __x64_sys_epoll_wait
ffffffff82000000 D some_data
"""

SYMBOLS = {
    "panic": (0xFFFFFFFF81083A70,),
    "with_part": (0xFFFFFFFF81100000,),
    "only_part": (0xFFFFFFFF81100100,),
    "renamed": (0xFFFFFFFF81100200, 0xFFFFFFFF81100300),
    "specialised": (0xFFFFFFFF81100400, 0xFFFFFFFF81100480),
    "homonym": (0xFFFFFFFF81100500, 0xFFFFFFFF81100600),
}


@pytest.fixture
def symbols(tmp_path: Path) -> Symbols:
    path = tmp_path / "System.map"
    path.write_text(SYSTEM_MAP)
    return Symbols.from_system_map(path)


# -- Symbols


@pytest.mark.parametrize("name", SYMBOLS)
def test_entries(symbols: Symbols, name: str) -> None:
    assert symbols.entries(name) == SYMBOLS[name]


def test_unknown_names_its_neighbours(symbols: Symbols) -> None:
    with pytest.raises(UnknownSymbol, match=r"no function epoll_wait .*near it: __x64_sys_epoll_w"):
        symbols.entries("epoll_wait")
    with pytest.raises(UnknownSymbol, match=r"near it: panic"):
        symbols.entries("pamic")


@pytest.mark.parametrize("name", ["far", "some_data", "cpu_hw_events"])
def test_not_a_function_entry(symbols: Symbols, name: str) -> None:
    assert not symbols.has(name)
    with pytest.raises(UnknownSymbol):
        symbols.entries(name)


def test_patterns(symbols: Symbols) -> None:
    assert symbols.resolve(["__ubsan_handle_*", "panic"]) == (
        0xFFFFFFFF81083A70,
        0xFFFFFFFF81100800,
        0xFFFFFFFF81100900,
    )
    assert not symbols.has("kasan_*")
    with pytest.raises(UnknownSymbol, match="matches kasan_"):
        symbols.resolve(["kasan_*"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no kernel function in it"),
        ("0000000000000000 T panic\n", "no kernel function in it"),
        ("what is this\n", ":1: not a line of a System.map"),
        ("ffffffff81000000\n", ":1: not a line of a System.map"),
    ],
)
def test_bad_system_map(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "System.map"
    path.write_text(text)
    with pytest.raises(ProbeError, match=message):
        Symbols.from_system_map(path)


def test_bad_vmlinux(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="No such file"):
        Symbols.of_kernel(tmp_path / "vmlinux")
    (tmp_path / "vmlinux").write_bytes(b"not ELF at all, but long enough" * 9)
    with pytest.raises(ProbeError, match="not an ELF file"):
        Symbols.of_kernel(tmp_path / "vmlinux")


def test_optional_counters(symbols: Symbols) -> None:
    found = Counted("ubsan", ("__ubsan_handle_*", "__ubsan_gone"), "", optional=True)
    gone = Counted("kasan", ("kasan_report",), "", optional=True)
    assert select([found, gone], symbols) == {"ubsan": ("__ubsan_handle_*",)}
    with pytest.raises(UnknownSymbol):
        select([dataclasses.replace(gone, optional=False)], symbols)


def test_standard_names_are_unique() -> None:
    assert len({counted.name for counted in STANDARD}) == len(STANDARD)


# -- Configuration


@pytest.mark.parametrize(
    ("vcpus", "functions", "message"),
    [
        (0, {}, "for 0 vCPUs"),
        (65, {}, "for 65 vCPUs"),
        (1, {"two words": ["panic"]}, "cannot name a counter"),
        (1, {"panic": "panic"}, "counts nothing"),
        (1, {"panic": []}, "counts nothing"),
        (1, {f"c{i}": ["panic"] for i in range(513)}, "513 counters"),
    ],
)
def test_bad_config(vcpus: int, functions: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        ProbeConfig(vcpus, functions)


# -- The counter file, written by the plugin's own code


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    source = DATA / "harness.c"
    output = folder / "harness"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-DPROBE_API_VERSION=1"]
    subprocess.run(["cc", *flags, f"-I{PROBE_C.parent}", "-o", output, source], check=True)
    return output


def counted_by(
    harness: Path, folder: Path, content: bytes, functions: str, blocks: str, *more: str
) -> tuple[str, bytes]:
    """Return what the plugin's code complains of, and the counter file it leaves."""
    (folder / "counters").write_bytes(content)
    (folder / "functions").write_text(functions)
    run = subprocess.run(
        [harness, f"counters={folder / 'counters'}", f"functions={folder / 'functions'}", *more],
        input=blocks,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode == 0) == (run.stderr == "")
    return run.stderr, (folder / "counters").read_bytes()


def test_counts_round_trip(harness: Path, tmp_path: Path) -> None:
    functions = (
        "ffffffff81000040 a\n"
        "ffffffff81000048 b\n"
        "ffffffff81000100 a\n"  # a second entry of a
        "ffffffff81000048 c\n"  # b's address once more, under another name
        "ffffffff81000051 inside\n"  # in the middle of an instruction
        "ffffffff81000201 never\n"
    )
    blocks = (
        "0 401000 5 100\n"  # user
        "0 ffffffff81000040 1 7\n"  # entry of a, alone
        "1 ffffffff81000030 10 3\n"  # a block running through a, b and c
        "1 ffffffff8100004c 1 50\n"  # past b's entry, which has been jumped over
        "1 ffffffff81000054 1 50\n"  # farther inside it
        "1 ffffffff81000100 2 11\n"  # a's second entry
        "0 ffff888000000040 4 2\n"  # the kernel half, elsewhere
    )
    said, left = counted_by(harness, tmp_path, counters.new_file(2, 5), functions, blocks)
    assert said == ""
    names = ("a", "b", "c", "inside", "never")
    found = parse(left, names)
    assert found.user.tolist() == [500, 0]
    assert found.kernel.tolist() == [7 + 8, 30 + 50 + 50 + 22]
    assert {name: calls.tolist() for name, calls in found.functions.items()} == {
        "a": [7, 3 + 11],
        "b": [0, 3 + 50],
        "c": [0, 3 + 50],
        "inside": [0, 50],
        "never": [0, 0],
    }
    assert found.never_executed(["a", "never", "c"]) == ("never",)
    header = counters.Header.read(left)
    assert (header.state, header.api_version, header.guest_vcpus) == (counters.STATE_ENDED, 1, 2)
    assert header.addresses == 6

    total = found.total
    assert (total.user, total.kernel, total.instructions) == (500, 167, 667)
    assert total.functions == {"a": 21, "b": 53, "c": 53, "inside": 50, "never": 0}
    delta = found - found
    assert delta.total.instructions == 0
    assert list(delta.functions) == list(names)
    with pytest.raises(ValueError, match="read-only"):
        found.user[0] = 1
    with pytest.raises(ProbeError, match="no counter d"):
        found.never_executed(["d"])


def test_what_the_clock_costs_is_counted_apart(harness: Path, tmp_path: Path) -> None:
    functions = "ffffffff81000100 clock_ticks\nffffffff81000200 interrupts_over\n"
    blocks = (
        "0 ffffffff81000000 10 1\n"
        "0 ffffffff81000100 1 1\n"  # the block that enters is counted before it
        "0 ffffffff81000300 30 2\n"
        "1 ffffffff81000300 30 1\n"  # another vCPU is not in the clock's interrupt
        "0 ffffffff81000200 2 1\n"
        "0 ffffffff81000000 10 1\n"
        "0 ffffffff81000200 2 1\n"  # the end of an interrupt that was not the clock's
    )
    _, left = counted_by(harness, tmp_path, counters.new_file(2, 2), functions, blocks)
    found = parse(left, ("clock_ticks", "interrupts_over"))
    assert found.clock.tolist() == [60 + 2, 0]
    assert found.kernel.tolist() == [10 + 1 + 60 + 2 + 10 + 2, 30]
    assert found.total.clock == 62
    assert found.total.functions == {"clock_ticks": 1, "interrupts_over": 2}


def test_functions_alone_can_be_counted(harness: Path, tmp_path: Path) -> None:
    functions, blocks = "ffffffff81000040 a\n", "0 ffffffff81000040 3 7\n0 401000 5 100\n"
    content = counters.new_file(2, 1)
    said, left = counted_by(harness, tmp_path, content, functions, blocks, "instructions=off")
    assert said == ""
    assert parse(left, ("a",)).total == counters.Total(0, 0, 0, {"a": 7})


def test_every_vcpu_has_its_own_block(harness: Path, tmp_path: Path) -> None:
    blocks = "".join(f"{vcpu} ffffffff81000000 1 {vcpu + 1}\n" for vcpu in range(64))
    functions = "".join(f"{0xFFFFFFFF81000000 + i:x} f{i}\n" for i in range(512))
    _, left = counted_by(harness, tmp_path, counters.new_file(64, 512), functions, blocks)
    found = parse(left, [f"f{i}" for i in range(512)])
    assert found.kernel.tolist() == list(range(1, 65))
    assert found.functions["f0"].tolist() == list(range(1, 65))
    assert found.total.functions["f511"] == 0


def header_with(**changes: int | bytes) -> bytes:
    names = ("magic", "layout", "vcpus", "functions", "block_bytes", "blocks_offset", "state")
    file = counters.new_file(2, 1)
    fields = list(counters.HEADER.unpack(file[: counters.HEADER.size]))
    for name, value in changes.items():
        fields[names.index(name)] = value
    return counters.HEADER.pack(*fields) + file[counters.HEADER.size :]


@pytest.mark.parametrize(
    ("content", "functions", "message"),
    [
        (b"", "ffffffff81000000 f\n", "shorter than its header"),
        (header_with(magic=b"????????"), "ffffffff81000000 f\n", "not a counter file"),
        (header_with(layout=1), "ffffffff81000000 f\n", "not a counter file"),
        (header_with(state=1), "ffffffff81000000 f\n", "already used"),
        (header_with(vcpus=65), "ffffffff81000000 f\n", "does not fit"),
        (header_with(vcpus=3), "ffffffff81000000 f\n", "does not fit"),
        (header_with(functions=15), "ffffffff81000000 f\n", "does not fit"),
        (header_with(block_bytes=0), "ffffffff81000000 f\n", "does not fit"),
        (header_with(blocks_offset=1 << 60), "ffffffff81000000 f\n", "does not fit"),
        (counters.new_file(1, 1), "ffffffff81000000 f\n", "2 vCPUs .* room for 1"),
        (counters.new_file(2, 2), "ffffffff81000000 f\n", "names 1 functions"),
        (counters.new_file(2, 1), "f\n", ":1: not .hex-address name"),
        (counters.new_file(2, 1), "ffffffff81000000 f g\n", ":1: not .hex-address name"),
        (counters.new_file(2, 1), "ffffffff81000000 " + "f" * 200, ":1: not .hex-address name"),
        (counters.new_file(2, 1), "ffffffff81000000 f\n" * 2, "f has the address .* twice"),
        (
            counters.new_file(2, 512),
            "".join(f"{i:x} f{i}\n" for i in range(513)),
            "more than 512 functions",
        ),
    ],
)
def test_plugin_refuses(
    harness: Path, tmp_path: Path, content: bytes, functions: str, message: str
) -> None:
    said, left = counted_by(harness, tmp_path, content, functions, "")
    assert said.startswith("probe: ")
    assert re.search(message, said), said
    assert left == content


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MPPROBE\n", "8 bytes are no counter file"),
        (header_with(magic=b"????????"), "not a counter file"),
        (header_with(state=1)[:-1], "does not fit its size"),
        (header_with(functions=15), "does not fit its size"),
        (counters.new_file(1, 1), "no QEMU has loaded"),
        (header_with(state=1, functions=2), "has 2 functions, not 1"),
    ],
)
def test_bad_counter_file(data: bytes, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        parse(data, ["f"])


def test_readings_of_different_probes() -> None:
    zero = np.zeros(1, np.int64)
    one = Counters(zero, zero, zero, {"a": zero})
    with pytest.raises(ProbeError, match="different probes"):
        _ = one - Counters(zero, zero, zero, {"b": zero})
    with pytest.raises(ProbeError, match="different probes"):
        _ = one - Counters(np.zeros(2, np.int64), zero, zero, {"a": zero})


# -- The plugin in the QEMU at hand


def test_plugin_loads_and_is_cached() -> None:
    first = plugin()
    assert first.is_file()
    written = first.stat().st_mtime_ns
    assert plugin() == first
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == ["probe.so"]


@pytest.mark.parametrize(
    ("version", "order"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", [1, 5, 4, 3, 2]),
        ("QEMU emulator version 8.2.2", [1, 5, 4, 3, 2]),
        ("QEMU emulator version 9.0.4", [2, 5, 4, 3, 1]),
        ("QEMU emulator version 9.2.0", [3, 5, 4, 2, 1]),
        ("QEMU emulator version 10.0.2", [4, 5, 3, 2, 1]),
        ("QEMU emulator version 10.2.0", [5, 4, 3, 2, 1]),
        ("QEMU of some other kind", [5, 4, 3, 2, 1]),
    ],
)
def test_interface_versions_to_try(version: str, order: list[int]) -> None:
    assert loading.candidates(version) == order


def test_wrong_interface_version_is_told(tmp_path: Path) -> None:
    loading.build(99, tmp_path / "probe.so")
    said = loading.try_loading("qemu-system-x86_64", tmp_path)
    assert said is not None
    assert "API version" in said
    assert "no version of the plugin interface" in loading.explain("QEMU", said)[0]


def test_no_plugin_support_is_told() -> None:
    run = subprocess.run(
        ["qemu-system-x86_64", "-pluginx"], capture_output=True, text=True, check=False
    )
    said = run.stderr.replace("-pluginx", "-plugin")
    problem, todo = loading.explain("QEMU 9", said)
    assert "was built without TCG plugins" in problem
    assert "--enable-plugins" in todo
    said = "qemu-system-x86_64: plugin interface not enabled in this build"
    assert loading.explain("QEMU 9", said)[0].endswith(f"without TCG plugins: {said}")
    assert loading.explain("QEMU 9", "odd")[0] == "QEMU 9 does not load the probe: odd"


def test_no_qemu_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginUnavailable, match="not found"):
        plugin(qemu=tmp_path / "qemu-system-x86_64")
    not_qemu = tmp_path / "false"
    not_qemu.write_text("#!/bin/sh\nexit 1\n")
    not_qemu.chmod(0o755)
    with pytest.raises(PluginUnavailable, match="--version fails"):
        plugin(qemu=not_qemu)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PluginUnavailable, match="not found"):
        plugin()
    with pytest.raises(PluginUnavailable, match="no C compiler"):
        loading.build(1, tmp_path / "probe.so")


# -- A probe's life


def run_without_guest(probe: Probe) -> None:
    command = ["qemu-system-x86_64", "-M", "none", "-accel", "tcg", "-display", "none"]
    command += ["-nodefaults", "-S", "-monitor", "stdio", *probe.qemu_arguments()]
    subprocess.run(command, input=b"quit\n", capture_output=True, check=True, timeout=60)


def test_life(symbols: Symbols, tmp_path: Path) -> None:
    parent = tmp_path / "a, strange  place"
    parent.mkdir()
    config = ProbeConfig(2, {"panic": ["panic"], "all": ["renamed", "homonym"]})
    with Probe(config, symbols, parent=parent) as probe:
        assert probe.addresses["all"] == SYMBOLS["renamed"] + SYMBOLS["homonym"]
        assert not probe.counting
        with pytest.raises(ProbeError, match="no QEMU has loaded"):
            probe.read()
        folder = next(parent.iterdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        run_without_guest(probe)
        assert probe.counting
        assert probe.ended
        assert list(parent.iterdir()) == []
        assert probe.read().total.functions == {"panic": 0, "all": 0}
        with pytest.raises(ProbeError, match="its QEMU runs already"):
            probe.qemu_arguments()
    with pytest.raises(ProbeError, match="not open"):
        probe.read()


def test_nothing_left_behind(symbols: Symbols, tmp_path: Path) -> None:
    config = ProbeConfig(1, {"panic": ["panic"]})
    with pytest.raises(KeyboardInterrupt), Probe(config, symbols, parent=tmp_path / "."):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["System.map"]
    with pytest.raises(UnknownSymbol):
        Probe(ProbeConfig(1, {"nix": ["nix"]}), symbols)


# -- A real guest

CALLS = 10_000
LOOPS = 1_000_000
# Per call: mov, syscall, dec, jnz; per loop: dec, jnz.
USER_INSTRUCTIONS = 4 * CALLS + 2 * LOOPS


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initramfs")
    init = folder / "init"
    flags = ["-O2", "-static", f"-DCALLS={CALLS}", f"-DLOOPS={LOOPS}", "-Wno-unused-result"]
    subprocess.run(["cc", *flags, "-o", init, DATA / "guest.c"], check=True)

    def member(name: str, mode: int, data: bytes) -> bytes:
        fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)

    archive = folder / "initramfs.cpio"
    archive.write_bytes(member("init", 0o100755, init.read_bytes()) + member("TRAILER!!!", 0, b""))
    return archive


class Guest:
    """A booted guest that waits at its console."""

    def __init__(self, console: pexpect.spawn[str], probe: Probe) -> None:
        self.console = console
        self.probe = probe

    def settled(self) -> Counters:
        """Return the counters once user mode rests."""
        before = self.probe.read()
        while True:
            time.sleep(0.1)
            now = self.probe.read()
            if (now - before).total.user == 0:
                return now
            before = now

    def work_on(self, cpu: int) -> Counters:
        """Return what the guest's work on this vCPU counts."""
        before = self.settled()
        self.console.send(f"{cpu}\n")
        self.console.expect_exact("ready", timeout=120)
        return self.settled() - before


def qemu_command(
    vmlinux: Path, initramfs: Path, probe: Probe, thread: str, argument: str = ""
) -> list[str]:
    # Not microvm: with the PIT as its only clock, it fails to calibrate on a busy host.
    command = ["qemu-system-x86_64", "-M", "q35", "-accel", f"tcg,thread={thread}"]
    command += ["-cpu", "Nehalem", "-smp", str(probe.config.vcpus), "-m", "256"]
    command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-serial", "stdio", "-kernel", str(vmlinux), "-initrd", str(initramfs)]
    line = f"console=ttyS0 nokaslr quiet panic=-1{argument}"
    return [*command, "-append", line, *probe.qemu_arguments()]


@contextmanager
def booted(
    vmlinux: Path, initramfs: Path, config: ProbeConfig, thread: str = "single"
) -> Iterator[Guest]:
    symbols = Symbols.of_kernel(vmlinux)
    with Probe(config, symbols) as probe:
        command = qemu_command(vmlinux, initramfs, probe, thread)
        console = pexpect.spawn(command[0], command[1:], encoding="utf-8", echo=False)
        try:
            console.expect_exact("ready", timeout=120)
            yield Guest(console, probe)
        finally:
            console.close(force=True)


# What the guest executes in user mode besides: the rest of init's loop.
AROUND = 500


def only_getppid(vcpus: int) -> ProbeConfig:
    return ProbeConfig(vcpus, {"getppid": ["__x64_sys_getppid"], "syscalls": ["do_syscall_64"]})


def test_exact_calls(vmlinux: Path, initramfs: Path) -> None:
    with booted(vmlinux, initramfs, only_getppid(1)) as guest:
        for _ in range(2):
            cost = guest.work_on(0).total
            assert cost.functions["getppid"] == CALLS
            # Besides: write, read, sched_setaffinity.
            assert cost.functions["syscalls"] == CALLS + 3
            assert 0 <= cost.user - USER_INSTRUCTIONS < AROUND
            assert cost.kernel > 50 * CALLS


def test_virtual_time_repeats_exactly(vmlinux: Path, initramfs: Path) -> None:
    readings = []
    for _ in range(2):
        with Probe(only_getppid(1), Symbols.of_kernel(vmlinux)) as probe:
            command = qemu_command(vmlinux, initramfs, probe, "single", " -- once")
            command += ["-icount", "shift=0,sleep=off", "-seed", "1"]
            command += ["-rtc", "base=2026-01-01,clock=vm"]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=180)
            assert probe.ended
            readings.append(probe.read().total)
    assert readings[0] == readings[1]
    assert readings[0].functions["getppid"] == CALLS


@pytest.mark.parametrize("thread", ["single", "multi"])
def test_right_vcpu(vmlinux: Path, initramfs: Path, thread: str) -> None:
    with booted(vmlinux, initramfs, only_getppid(4), thread) as guest:
        for cpu in (2, 0, 3):
            cost = guest.work_on(cpu)
            expected = [CALLS if cpu == vcpu else 0 for vcpu in range(4)]
            assert cost.functions["getppid"].tolist() == expected
            elsewhere = np.delete(cost.user, cpu).sum()
            assert 0 <= cost.user[cpu] + elsewhere - USER_INSTRUCTIONS < AROUND
            assert elsewhere < AROUND


def test_standard_set(vmlinux: Path, initramfs: Path) -> None:
    config = ProbeConfig.standard(2, Symbols.of_kernel(vmlinux))
    assert {one.name for one in EVENTS if not one.optional} <= set(config.functions)
    with booted(vmlinux, initramfs, config) as guest:
        boot = guest.settled()
        cost = guest.work_on(1)
    reporters = [one.name for one in REPORTERS if one.name in boot.functions]
    assert list(boot.never_executed(reporters)) == reporters
    started = ["syscalls", "file_alloc", "inode_alloc", "dentry_alloc", "wakeups", "schedules"]
    assert boot.never_executed([*started, "context_switches", "sock_inode_alloc"]) == ()
    assert cost.total.functions["syscalls"] == CALLS + 3
    assert cost.total.functions["read"] == cost.total.functions["write"] == 1


@pytest.mark.vm
@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
def test_no_counted_function_jumps_to_its_own_beginning(
    request: pytest.FixtureRequest, debug: bool
) -> None:
    """What probe.c takes for granted of the first bytes behind an entry."""
    kernel: Kernel = request.getfixturevalue("debug_kernel" if debug else "kernel")
    symbols = Symbols.of_kernel(kernel.vmlinux)
    # On the debug kernel, nothing but reports is counted.
    counted = ProbeConfig.of_reports if debug else ProbeConfig.standard
    functions = counted(1, symbols).functions.values()
    entries = sorted({entry for names in functions for entry in symbols.resolve(names)})
    assert len(entries) > (20 if debug else 50)
    for entry in entries:
        listed = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", f"--start-address={entry:#x}",
             f"--stop-address={entry + 4096:#x}", kernel.vmlinux],
            capture_output=True, text=True, check=True,
        ).stdout.partition(f"{entry:016x} <")[2].split("\n\n")[0]  # fmt: skip
        jumps = re.findall(r"^\s*([0-9a-f]+):\t(?:j\w+|loop\w*)\s+([0-9a-f]+)\b", listed, re.M)
        inside = range(entry + 1, entry + 10)
        # To there, or before it so early that what follows it lies there.
        assert not [jump for jump in jumps if int(jump[1], 16) in inside], listed[:300]
        assert not [jump for jump in jumps if int(jump[0], 16) < entry + 8], listed[:300]


def test_panic_is_counted(vmlinux: Path, initramfs: Path) -> None:
    symbols = Symbols.of_kernel(vmlinux)
    with Probe(ProbeConfig.standard(1, symbols), symbols) as probe:
        command = qemu_command(vmlinux, initramfs, probe, "single", " -- exit")
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120
        )
        assert b"Attempted to kill init" in run.stdout
        reports = probe.read().total.functions
    assert reports["panic"] == 1
    assert reports["dump_stack"] >= 1
    assert reports["oops"] == reports["bug"] == reports["warn"] == 0
