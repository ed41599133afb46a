"""Sharing: the probe's model, its file, what a line is, the report; and all of it in a guest."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from grader import probe as probe_package
from grader import sharing
from grader import variant as variants
from grader.bench import SERVERS
from grader.lab import LoadShape, load_lab
from grader.probe import ProbeError, Symbols, plugin, sharing_file
from grader.probe.memory import DIRECT_MAP, GuestMemory, Thing
from grader.probe.sharing import SharingProbe
from grader.probe.sharing_file import CODE_FUNCTIONS, Transfers
from grader.station import Station, build
from kernel.build import Kernel

FOLDER = Path(probe_package.__file__).parent
DATA = Path(__file__).with_name("probe")

FUNCTIONS = (0xFFFFFFFF81000000, 0xFFFFFFFF81000100, 0xFFFFFFFF81000200)
USER, MODULE = "401000", "ffffffffc0001234"
F0, F1 = (f"{start + 5:x}" for start in FUNCTIONS[:2])
LINE = "ffff888000001000"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("harness") / "harness"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-DPROBE_API_VERSION=1"]
    source = DATA / "sharing_harness.c"
    subprocess.run(
        ["cc", *flags, f"-I{FOLDER}", "-o", output, source, "-pthread"],
        check=True,
    )
    return output


def run_harness(
    harness: Path,
    folder: Path,
    accesses: str,
    content: bytes | None = None,
    functions: str | None = None,
    memory: str = "memory_mib=16",
) -> tuple[str, bytes]:
    """Return what the plugin's code complains of, and the file it leaves."""
    counters, listed = folder / "counters", folder / "functions"
    counters.write_bytes(sharing_file.new_file(2, 3, 16, 64) if content is None else content)
    lines = "".join(f"{start:x}\n" for start in FUNCTIONS)
    listed.write_text(lines if functions is None else functions)
    run = subprocess.run(
        [harness, f"counters={counters}", f"functions={listed}", *memory.split()],
        input=accesses,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode == 0) == (run.stderr == "")
    return run.stderr, counters.read_bytes()


def moved(harness: Path, folder: Path, accesses: str, content: bytes | None = None) -> Transfers:
    said, left = run_harness(harness, folder, "on\n" + accesses, content)
    assert said == ""
    found = sharing_file.parse(left)
    assert_consistent(found)
    return found


def assert_consistent(found: Transfers) -> None:
    rows = int(found.row_loads.sum() + found.row_stores.sum())
    assert found.loads + found.stores == rows + int(found.overflow.sum())


def rows(found: Transfers) -> dict[tuple[int, int], tuple[int, int]]:
    """Return (code, line) -> (loads, stores)."""
    columns = (found.code, found.line, found.row_loads, found.row_stores)
    return {
        (c, line): (r, w) for c, line, r, w in zip(*map(np.ndarray.tolist, columns), strict=True)
    }


# -- The model


def test_ping_pong_is_a_transfer_each_time(harness: Path, tmp_path: Path) -> None:
    accesses = f"0 w {F0} {LINE} 3\n1 w {F1} {LINE} 3\n" * 10
    found = moved(harness, tmp_path, accesses)
    assert (found.loads, found.stores) == (0, 19)  # the first touch is none
    assert found.kernel_stores.tolist() == [9, 10]
    line = 0x1000 // 64
    assert rows(found) == {(CODE_FUNCTIONS, line): (0, 9), (CODE_FUNCTIONS + 1, line): (0, 10)}
    assert found.vaddr.tolist() == [int(LINE, 16)] * 2


def test_a_copy_stays_until_a_store_takes_it_away(harness: Path, tmp_path: Path) -> None:
    accesses = (
        f"0 r {F0} {LINE} 3\n"  # from memory
        + f"1 r {F0} {LINE} 3\n0 r {F0} {LINE} 3\n" * 5  # once to 1, then both have it
        + f"0 w {F0} {LINE} 3\n"  # takes it from 1
        + f"0 w {F0} {LINE} 3\n" * 5
        + f"1 r {USER} {LINE} 3\n"  # lost, so fetched again
    )
    found = moved(harness, tmp_path, accesses)
    assert found.kernel_loads.tolist() == [0, 1]
    assert found.kernel_stores.tolist() == [1, 0]
    assert found.user_loads.tolist() == [0, 1]
    assert found.user_stores.tolist() == [0, 0]


