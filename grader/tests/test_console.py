"""The recogniser, against what QEMU printed, and the console, against small programs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from grader.console import Console, Kind, Transcript, decode, essence, find_reports

TRANSCRIPTS = Path(__file__).parent / "transcripts"


def recorded(name: str) -> str:
    return (TRANSCRIPTS / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("panic", [Kind.PANIC]),
        ("oops", [Kind.OOPS, Kind.PANIC]),
        ("bug", [Kind.BUG, Kind.PANIC]),
        ("warning", [Kind.WARNING]),
        ("sleep-in-atomic", [Kind.ATOMIC, Kind.ATOMIC]),
        ("lockup", [Kind.LOCKUP, Kind.PANIC]),
        ("rcu-stall", [Kind.STALL, Kind.PANIC]),
        ("hung-sleeping", [Kind.PANIC]),
        ("hung-spinning", [Kind.PANIC]),
    ],
)
def test_recorded_transcripts(name: str, kinds: list[Kind]) -> None:
    assert [report.kind for report in find_reports(recorded(name))] == kinds


def test_a_boot_without_incident_holds_no_report() -> None:
    text = recorded("oops").split("BUG:")[0]
    assert len(text.splitlines()) > 2
    assert find_reports(text) == []


def test_a_report_holds_its_trace_without_times() -> None:
    oops, panic = find_reports(recorded("oops"))
    assert oops.first_line == "BUG: kernel NULL pointer dereference, address: 0000000000000008"
    assert "RIP: 0010:deref.constprop.0+0x5/0x20 [trymod]" in oops.trace
    assert oops.trace.splitlines()[-1] == "---[ end trace 0000000000000000 ]---"
    assert panic.first_line == "Kernel panic - not syncing: Fatal exception"


def test_essence_leaves_out_registers_and_idle_cpus() -> None:
    (report,) = find_reports(recorded("hung-spinning"))
    short = essence(report.trace)
    assert "set+0xab" in short and "_raw_spin_lock" in short
    assert "RAX:" not in short and "Code:" not in short
    assert short.count("NMI backtrace for cpu") == 1
    assert report.trace.count("NMI backtrace for cpu") == 4


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("BUG: KASAN: slab-use-after-free in mp_drain+0x1a/0x90 [megapipe]", Kind.KASAN),
        ("UBSAN: array-index-out-of-bounds in kernel/megapipe/ring.c:12:3", Kind.UBSAN),
        ("WARNING: possible circular locking dependency detected", Kind.LOCKDEP),
        ("WARNING: possible recursive locking detected", Kind.LOCKDEP),
        ("WARNING: inconsistent lock state", Kind.LOCKDEP),
        ("WARNING: suspicious RCU usage", Kind.LOCKDEP),
        ("WARNING: bad unlock balance detected!", Kind.LOCKDEP),
        ("WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected", Kind.LOCKDEP),
        ("[ BUG: Invalid wait context ]", Kind.LOCKDEP),
        ("BUG: sleeping function called from invalid context at lib/x.c:1", Kind.ATOMIC),
        ("BUG: unable to handle page fault for address: ffffc90000000000", Kind.OOPS),
        ("Oops: general protection fault, probably for non-canonical address 0x6b", Kind.OOPS),
        ("kernel BUG at mm/slub.c:448!", Kind.BUG),
        ("INFO: task mp-server:77 blocked for more than 120 seconds.", Kind.HUNG_TASK),
        ("rcu: INFO: rcu_preempt self-detected stall on CPU", Kind.STALL),
        ("BUG kmalloc-64 (Tainted: G    B): Poison overwritten", Kind.SLAB),
        ("kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)", Kind.LEAK),
        ("Out of memory: Killed process 77 (mp-server) total-vm:1kB", Kind.OOM),
        ("refcount_t: underflow; use-after-free.", None),
        ("NMI watchdog: Perf NMI watchdog permanently disabled", None),
        ("rcu: Hierarchical SRCU implementation.", None),
        ("stack depot: allocated hash table", None),
    ],
)
def test_first_lines(line: str, kind: Kind | None) -> None:
    reports = find_reports(f"[    1.000000] before\n[    1.234567][   T77] {line}\n")
    assert [report.kind for report in reports] == ([kind] if kind else [])


def test_kasan_ends_at_its_rule_and_what_follows_is_its_own_report() -> None:
    rule = "=" * 66
    text = f"{rule}\nBUG: KASAN: x in y\nRead of size 8\n\nFreed by task 1:\n{rule}\nafter\n"
    text += "WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\n---[ end trace 0 ]---\n"
    kasan, warning = find_reports(text)
    assert "Freed by task 1:" in kasan.trace and "after" not in kasan.trace
    assert warning.kind is Kind.WARNING


def test_decode_names_the_line(tmp_path: Path) -> None:
    source = tmp_path / "ring.c"
    source.write_text("int before;\nint drain(int *p)\n{\n\tbefore++;\n\treturn *p;\n}\n")
    module = tmp_path / "megapipe.ko"
    subprocess.run(["gcc", "-g", "-O1", "-c", source, "-o", module], check=True)
    place = "drain+0x0/0x10 [megapipe]"
    assert f"{tmp_path.name}/ring.c:4)" in decode(f"RIP: 0010:{place}", [module])
    unknown = "gone+0x1/0x2 [megapipe] and vfs_write+0x1/0x2"
    assert decode(unknown, [module, tmp_path / "missing.ko"]) == unknown


def test_decode_without_binutils_leaves_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "megapipe.ko"
    module.write_bytes(b"no ELF")
    assert decode("drain+0x0/0x10 [megapipe]", [module]) == "drain+0x0/0x10 [megapipe]"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert decode("drain+0x0/0x10 [megapipe]", [module]) == "drain+0x0/0x10 [megapipe]"


def test_a_flood_stays_within_bounds_and_keeps_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "transcript"
    transcript = Transcript(path)
    transcript.write(b"the beginning\r\nWARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\r\n")
    for _ in range(400):
        transcript.write(b"flood flood flood\n" * 1000)
    transcript.write(b"Kernel panic - not syncing: the end\n")
    assert len(transcript.text) < 1 << 20
    kinds = {report.kind for report in transcript.reports()}
    assert kinds == {Kind.WARNING, Kind.PANIC}
    transcript.close()
    kept = path.read_bytes()
    assert kept.startswith(b"the beginning\nWARNING") and kept.endswith(b"the end\n")
    assert b"bytes left out" in kept and len(kept) < 1_400_000


def test_a_program_on_the_console(tmp_path: Path) -> None:
    console = Console(["sh", "-c", "echo ready; read x; echo got $x; exit 3"])
    try:
        assert console.expect_ready("ready")
        console.send("word\n")
        while console.poll():
            time.sleep(0.01)
        assert "got word" in console.transcript.text
        assert not console.alive and console.exit_status == "ended with status 3"
    finally:
        console.close()


def test_descriptors_are_inherited_and_others_are_not() -> None:
    with Path("/dev/null").open() as wanted, Path("/dev/null").open() as other:
        code = f"import os; os.fstat({wanted.fileno()}); print('one')\nos.fstat({other.fileno()})"
        console = Console([sys.executable, "-c", code], descriptors=[wanted.fileno()])
        while console.poll():
            time.sleep(0.01)
        assert "one" in console.tail() and "Bad file descriptor" in console.tail()
        console.close()


def test_close_ends_the_program() -> None:
    console = Console(["sleep", "1000"])
    assert console.alive
    console.close()
    assert not console.alive
