"""Layers, tables and graphs from recorded call paths; and one profile of a real guest."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from grader import flame, layers, profile
from grader import variant as variants
from grader.errors import UsageError
from grader.lab import load_lab
from grader.layers import charged, layer_of
from grader.probe import stacks
from grader.probe.sources import Site
from grader.probe.stacks import CallPath
from grader.progress import Progress
from grader.samples import Cell
from grader.station import Station, build
from kernel.build import Kernel

ENTRY = Site("entry_SYSCALL_64", "arch/x86/entry/entry_64.S")
SOFTIRQ = Site("handle_softirqs", "kernel/softirq.c")
TCP = Site("tcp_v4_rcv", "net/ipv4/tcp_ipv4.c")
COPY = Site("memcpy", "arch/x86/lib/memcpy_64.S")
MP = Site("mp_read", "megapipe/")
EPOLL = Site("do_epoll_wait", "fs/eventpoll.c")


@pytest.mark.parametrize(
    ("name", "file", "layer"),
    [
        ("user", "", "user"),
        ("entry_SYSCALL_64", "arch/x86/entry/entry_64.S", "system calls"),
        ("asm_common_interrupt", "arch/x86/entry/entry_64.S", "interrupts"),
        ("__switch_to_asm", "arch/x86/entry/entry_64.S", "scheduler"),
        ("do_epoll_wait", "fs/eventpoll.c", "epoll"),
        ("vfs_read", "fs/read_write.c", "files"),
        ("io_read", "io_uring/rw.c", "io_uring"),
        ("mp_read", "megapipe/", "MegaPipe"),
        ("mp_limit_check", "mp_limit/", "limit"),
        ("sock_alloc_file", "net/socket.c", "sockets"),
        ("inet_csk_accept", "net/ipv4/inet_connection_sock.c", "TCP"),
        ("fib_table_lookup", "net/ipv4/fib_trie.c", "IP"),
        ("nf_hook_slow", "net/netfilter/core.c", "IP"),
        ("neigh_resolve_output", "net/core/neighbour.c", "IP"),
        ("kfree_skbmem", "net/core/skbuff.c", "packet buffers"),
        ("net_rx_action", "net/core/dev.c", "driver"),
        ("start_xmit", "drivers/net/virtio_net.c", "driver"),
        ("fq_codel_dequeue", "net/sched/sch_fq_codel.c", "driver"),
        ("handle_softirqs", "kernel/softirq.c", "interrupts"),
        ("ktime_get", "kernel/time/timekeeping.c", "timers"),
        ("try_to_wake_up", "kernel/sched/core.c", "scheduler"),
        ("kmem_cache_free", "mm/slub.c", "allocator"),
        ("__handle_mm_fault", "mm/memory.c", "memory"),
        ("__check_object_size", "mm/usercopy.c", "security"),
        ("security_socket_accept", "security/security.c", "security"),
        ("__rcu_read_lock", "kernel/rcu/tree.c", "RCU"),
        ("memcpy", "arch/x86/lib/memcpy_64.S", layers.CALLER),
        ("_raw_spin_lock", "kernel/locking/spinlock.c", layers.CALLER),
        ("__cgroup_rstat_updated", "kernel/cgroup/rstat.c", "other"),
        ("[unknown]", "", "other"),
    ],
)
def test_layer(name: str, file: str, layer: str) -> None:
    assert layer_of(Site(name, file)) == layer


def test_helpers_are_charged_to_who_calls_them() -> None:
    assert charged((ENTRY, TCP, COPY)) == "TCP"
    assert charged((ENTRY, COPY, COPY)) == "system calls"
    assert charged((COPY,)) == "other"
    assert charged((ENTRY, stacks.UNKNOWN)) == "other"


def test_the_clock_pays_for_its_interrupt_and_not_for_the_softirqs_after_it() -> None:
    tick = Site("sysvec_apic_timer_interrupt", "arch/x86/kernel/apic/apic.c")
    scheduler = Site("update_load_avg", "kernel/sched/fair.c")
    over = Site("irq_exit_rcu", "kernel/softirq.c")
    assert charged((ENTRY, MP, tick, scheduler)) == "clock"
    assert charged((ENTRY, MP, tick, over, SOFTIRQ, TCP)) == "TCP"
    assert charged((ENTRY, scheduler)) == "scheduler"


def test_every_layer_can_be_shown() -> None:
    assert set(flame.COLOURS) == set(layers.LAYERS)
    assert set(layers.TITLES) < set(layers.LAYERS)


def profile_of(server: str, *rounds: dict[CallPath, float]) -> profile.Profile:
    sums = tuple(sum(one.values()) for one in rounds)
    return profile.Profile(server, f"{server} -x", Cell(4, 64, 1), rounds, sums)


OLD = profile_of(
    "epoll",
    {(ENTRY,): 100.0, (ENTRY, EPOLL): 300.0, (ENTRY, TCP, COPY): 50.0, (SOFTIRQ, TCP): 1000.0},
    {(ENTRY,): 100.0, (ENTRY, EPOLL): 310.0, (ENTRY, TCP, COPY): 50.0, (SOFTIRQ, TCP): 1000.0},
)
NEW = profile_of(
    "BPL",
    {(ENTRY,): 10.0, (ENTRY, MP): 200.0, (ENTRY, SOFTIRQ, TCP): 1050.0},
    {(ENTRY,): 10.0, (ENTRY, MP): 200.0, (ENTRY, SOFTIRQ, TCP): 1050.0},
)


def printed(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_layers_side_by_side() -> None:
    text = printed(profile.layers_table([OLD, NEW]))
    rows = {re.split(r"\s{2,}", line.strip())[0]: line for line in text.splitlines() if line}
    # Student's t for one degree of freedom is 12.7; the standard error is 5.
    assert re.search(r"305 ± 64\s+0 ± 0\s+-305", rows["epoll"])
    assert re.search(r"0 ± 0\s+200 ± 0\s+\+200", rows["MegaPipe"])
    # What memcpy did for TCP is TCP's.
    assert re.search(r"1,050 ± 0\s+1,050 ± 0\s+\+0", rows["TCP"])
    assert "-195" in rows["all"]
    assert "in no layer (other): 0.0 % of epoll, 0.0 % of BPL" in text
    assert "io_uring" not in text


def test_the_functions_that_differ_most() -> None:
    text = printed(profile.differences_table(OLD, NEW, limit=2))
    lines = [line.split() for line in text.splitlines() if ".c" in line or "megapipe/" in line]
    assert [line[:4] for line in lines] == [
        ["-305", "305", "0", "do_epoll_wait"],
        ["+200", "0", "200", "mp_read"],
    ]
    assert "memcpy" in printed(profile.functions_table(OLD))


def test_plain_data() -> None:
    record = json.loads(json.dumps(OLD.record()))
    assert record["layers"]["epoll"] == [300.0, 310.0]
    assert record["instructions"] == [1450.0, 1460.0]
    assert record["functions"][0] == {
        "name": "tcp_v4_rcv",
        "file": "net/ipv4/tcp_ipv4.c",
        "instructions": 1000.0,
    }


def test_call_paths_for_other_tools() -> None:
    assert profile.folded({(SOFTIRQ, TCP): 1.5, (ENTRY, MP): 2.0, (ENTRY,): -1.0}) == (
        "entry_SYSCALL_64;mp_read 2000\nhandle_softirqs;tcp_v4_rcv 1500\n"
    )


def test_a_softirq_stands_on_its_own() -> None:
    assert flame.at_root((ENTRY, MP, SOFTIRQ, TCP)) == (SOFTIRQ, TCP)
    assert flame.at_root((SOFTIRQ, TCP)) == (SOFTIRQ, TCP)
    assert flame.at_root((ENTRY, MP)) == (ENTRY, MP)


SVG = "{http://www.w3.org/2000/svg}"


def boxes(text: str) -> dict[str, tuple[float, float, str]]:
    """Return title's first line -> x, width and the whole title."""
    found = {}
    for group in ET.fromstring(text).iter(f"{SVG}g"):
        tip, box = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert tip is not None and tip.text is not None and box is not None
        name = tip.text.splitlines()[0]
        found[name] = (float(box.get("x", "")), float(box.get("width", "")), tip.text)
    return found