def test_what_the_clocks_interrupt_moves_is_apart(harness: Path, tmp_path: Path) -> None:
    begin, end = FUNCTIONS[1], FUNCTIONS[2]
    away = "ffff888000002000"
    # Not to be seen between: the first instruction may be left out, the one behind it counts.
    accesses = (
        f"0 w {F0} {LINE} 3\n1 w {F0} {LINE} 3\n"
        f"0 w {begin + 4:x} {away} 3\n1 m {F0} {away} 2\n0 r {F0} {LINE} 3\n0 m {F1} {away} 2\n"
        f"0 r {end + 9:x} {away} 3\n1 w {F0} {away} 3\n0 w {F0} {LINE} 3\n"
    )
    memory = f"memory_mib=16 clock={begin:x} clock_end={end:x}"
    said, left = run_harness(harness, tmp_path, "on\n" + accesses, memory=memory)
    assert said == ""
    found = sharing_file.parse(left)
    assert_consistent(found)
    assert (found.clock_loads.tolist(), found.clock_stores.tolist()) == ([1, 0], [1, 0])
    # Of 1: LINE at first, then twice what the interrupt had; of 0: LINE, which 1 has no more.
    assert found.kernel_stores.tolist() == [1, 3]
    assert found.loads == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (f"clock={F0}", "both or neither"),
        (f"clock={F0} clock_end=", "clock_end=: not a hex address"),
        (f"clock=401000 clock_end={F0}", "clock=401000: not a hex address of the kernel"),
    ],
)
def test_a_clock_without_its_addresses_is_refused(
    harness: Path, tmp_path: Path, arguments: str, complaint: str
) -> None:
    said, _ = run_harness(harness, tmp_path, "", memory=f"memory_mib=16 {arguments}")
    assert complaint in said


def test_lines_of_one_vcpu_do_not_move(harness: Path, tmp_path: Path) -> None:
    accesses = f"0 w {F0} {LINE} 3\n1 w {F0} ffff888000001040 3\n" * 10
    assert len(moved(harness, tmp_path, accesses).key) == 0


@pytest.mark.parametrize(("operation", "merged"), [("m", 9), ("a", 0)])
def test_a_read_modify_write_is_one_transfer(
    harness: Path, tmp_path: Path, operation: str, merged: int
) -> None:
    accesses = f"0 {operation} {F0} {LINE} 2\n1 {operation} {F0} {LINE} 2\n" * 5
    found = moved(harness, tmp_path, accesses)
    assert (found.loads, found.stores) == (0, 9)
    assert found.merged.sum() == merged
    # A load and a store of two instructions are two.
    accesses = f"0 w {F0} {LINE} 2\n1 r {F0} {LINE} 2\n1 w {F1} {LINE} 2\n"
    found = moved(harness, tmp_path, accesses)
    assert (found.loads, found.stores, found.merged.sum()) == (1, 1, 0)


def test_a_straddling_access_touches_both_lines(harness: Path, tmp_path: Path) -> None:
    accesses = f"0 w {F0} ffff88800000103c 3\n1 r {F0} ffff88800000103c 3\n"
    found = moved(harness, tmp_path, accesses)
    assert rows(found) == {(CODE_FUNCTIONS, line): (1, 0) for line in (0x40, 0x41)}
    # Into the next page, too.
    accesses = f"0 w {F0} ffff888000001ffc 3\n1 w {F0} ffff888000001ffc 3\n"
    found = moved(harness, tmp_path, accesses)
    assert rows(found) == {(CODE_FUNCTIONS, line): (0, 1) for line in (0x7F, 0x80)}


def test_what_is_no_memory_is_left_out(harness: Path, tmp_path: Path) -> None:
    for address in ("ffff88800e000000", "ffff88800f000000", "ffff888001000000"):
        found = moved(harness, tmp_path, f"0 w {F0} {address} 3\n1 w {F0} {address} 3\n")
        assert len(found.key) == 0
        assert found.unseen.tolist() == ([1, 1] if "f0" in address else [0, 0])


