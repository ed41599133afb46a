"""The machine: what can be known without one, and then a real one, booted."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from elftools.elf.elffile import ELFFile

from grader import limits, machine
from grader.console import Kind
from grader.machine import (
    CommandResult,
    Hung,
    Lost,
    Machine,
    MachineConfig,
    NotBooted,
    Panicked,
    Placement,
    TimedOut,
    parse_placement,
    share_cpus,
)
from grader.tests.test_network import ROOT, as_ordinary_user, gone, wait_gone
from images.build import Image

Boot = Callable[..., Machine]


# ---- without a machine -------------------------------------------------------------------------

INTERRUPTS = """\
           CPU0       CPU1
 25:          0         96  PCI-MSIX-0000:00:01.0   1-edge      virtio0-virtqueues
 27:          0          0  PCI-MSIX-0000:00:02.0   1-edge      virtio1-input.0
 28:          0          0  PCI-MSIX-0000:00:02.0   2-edge      virtio1-output.0
 29:          0          0  PCI-MSIX-0000:00:02.0   3-edge      virtio1-input.1
 30:          0          0  PCI-MSIX-0000:00:02.0   4-edge      virtio1-output.1
25/smp_affinity_list:0-1
27/smp_affinity_list:0
28/smp_affinity_list:0
29/smp_affinity_list:1
30/smp_affinity_list:0-1
tx-0/xps_cpus:1
tx-1/xps_cpus:00000000,00000002
"""


def test_a_placement_is_read_and_mended() -> None:
    found = parse_placement(INTERRUPTS)
    assert found.interrupts == {
        0: [(27, frozenset({0})), (28, frozenset({0}))],
        1: [(29, frozenset({1})), (30, frozenset({0, 1}))],
    }
    assert found.senders == {0: frozenset({0}), 1: frozenset({1})}
    wanted = share_cpus(2, 2)
    assert not found.fits(wanted)
    assert "echo 1 > /proc/irq/30/smp_affinity_list" in found.command(wanted).splitlines()
    mended = INTERRUPTS.replace("30/smp_affinity_list:0-1", "30/smp_affinity_list:1")
    assert parse_placement(mended).fits(wanted)
    assert not Placement({}, {}).fits(wanted)


def test_masks_beyond_32_cpus() -> None:
    command = Placement({}, {}).command([frozenset({33})])
    assert command == "echo 2,00000000 > /sys/class/net/eth0/queues/tx-0/xps_cpus"


@pytest.mark.parametrize(
    ("cpus", "queues", "sizes"), [(4, 4, [1, 1, 1, 1]), (4, 2, [2, 2]), (8, 3, [3, 3, 2])]
)
def test_cpus_are_shared_out_among_queues(cpus: int, queues: int, sizes: list[int]) -> None:
    shares = share_cpus(cpus, queues)
    assert [len(share) for share in shares] == sizes
    assert sorted(cpu for share in shares for cpu in share) == list(range(cpus))


def test_impossible_configurations_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for vcpus, queues in ((0, None), (65, None), (2, 3), (4, 0)):
        with pytest.raises(ValueError, match="CPUs"):
            Machine(MachineConfig(file, file, vcpus=vcpus, queues=queues))
    with pytest.raises(ValueError, match="TCG"):
        Machine(MachineConfig(file, file, exact=True, accelerator="kvm"))


def test_a_missing_kernel_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(NotBooted, match="no-such-kernel"),
        Machine(MachineConfig(tmp_path / "no-such-kernel", tmp_path)),
    ):
        pass


# ---- one machine for many questions ------------------------------------------------------------


@pytest.fixture(scope="module")
def boot(vmlinux: Path, agent_image: Image) -> Boot:
    def make(transcript: Path | None = None, **options: object) -> Machine:
        options.setdefault("initramfs", agent_image.initramfs)
        return Machine(MachineConfig(kernel=vmlinux, **options), transcript)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def guest(boot: Boot) -> Iterator[Machine]:
    with boot() as opened:
        yield opened


def test_the_emulator_can_do_nothing_else(guest: Machine) -> None:
    processes = psutil.Process(guest.console.pid).children(recursive=True)
    (emulator,) = (p for p in processes if "qemu" in p.name() and not p.children())
    place = Path(f"/proc/{emulator.pid}")
    status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    if os.geteuid() != 0:
        assert status["Uid"].split() == [str(os.geteuid())] * 4
    seen = {path.name for path in (place / "root").iterdir()}
    assert "usr" in seen and not seen & {"proc", "sys", "run", "var", "boot"}
    assert not (place / "root" / "etc" / "passwd").exists()
    mounts = [line.split() for line in (place / "mountinfo").read_text().splitlines()]
    writable = {fields[4] for fields in mounts if "rw" in fields[5].split(",")}
    # Devices are not files: what may be done with them is another matter.
    files = {path for path in writable if not path.startswith("/dev/")}
    assert files == {str(guest.sandbox.folder_inside)}


def test_memory_is_read_from_outside(guest: Machine) -> None:
    # The kernel's text begins there, and is what the file says.
    with guest.config.kernel.open("rb") as file:
        (segment, *_) = ELFFile(file).iter_segments("PT_LOAD")
        begin = segment.data()[:64]
    assert guest.memory(0x1000000, 64) == begin
    assert guest.run("true").status == 0
    assert list(guest.sandbox.folder.iterdir()) == []


def test_status_output_and_user(guest: Machine) -> None:
    assert guest.run("echo out; echo err >&2; exit 3") == CommandResult(3, b"out\nerr\n", False)
    assert guest.run("kill -9 $$").status == -9
    done = guest.run("id -u; touch /x || ulimit -n", uid=1000)
    assert done.text.splitlines()[0] == "1000" and done.text.splitlines()[-1] == "1048576"


def test_64_kib_of_binary_output(guest: Machine) -> None:
    guest.run("head -c 65536 /dev/urandom > /tmp/bytes")
    content = guest.run("cat /tmp/bytes").output
    assert len(content) == 65536
    said = guest.run("sha256sum /tmp/bytes").text.split()[0]
    assert said == hashlib.sha256(content).hexdigest()


def test_commands_run_in_a_control_group_of_their_own(guest: Machine) -> None:
    first, second = (guest.run("cat /proc/self/cgroup").text.strip() for _ in range(2))
    assert first.startswith("0::/lab/") and first != second
    controllers = guest.run("cat /sys/fs/cgroup/lab/cgroup.subtree_control").text.split()
    assert {"memory", "pids", "cpu"} <= set(controllers)


def test_a_command_that_takes_too_long_is_ended_and_the_guest_goes_on(guest: Machine) -> None:
    with pytest.raises(TimedOut) as caught:
        guest.run("echo begun; setsid sleep 1000 & sleep 1000", timeout=0.5)
    assert caught.value.output == b"begun\n"
    assert limits.ENVIRONMENT_VARIABLE in caught.value.todo
    assert "sleep" not in guest.run("ps | grep -v grep | grep 'sleep 1000'").text


def test_a_flood_of_output_is_cut_off(guest: Machine) -> None:
    done = guest.run("head -c 3000000 /dev/zero; exit 4", cap=5000)
    assert done == CommandResult(4, bytes(5000), True)


def test_the_clock_is_the_time_stamp_counter(guest: Machine) -> None:
    source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert guest.run(f"cat {source}").text.strip().startswith("tsc")


def test_the_network_and_its_settings(guest: Machine) -> None:
    with guest.host(["busybox", "ping", "-c", "2", "-w", "20", guest.address]) as ping:
        assert guest.wait(ping) == 0
    assert "qdisc mq" in guest.run("ip link show eth0").text
    names = "core/default_qdisc core/somaxconn ipv4/tcp_max_syn_backlog"
    assert guest.run(f"cd /proc/sys/net; cat {names}").text.split() == [
        "fq_codel",
        "16384",
        "16384",
    ]


CONNECT = """
import socket, sys
for number in range(48):
    with socket.create_connection((sys.argv[1], 7), timeout=60) as connection:
        word = b"%d" % number
        connection.sendall(word)
        assert connection.recv(100) == word