def test_flame_graph() -> None:
    found = boxes(flame.graph("epoll <&>", OLD.paths))
    whole = found["all"][1]
    assert found["handle_softirqs"][1] == pytest.approx(whole * 1000 / 1455, abs=0.02)
    assert found["entry_SYSCALL_64"][1] == pytest.approx(whole * 455 / 1455, abs=0.02)
    x, width, tip = found["do_epoll_wait"]
    assert found["entry_SYSCALL_64"][0] <= x
    assert x + width <= sum(found["entry_SYSCALL_64"][:2]) + 0.02
    assert tip.splitlines()[1:] == [
        "epoll, fs/eventpoll.c",
        "305 instructions per transaction (21.0 %), 305 of them its own",
    ]


def test_a_negative_slope_has_no_width() -> None:
    found = boxes(flame.graph("x", {(ENTRY,): 100.0, (ENTRY, MP): -3.0}))
    assert "mp_read" not in found
    assert found["entry_SYSCALL_64"][1] == found["all"][1]


def test_differential_flame_graph_shows_what_either_does() -> None:
    found = boxes(flame.difference("x", OLD.paths, NEW.paths, ("epoll", "BPL")))
    assert "epoll: 305, BPL: 0 instructions per transaction (-305)" in found["do_epoll_wait"][2]
    assert "(+200)" in found["mp_read"][2]
    assert "(+50)" in found["handle_softirqs"][2]