def test_the_direct_map_is_not_looked_up(harness: Path, tmp_path: Path) -> None:
    # The harness, asked, would not know where these are, or say that they are no memory.
    known = ("ffff88800f000000", "ffff88800e000000")
    accesses = "".join(f"0 w {F0} {a} 3\n1 w {F0} {a} 3\n" for a in (*known, "ffffc9000f000000"))
    arguments = "memory_mib=256 direct=ffff888000000000"
    said, left = run_harness(harness, tmp_path, "on\n" + accesses, memory=arguments)
    assert said == ""
    found = sharing_file.parse(left)
    assert found.line.tolist() == [0xE000000 // 64, 0xF000000 // 64]
    assert found.unseen.tolist() == [1, 1]


def test_the_state_is_kept_while_nothing_is_counted(harness: Path, tmp_path: Path) -> None:
    accesses = f"off\n0 w {F0} {LINE} 3\n1 w {F0} {LINE} 3\non\n0 r {F0} {LINE} 3\n"
    found = moved(harness, tmp_path, accesses)
    assert (found.loads, found.stores) == (1, 0)


def test_code_is_functions_places_and_user(harness: Path, tmp_path: Path) -> None:
    codes = (F0, f"{FUNCTIONS[1]:x}", "ffffffff81000fff", MODULE, "ffffffffc0001244", MODULE, USER)
    accesses = "".join(f"{i % 2} w {code} {LINE} 3\n" for i, code in enumerate(("0", *codes)))
    said, left = run_harness(harness, tmp_path, "on\n" + accesses)
    assert said == ""
    line = 0x1000 // 64
    first = CODE_FUNCTIONS + len(FUNCTIONS)
    counts = {CODE_FUNCTIONS: 1, CODE_FUNCTIONS + 1: 1, CODE_FUNCTIONS + 2: 1, first: 2}
    counts |= {first + 1: 1, sharing_file.CODE_USER: 1}
    assert rows(sharing_file.parse(left)) == {(c, line): (0, n) for c, n in counts.items()}
    assert sharing_file.places(left) == [0xFFFFFFFFC0001230, 0xFFFFFFFFC0001240]
    # Without room for places, their code is one.
    content = sharing_file.new_file(2, 3, 0, 64)
    found = moved(harness, tmp_path, accesses, content)
    assert (sharing_file.CODE_UNKNOWN, line) in rows(found)


def test_a_full_table_loses_no_count(harness: Path, tmp_path: Path) -> None:
    end = f"{int(LINE, 16) + 64 * 100:x}"
    accesses = f"0 w {F0} {LINE} 3 {end}\n1 m {F0} {LINE} 3 {end}\n"
    found = moved(harness, tmp_path, accesses, sharing_file.new_file(2, 3, 0, 64))
    assert found.stores == found.merged.sum() == 100
    assert found.overflow.tolist() == [0, 36]
    assert len(found.key) == 64


def test_no_file_has_a_name_once_the_guest_runs(harness: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("counters", "functions", "memory")}
    arguments = [f"{name}={path}" for name, path in files.items()]
    for accesses, left in (("", ["counters", "functions", "memory"]), (f"0 r {F0} {LINE} 3\n", [])):
        files["counters"].write_bytes(sharing_file.new_file(2, 0, 0, 64))
        files["functions"].touch()
        files["memory"].touch()
        subprocess.run(
            [harness, *arguments, "memory_mib=16"], input=accesses, text=True, check=True
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == left


# -- The file


def header_with(**changes: int | bytes) -> bytes:
    names = ["magic", "layout", *(f.name for f in dataclasses.fields(sharing_file.Header))]
    file = sharing_file.new_file(2, 3, 16, 64)
    fields = list(sharing_file.HEADER.unpack(file[: sharing_file.HEADER.size]))
    for name, value in changes.items():
        fields[names.index(name)] = value
    return sharing_file.HEADER.pack(*fields) + file[sharing_file.HEADER.size :]


@pytest.mark.parametrize(
    ("content", "functions", "memory", "message"),
    [
        (b"", None, "memory_mib=1", "shorter than its header"),
        (header_with(magic=b"????????"), None, "memory_mib=1", "not a sharing file"),
        (header_with(state=1), None, "memory_mib=1", "already used"),
        (header_with(vcpus=65), None, "memory_mib=1", "does not fit"),
        (header_with(block_bytes=64), None, "memory_mib=1", "does not fit"),
        (header_with(slots=63), None, "memory_mib=1", "does not fit"),
        (header_with(slots=128), None, "memory_mib=1", "does not fit"),
        (header_with(places=1 << 20), None, "memory_mib=1", "does not fit"),
        (header_with(slots_offset=1 << 60), None, "memory_mib=1", "does not fit"),
        (header_with(vcpus=1), None, "memory_mib=1", "2 vCPUs .* room for 1"),
        (None, "ffffffff81000000\n", "memory_mib=1", "names 1 functions, the header 3"),
        (None, "1\n2\n3\n4\n", "memory_mib=1", "more than 3 functions"),
        (None, "2\n1\n", "memory_mib=1", ":2: not a hex address above"),
        (None, "name\n", "memory_mib=1", ":1: not a hex address"),
        (None, None, "memory_mib=0", "give 1 to 2816"),
        (None, None, "memory_mib=4096", "give 1 to 2816"),
        (None, None, "memory_mib=512M", "give 1 to 2816"),
        (None, None, "memory_mib=1 direct=401000", "direct=401000: not a hex address"),
        (None, None, "memory_mib=1 direct=there", "direct=there: not a hex address"),
        (None, None, "size=512", "unknown argument size=512"),
    ],
)
def test_plugin_refuses(
    harness: Path,
    tmp_path: Path,
    content: bytes | None,
    functions: str | None,
    memory: str,
    message: str,
) -> None:
    said, _ = run_harness(harness, tmp_path, "", content, functions, memory)
    assert said.startswith("sharing probe: ")
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MPSHARE\n", "8 bytes are no sharing file"),
        (header_with(magic=b"????????"), "not a sharing file"),
        (header_with(state=1)[:-1], "does not fit its size"),
        (header_with(), "no QEMU has loaded"),
    ],
)
def test_bad_file(data: bytes, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        sharing_file.parse(data)


def test_difference_of_two_readings(harness: Path, tmp_path: Path) -> None:
    accesses = f"0 w {F0} {LINE} 3\n" + f"1 r {F0} {LINE} 3\n0 w {F0} {LINE} 3\n" * 3
    earlier = moved(harness, tmp_path, accesses)
    other = "ffff888000000000"
    later = moved(harness, tmp_path, accesses * 2 + f"0 w {F1} {other} 3\n1 w {F1} {other} 3\n")
    since = later - earlier
    assert (since.loads, since.stores) == (3, 4)
    assert rows(since) == {(CODE_FUNCTIONS, 0x40): (3, 3), (CODE_FUNCTIONS + 1, 0): (0, 1)}
    assert_consistent(since)
    for one, two in ((earlier, later), (moved(harness, tmp_path, ""), earlier)):
        with pytest.raises(ProbeError, match="different probes"):
            _ = one - two


# -- The plugin in the QEMU at hand, and a probe's life


@pytest.fixture
def symbols(tmp_path: Path) -> Symbols:
    path = tmp_path / "System.map"
    path.write_text(
        "ffffffff81000000 T _stext\nffffffff81000000 T first\nffffffff81000100 t second.isra.0\n"
    )
    return Symbols.from_system_map(path)


def test_plugin_loads() -> None:
    assert plugin("sharing").name == "sharing.so"
    assert plugin("sharing") != plugin()


def test_life(symbols: Symbols, tmp_path: Path) -> None:
    parent = tmp_path / "a, strange  place"
    parent.mkdir()
    with SharingProbe(2, 64, symbols, parent=parent) as probe:
        with pytest.raises(ProbeError, match="no QEMU has loaded"):
            probe.read()
        arguments = probe.qemu_arguments()
        command = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-display", "none", "-S"]
        command += ["-nodefaults", "-m", "64", "-monitor", "stdio", *arguments]
        subprocess.run(command, input=b"quit\n", capture_output=True, check=True, timeout=60)
        assert probe.counting
        assert probe.ended
        assert list(parent.iterdir()) == []
        assert len(probe.memory) == 64 << 20
        with probe.recording():
            assert probe.read().loads == 0
        names = probe.functions()
        assert names[CODE_FUNCTIONS:] == ["first", "second"]
        with pytest.raises(ProbeError, match="its QEMU runs already"):
            probe.qemu_arguments()
        with pytest.raises(ProbeError, match="not the one of"):
            write_system_map(tmp_path)
            probe.guest_memory()
    for use in (probe.read, probe.functions, probe.guest_memory, probe.recording().__enter__):
        with pytest.raises(ProbeError, match="not open"):
            use()


def test_nothing_left_behind(symbols: Symbols, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises(KeyboardInterrupt), SharingProbe(2, 64, symbols, parent=parent):
        raise KeyboardInterrupt
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("vcpus", "memory_mib", "message"),
    [(0, 64, "0 vCPUs"), (65, 64, "65 vCPUs"), (1, 0, "0 MiB"), (1, 4096, "4096 MiB")],
)
def test_what_cannot_be_followed(
    symbols: Symbols, vcpus: int, memory_mib: int, message: str
) -> None:
    with pytest.raises(ProbeError, match=message):
        SharingProbe(vcpus, memory_mib, symbols)


# -- What a line is, in a made-up memory

IMAGE, DIRECT = 0xFFFFFFFF80000000, DIRECT_MAP
VMALLOC, VMEMMAP = 0xFFFFC90000000000, 0xFFFFEA0000000000
MIB = 1 << 20
AREAS = (DIRECT + 0x280000, DIRECT + 0x288000)
SYMBOLS = {
    "__per_cpu_start": 0,
    "runqueues": 0x100,
    "__per_cpu_end": 0x1000,
    "_text": IMAGE + 0x10000,
    "linux_banner": IMAGE + 0x11000,
    "page_offset_base": IMAGE + 0x12000,
    "vmalloc_base": IMAGE + 0x12008,
    "vmemmap_base": IMAGE + 0x12010,
    "__per_cpu_offset": IMAGE + 0x12100,
    "jiffies": IMAGE + 0x12440,
    "slab_caches": IMAGE + 0x13000,
    "init_top_pgt": IMAGE + 0x14000,
    "tcp_hashinfo": IMAGE + 0x15000,
    "__init_begin": IMAGE + 0x18000,
    "_end": IMAGE + 0x20000,
}
CACHES = [f"cache-{number}" for number in range(6)]
# Physical addresses: of each struct kmem_cache, of its name, and of a slab of 2 pages.
CACHE_AT, NAME_AT, SLAB_AT = 0x100000, 0x110000, 0x300000
LIST_AT = 104


def write_system_map(folder: Path) -> Path:
    path = folder / "System.map"
    path.write_text("".join(f"{value:016x} D {name}\n" for name, value in SYMBOLS.items()))
    return path


def made_up_memory(**words: int) -> bytearray:
    """Return 4 MiB with page tables, per-CPU areas and slabs; `words` change symbols' values."""
    memory = bytearray(4 * MIB)

    def put(physical: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}Q", memory, physical, *values)

    at = {name: value - IMAGE for name, value in SYMBOLS.items() if value >= IMAGE}
    memory[at["linux_banner"] : at["linux_banner"] + 14] = b"Linux version "
    # The image and the direct map, by 2 MiB pages; the struct pages are the last 2 MiB.
    tables = iter(range(0x30000, 0x40000, 0x1000))
    for virtual, physical in (
        (IMAGE, 0),
        (DIRECT, 0),
        (DIRECT + 2 * MIB, 2 * MIB),
        (VMEMMAP, 2 * MIB),
    ):
        table = at["init_top_pgt"]
        for shift in (39, 30):
            entry = table + (virtual >> shift & 511) * 8
            if not struct.unpack_from("<Q", memory, entry)[0]:
                put(entry, next(tables) | 1)
            table = struct.unpack_from("<Q", memory, entry)[0] & ~0xFFF
        put(table + (virtual >> 21 & 511) * 8, physical | 0x81)
    put(at["page_offset_base"], DIRECT, VMALLOC, VMEMMAP)
    put(at["__per_cpu_offset"], *AREAS, *[at["_text"] + IMAGE] * 2)
    put(at["tcp_hashinfo"], DIRECT + 0x3F0000, DIRECT + 0x3F8000, 0xFF | 0x7F << 32)
    nodes = [DIRECT + CACHE_AT + 0x200 * i + LIST_AT for i in range(len(CACHES))]
    ring = [SYMBOLS["slab_caches"], *nodes, SYMBOLS["slab_caches"]]
    put(at["slab_caches"], ring[1])
    for index, name in enumerate(CACHES):
        cache, text = CACHE_AT + 0x200 * index, NAME_AT + 0x40 * index
        memory[text : text + len(name)] = name.encode()
        put(cache + 24, 192)
        put(cache + LIST_AT - 8, DIRECT + text, ring[index + 2])
        page = SLAB_AT // 4096 + 14 * index
        # Of the two pages, the second says where the first is.
        put(2 * MIB + 64 * page, 0, DIRECT + cache)
        put(2 * MIB + 64 * page + 48, 0xF5 << 24 | 1 << 32)
        put(2 * MIB + 64 * (page + 1) + 8, VMEMMAP + 64 * page + 1)
    put(2 * MIB + 64 * 0x3E0 + 48, 0xF2 << 24 | 1 << 32, 0, *[0] * 6, 1 << 32)
    for name, value in words.items():
        put(at[name], value)
    return memory


@pytest.mark.parametrize(
    ("address", "thing"),
    [
        (0x401000, Thing("user", "user memory")),
        (IMAGE + 0x12444, Thing("variable", "jiffies", 0)),
        (IMAGE + 0x12440 + 0x85, Thing("variable", "jiffies", 0x80)),
        (DIRECT + 0x12450, Thing("variable", "jiffies", 0)),
        (AREAS[0] + 0x148, Thing("per-CPU", "runqueues", 0x40)),
        (AREAS[1] + 0x148, Thing("per-CPU", "runqueues", 0x40)),
        (AREAS[1] + 0x7040, Thing("per-CPU", "allocated per-CPU memory", 0x7040)),
        (DIRECT + SLAB_AT, Thing("slab", "cache-0", 0)),
        (DIRECT + SLAB_AT + 192 + 70, Thing("slab", "cache-0", 64)),
        (DIRECT + SLAB_AT + 14 * 4096 + 4096 + 150, Thing("slab", "cache-1", 0)),
        (VMEMMAP + SLAB_AT // 64 + 15 * 64, Thing("struct page", "struct page of cache-1")),
        (VMEMMAP + 0x3E0 * 64, Thing("struct page", "struct page of page tables")),
        (DIRECT + 0x3E0123, Thing("page", "page tables")),
        (DIRECT + 0x3E1123, Thing("page", "pages")),
        (DIRECT + 0x3E2123, Thing("page", "free pages")),
        (DIRECT + 0x3F07F8, Thing("table", "TCP's table of connections")),
        (DIRECT + 0x3F81FC, Thing("table", "locks of TCP's table of connections")),
        (VMALLOC + 123, Thing("vmalloc", "vmalloc memory")),
        (0xFFFFFFFFC0001040, Thing("module", "mp_read")),
        (0xFFFFFE0000000000, Thing("unknown", "unknown memory")),
    ],
)
def test_what_a_line_is(tmp_path: Path, address: int, thing: Thing) -> None:
    modules = [(0xFFFFFFFFC0001000, "mp_read"), (0xFFFFFFFFC0002000, "mp_write")]
    memory = GuestMemory(bytes(made_up_memory()), write_system_map(tmp_path), modules)
    assert memory.identify(address) == thing


def test_a_freed_page_is_what_it_was(tmp_path: Path) -> None:
    content = made_up_memory()
    memory = GuestMemory(content, write_system_map(tmp_path))
    record = 2 * MIB + 64 * (SLAB_AT // 4096)
    content[record : record + 128] = bytes(128)
    memory.look()
    assert memory.identify(DIRECT + SLAB_AT + 4096) == Thing("slab", "cache-0", 64)
    content[record + 52] = 1  # in use again, and not by a slab
    memory.look()
    assert memory.identify(DIRECT + SLAB_AT) == Thing("page", "pages")


def test_a_layout_that_does_not_fit_is_not_guessed(tmp_path: Path) -> None:
    memory = GuestMemory(bytes(made_up_memory(slab_caches=0)), write_system_map(tmp_path))
    unknown = Thing("slab", "slab objects of an unknown cache")
    assert memory.identify(DIRECT + SLAB_AT) == unknown
    memory = GuestMemory(bytes(made_up_memory(init_top_pgt=0)), write_system_map(tmp_path))
    assert memory.identify(IMAGE + 0x12440) == Thing("variable", "jiffies", 0)


def test_another_kernels_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="not the one of"):
        GuestMemory(bytes(4 * MIB), write_system_map(tmp_path))
    moved_away = bytes(made_up_memory(page_offset_base=DIRECT + (1 << 40)))
    with pytest.raises(ProbeError, match="not at 0xffff888000000000"):
        GuestMemory(moved_away, write_system_map(tmp_path))
    path = tmp_path / "System.map"
    path.write_text("ffffffff81000000 T _text\n")
    with pytest.raises(ProbeError, match="has no linux_banner"):
        GuestMemory(bytes(made_up_memory()), path)
    path.write_text("nonsense\n")
    with pytest.raises(ProbeError, match="not a System"):
        GuestMemory(bytes(made_up_memory()), path)


# -- The report


def test_a_transaction_is_the_slope(harness: Path, tmp_path: Path) -> None:
    around = f"1 w {F1} ffff888000000000 3\n0 w {F1} ffff888000000000 3\n" * 7

    def window(transactions: int) -> Transfers:
        """Return what so many transactions move, and what moves beside them in each window."""
        each = f"0 w {F0} {LINE} 3\n1 r {USER} {LINE} 3\n"
        return moved(harness, tmp_path, around + each * transactions)

    names = ["", "user code", "", "f0", "f1", "f2"]
    line, other = Thing("slab", "TCP", 0x40), Thing("variable", "jiffies", 0)
    things = {int(LINE, 16): line, DIRECT: other}
    one = sharing.summarize("x", 10, (4, 8), window(4), window(8), names, things)
    assert (one.moved, one.user) == (sharing.Moved(1, 1), sharing.Moved(1, 0))
    assert (one.merged, one.unattributed, one.per_connection) == (0, 0, 20)
    assert one.kinds == {"slab": sharing.Moved(1, 1), "variable": sharing.Moved(0, 0)}
    touching = {share.name: share.moved for share in one.lines[0].functions}
    assert touching == {"f0": sharing.Moved(0, 1), "user code": sharing.Moved(1, 0)}
    assert (one.lines[0].name, one.lines[0].lines) == ("TCP+0x40", 1)
    assert one.lines[1].moved == sharing.Moved(0, 0)
    # Another line of the same objects, and a third thing that moves more than either.
    second = dataclasses.replace(one.lines[0], name="TCP+0x80")
    page = dataclasses.replace(
        one.lines[0], name="pages", object="pages", moved=sharing.Moved(1, 2)
    )
    both = dataclasses.replace(one, lines=(page, *one.lines, second))
    assert list(both.objects.items()) == [
        ("TCP", sharing.Moved(2, 2)),
        ("pages", sharing.Moved(1, 2)),
        ("jiffies", sharing.Moved(0, 0)),
    ]

    data = sharing.as_json(one, top=1)
    assert data == json.loads(json.dumps(data))
    assert [row["name"] for row in data["lines"]] == ["TCP+0x40"]
    assert data["per_connection"] == 20
    assert data["objects"] == [{"name": "TCP", "moved": {"loads": 1, "stores": 1}}]

    console = Console(file=io.StringIO(), width=160)
    console.print(sharing.overview(1, {"BPL": [one, one]}))
    sharing.tables("BPL", one, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "20.0, 20.0" in text
    assert "TCP+0x40" in text
    assert "f0 w 1.00" in text


# -- A real guest


def test_partitioning_keeps_connections_where_they_are(kernel: Kernel) -> None:
    lab = load_lab("1-batching")
    built = build(lab, variants.solution(lab.folder), kernel)
    shape = LoadShape(256, 1, mode="rounds")
    with Station(built, counted=False, sharing=True, kernel_args=sharing.KERNEL_ARGS) as station:
        before = station.sharing.read()
        shared, local = (
            sharing.measure_sharing(station, SERVERS[server], shape, 1)
            for server in ("epoll", "BPL")
        )
        found = station.sharing.read() - before
    assert_consistent(found)
    assert found.overflow.sum() == found.unseen.sum() == 0
    # But for what the handler itself does behind the end of the interrupt's work, rarely.
    ticks = [one.moved.all for one in local.functions if "sysvec_apic_timer" in one.name]
    assert sum(ticks) < 0.1 * local.clock.all
    assert shared.moved.all > 2.5 * local.moved.all
    # What is looked for, and found: the connection itself.
    tcp = [
        sum(one.moved.all for one in run.lines if one.name.startswith("TCP+"))
        for run in (shared, local)
    ]
    assert tcp[0] > 3 * tcp[1]
    kinds = {line.kind for line in shared.lines}
    assert {"variable", "per-CPU", "slab", "table", "struct page", "page"} <= kinds
    assert "slab objects of an unknown cache" not in {line.name for line in shared.lines}
    # Functions of the module are known by name.
    assert any(one.name.startswith("mp_") for one in local.functions)