"""


def test_interrupts_arrive_on_the_queues_own_cpu(guest: Machine) -> None:
    guest.run("setsid nc -ll -p 7 -e cat < /dev/null > /dev/null 2>&1 &")
    guest.run("until grep -q ':0007 ' /proc/net/tcp /proc/net/tcp6; do usleep 10000; done")

    def connect() -> None:
        with guest.host([sys.executable, "-c", CONNECT, guest.address]) as client:
            assert guest.wait(client, timeout=60) == 0

    def counts() -> dict[str, list[int]]:
        rows = [line.split() for line in guest.run("cat /proc/interrupts").text.splitlines()]
        return {row[-1]: [int(n) for n in row[1:5]] for row in rows if "virtio1-in" in row[-1]}

    # The first interrupt of each queue still comes to where it was at boot, and moves then.
    connect()
    before = counts()
    connect()
    after = counts()
    moved = {
        name: [a - b for a, b in zip(after[name], before[name], strict=True)] for name in after
    }
    assert len(moved) == 4
    for name, numbers in moved.items():
        queue = int(name.rpartition(".")[2])
        elsewhere = sum(numbers) - numbers[queue]
        assert numbers[queue] > elsewhere, moved


def test_what_is_needed_to_repeat_a_boot(guest: Machine) -> None:
    said = guest.environment()
    assert said["qemu"].startswith("QEMU emulator version")
    assert said["qemu_command"][0] == machine.QEMU and "-seed" in said["qemu_command"]
    assert said["vcpus"] == said["queues"] == 4 and said["boot_seconds"] > 0


def test_a_load_that_does_not_end_is_hung_and_shows_a_trace(boot: Boot) -> None:
    with boot(vcpus=1) as guest, guest.host(["sleep", "1000"]) as load:
        with pytest.raises(Hung, match="sleep 1000") as caught:
            guest.wait(load, timeout=0.2)
        assert load.returncode == -signal.SIGKILL
        assert "NMI" in caught.value.trace and "Call Trace" in caught.value.trace


# ---- ends ---------------------------------------------------------------------------------------


def qemu_of(pid: int) -> list[int]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        # What sets up the sandbox comes and goes.
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith("qemu"):
                found.append(child.pid)
    return found


def test_close_leaves_nothing(boot: Boot) -> None:
    here = os.getpid()
    before = set(qemu_of(here))
    links = subprocess.check_output(["ip", "link"])
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with boot(vcpus=2, queues=1) as guest:
        (emulator,) = set(qemu_of(here)) - before
        first = guest.sandbox.pid
        assert guest.run("true").status == 0
    assert gone(emulator) and gone(first)
    assert subprocess.check_output(["ip", "link"]) == links
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_panic_is_recognised_while_a_command_runs(boot: Boot, tmp_path: Path) -> None:
    transcript = tmp_path / "console"
    with boot(transcript, vcpus=2) as guest:
        with pytest.raises(Panicked, match="sysrq triggered crash") as caught:
            guest.run("echo c > /proc/sysrq-trigger")
        assert "sysrq_handle_crash" in caught.value.trace
        assert [r.kind for r in guest.console.transcript.reports()] == [Kind.PANIC]
        with pytest.raises(Panicked):
            guest.watch()
        with pytest.raises(Panicked):
            guest.run("true")
    assert "sysrq_handle_crash" in transcript.read_text()


def test_a_panic_is_recognised_while_a_load_runs(boot: Boot) -> None:
    with boot(vcpus=1) as guest, guest.host(["sleep", "1000"]) as load:
        guest.run("(sleep 0.3; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &")
        with pytest.raises(Panicked):
            guest.wait(load, timeout=60)


def test_an_emulator_that_ends_is_lost(boot: Boot) -> None:
    before = set(qemu_of(os.getpid()))
    with boot(vcpus=1) as guest:
        (emulator,) = set(qemu_of(os.getpid())) - before
        os.kill(emulator, signal.SIGKILL)
        with pytest.raises(Lost, match="SIGKILL"):
            guest.run("true")


def test_a_stopped_emulator_is_hung(boot: Boot) -> None:
    before = set(qemu_of(os.getpid()))
    with boot(vcpus=1) as guest:
        (emulator,) = set(qemu_of(os.getpid())) - before
        os.kill(emulator, signal.SIGSTOP)
        with pytest.raises(Hung, match="does not end"):
            guest.run("true", timeout=0.2)
    assert wait_gone(emulator)


def test_an_initramfs_that_is_none_is_a_panic_with_its_reason(boot: Boot, tmp_path: Path) -> None:
    nothing = tmp_path / "initramfs"
    nothing.write_bytes(b"no archive")
    with pytest.raises((Panicked, NotBooted)) as caught, boot(initramfs=nothing, vcpus=1):
        pass
    assert "root" in caught.value.report()


def test_a_refusal_of_the_emulator_is_shown(boot: Boot) -> None:
    with pytest.raises(NotBooted) as caught, boot(extra_qemu=("-no-such-option",)):
        pass
    assert "no-such-option" in caught.value.report()


MID_BOOT = """
import signal, sys
# A shell that runs the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from grader.machine import Machine, MachineConfig
with Machine(MachineConfig(kernel=Path(sys.argv[1]), initramfs=Path(sys.argv[2]))) as machine:
    machine.run("sleep 1000", timeout=1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_boot_leaves_no_emulator(
    number: int, vmlinux: Path, agent_image: Image
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", MID_BOOT, vmlinux, agent_image.initramfs],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + limits.scaled(20)
    while not (emulators := qemu_of(holder.pid)):
        assert time.monotonic() < limit
        time.sleep(0.01)
    pids = [child.pid for child in psutil.Process(holder.pid).children(recursive=True)]
    holder.send_signal(number)
    holder.wait()
    assert emulators and wait_gone(*pids)


# ---- other ways to boot ------------------------------------------------------------------------


def test_fewer_queues_than_cpus(boot: Boot) -> None:
    with boot(vcpus=4, queues=2) as guest:
        assert "input.1" in guest.run("cat /proc/interrupts").text


def test_a_shell_and_a_debugger(boot: Boot) -> None:
    with boot(vcpus=1, shell=True, gdb=True) as guest:
        assert guest.console.expect_ready("# ")
        guest.console.send("echo $((6 * 7))\n")
        assert guest.console.expect_ready(r"\n42")
        with socket.socket(socket.AF_UNIX) as debugger:
            debugger.settimeout(limits.scaled(10))
            debugger.connect(str(guest.gdb_socket))
            debugger.sendall(b"+$?#3f")
            assert b"$T" in debugger.recv(100)


def test_exact_runs_repeat(boot: Boot) -> None:
    def story() -> str:
        # The kernel's log carries the virtual time of each line, to the microsecond.
        with boot(vcpus=2, exact=True, command="sh -c sha256sum</bin/busybox;dmesg") as guest:
            return guest.run("cat /run/boot.status /run/boot.output").text

    first, second = story().splitlines(), story().splitlines()
    assert first[0] == "0" and len(first) > 100
    assert first == second


def test_kvm_is_believed_only_when_it_has_booted(vmlinux: Path) -> None:
    works, reason = machine.kvm_works(vmlinux)
    assert works or reason


ORDINARY_BOOT = """
from grader.machine import Machine, MachineConfig
config = MachineConfig(kernel=Path(sys.argv[2]), initramfs=Path(sys.argv[3]), vcpus=2)
with Machine(config) as machine:
    print(machine.run("id -u").text, os.getuid())
"""


def test_an_ordinary_user_can_boot(vmlinux: Path, agent_image: Image) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        for name, file in (("vmlinux", vmlinux), ("initramfs", agent_image.initramfs)):
            shutil.copy(file, folder / name)
        files = (str(folder / "vmlinux"), str(folder / "initramfs"))
        done = as_ordinary_user(ORDINARY_BOOT, *files, mode="0666")
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "54321"]