@pytest.mark.parametrize(("numbers", "rounds"), [([0], 3), ([], 3), ([1], 1)])
def test_what_cannot_be_measured_is_refused(
    numbers: list[int], rounds: int, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        profile.run(load_lab("1-batching"), ["epoll"], numbers, rounds, tmp_path)


# -- A real guest

# Of the instructions that the standard probe counts, in windows that begin and end when the guest
# does next to nothing; what a clock's tick costs in between is a few thousand.
TOLERANCE = 0.002


def test_profile_of_a_guest(kernel: Kernel, tmp_path: Path) -> None:
    lab = load_lab("1-batching")
    servers = ("epoll", "BPL", "limit")
    built = build(lab, variants.solution(lab.folder), kernel)
    with Station(built, vcpus=2, stacks=True) as station:
        found = profile.measure(station, Cell(2, 64, 1), 2, Progress(quiet=True), servers)
        assert station.stacks.read().lost_frames == 0
    for one in found:
        for paths, counted in zip(one.rounds, one.counted, strict=True):
            assert sum(paths.values()) == pytest.approx(counted, rel=TOLERANCE)
        assert one.layer("other").mean < 0.03 * one.total.mean
        names = {tuple(site.name for site in path) for path in one.paths}
        assert not any(stacks.LOST in path or stacks.NONE in path for path in one.paths)
        # Every path begins where the processor or the kernel begins one.
        roots = {path[0] for path in names}
        begins = re.compile(
            "user|entry_SYSCALL_64|asm_.*|irq_entries_start|ret_from_fork_asm|start_kernel"
            "|secondary_startup_64|common_interrupt_return"
        )
        assert {root for root in roots if not begins.fullmatch(root)} == set()
        assert any(
            "handle_softirqs" in p[: p.index("tcp_v4_rcv")] for p in names if "tcp_v4_rcv" in p
        )
    epoll, megapipe, _ = ({tuple(s.name for s in path) for path in one.paths} for one in found)
    assert any("do_epoll_wait" in path for path in epoll if path[0] == "entry_SYSCALL_64")
    assert any("mp_channel_ioctl" in path for path in megapipe if path[0] == "entry_SYSCALL_64")
    assert found[0].layer("epoll").mean > 500 > found[1].layer("epoll").mean
    assert found[1].layer("MegaPipe").mean > 500 > found[0].layer("MegaPipe").mean
    assert found[2].layer("limit").mean > 50 > found[1].layer("limit").mean
    profile.write_graphs(found, tmp_path)
    graphs = [f"{name}-1.svg" for name in (*servers, "difference-BPL", "difference-limit")]
    graphs += [f"{name}-1.folded" for name in servers]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(graphs)
