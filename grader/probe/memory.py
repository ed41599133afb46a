"""What a line of the guest's memory is, read from the memory itself, from outside.

`GuestMemory` looks at the physical memory of a machine whose kernel runs where it was linked, and
follows the kernel's own structures: the symbol table of our build says where they begin, the page
tables where they lie. Where a structure's layout is not in the symbol table (there is no debug
information), what is taken for it is checked, and a thing is called unknown rather than guessed.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grader.probe.errors import ProbeError
from grader.probe.sharing_file import LINE_BYTES

# Of x86-64: where the kernel's image is mapped, 1 GiB of it at most; then modules.
IMAGE = 0xFFFFFFFF80000000
# Where the kernel maps all memory when nothing is randomised (with four levels of page tables).
DIRECT_MAP = 0xFFFF888000000000
MODULES = 0xFFFFFFFFC0000000
MODULES_END = 0xFFFFFFFFFF000000
KERNEL_HALF = 1 << 63
_PAGE = 4096
_ADDRESS_BITS = 0x000FFFFFFFFFF000
_PRESENT, _LARGE = 1, 1 << 7
# struct page and struct slab (mm_types.h, slab.h of 6.12), in words of 8 bytes: in word 1 the
# head's address + 1 if it is a tail page's, or the cache of a slab; in word 6 type and reference
# count.
_PAGE_STRUCT = 64
_HEAD_WORD = _CACHE_WORD = 1
_TYPE_WORD = 6
_TYPE_TABLE, _TYPE_SLAB = 0xF2, 0xF5
# struct kmem_cache: the size of an object, and the name right before the list.
_CACHE_SIZE_OFFSET = 24
_LIST_OFFSETS = range(64, 512, 8)
_MAX_CACHES = 4096


@dataclass(frozen=True)
class Thing:
    """What a line is: things that are equal are shown as one.

    `kind` is one of `KINDS`. `offset` is where the line begins in each object of this name (in
    bytes, rounded down to a line), or -1 where that means nothing.
    """

    kind: str
    name: str
    offset: int = -1

    def __str__(self) -> str:
        where = f"+{self.offset:#x}" if self.offset >= 0 else ""
        return f"{self.name}{where}"


KINDS = {
    "variable": "a variable of the kernel's image, by name",
    "per-CPU": "a variable that each CPU has one of, by name or by offset",
    "slab": "objects of a slab cache, which the kernel may have merged with others of their size",
    "table": "a large hash table of TCP",
    "struct page": "the kernel's record of a page, by what the page is",
    "page": "memory that is no slab: packet data, the page cache, page tables, buffers",
    "vmalloc": "mapped page by page: the kernel stacks of tasks, rings, large tables",
    "module": "code and data of modules, named by what the guest says of itself",
    "user": "memory of a process, seen at its own address",
    "unknown": "none of these",
}
"""What a line can be."""


@dataclass(frozen=True)
class _Cache:
    name: str
    size: int


class _Pages:
    """What each page of memory is, by the kernel's record of it; as of the last `look`.

    Of a page that is free by then, what it was when it was last seen in use by a slab.
    """

    def __init__(self, number: int, records: int) -> None:
        """Begin without knowledge of `number` pages, whose records are at the address `records`."""
        self._records = records
        self._own = np.arange(number)
        self.head = self._own.copy()
        """Of each page, the first of those that belong together with it."""
        self.cache = np.zeros(number, np.uint64)
        """Of a slab's page, its struct kmem_cache; else 0."""
        self.free = np.zeros(number, bool)
        self.table = np.zeros(number, bool)

    def look(self, words: npt.NDArray[np.uint64]) -> None:
        """Take in the records as they are now, an array of shape [pages, 8]."""
        link = words[:, _HEAD_WORD]
        head = (link - np.uint64(self._records)) // np.uint64(_PAGE_STRUCT)
        # A record that is being written just now can say anything.
        tail = ((link & np.uint64(1)) == 1) & (head < len(words))
        now = np.where(tail, head, self._own.astype(np.uint64)).astype(np.int64)
        of_head = words[now]
        types = of_head[:, _TYPE_WORD] >> np.uint64(24) & np.uint64(0xFF)
        used = of_head[:, _TYPE_WORD] >> np.uint64(32) != 0
        slab = types == _TYPE_SLAB
        self.free = ~used & ~slab
        self.table = types == _TYPE_TABLE
        known = ~self.free
        self.cache[known] = np.where(slab, of_head[:, _CACHE_WORD], np.uint64(0))[known]
        self.head[known] = now[known]


class _Names:
    """Names of addresses, for the last one that is not above a given address."""

    def __init__(self, named: Iterable[tuple[int, str]]) -> None:
        best: dict[int, str] = {}
        for address, name in named:
            best[address] = min(best.get(address, name), name, key=lambda n: (n.count("_"), n))
        self._starts = sorted(best)
        self._names = [best[start] for start in self._starts]

    def find(self, address: int) -> tuple[str, int]:
        """Return the name and the offset from it; ``("", 0)`` if all are above."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return "", 0
        return self._names[index], address - self._starts[index]


class GuestMemory:
    """The memory of a guest, `data` by physical address, with the kernel that `system_map` is of.

    `modules` are (address, name) of the modules' symbols, as far as they are known. Raises
    `ProbeError` if this memory is not of that kernel, or the kernel not where it was linked.
    """

    def __init__(
        self,
        data: bytes | bytearray | mmap.mmap,
        system_map: Path,
        modules: Iterable[tuple[int, str]] = (),
    ) -> None:
        self._data = data
        self._symbols = _read_system_map(system_map)
        self._check(system_map)
        self._per_cpu_end = self._symbols["__per_cpu_end"]
        end = self._symbols["_end"]
        items = [(address, name) for name, address in self._symbols.items()]
        self._variables = _Names((a, n) for a, n in items if IMAGE <= a < end)
        self._per_cpu = _Names((a, n) for a, n in items if a < self._per_cpu_end)
        self._modules = _Names(modules)
        self._direct, self._vmalloc, self._vmemmap = (
            self._pointer(name) for name in ("page_offset_base", "vmalloc_base", "vmemmap_base")
        )
        if self._direct != DIRECT_MAP:
            raise ProbeError(
                f"the guest has its memory at {self._direct:#x}, not at {DIRECT_MAP:#x}",
                "boot it without KASLR, on a CPU without five levels of page tables (la57)",
            )
        self._areas = self._per_cpu_areas()
        self._pages = _Pages(len(self._data) // _PAGE, self._vmemmap)
        self.look()

    def look(self) -> None:
        """Look at the memory again: what `identify` says of pages is as of the last look.

        Pages come and go. Where one is free by then, it is what it was at an earlier look.
        """
        self._pages.look(self._records())

    def _records(self) -> npt.NDArray[np.uint64]:
        """Return a copy of the struct pages; zeros where there are none."""
        size = len(self._data) // _PAGE * _PAGE_STRUCT
        records = bytearray(size)
        # Mapped by large pages or small ones.
        for begin in range(0, size, _PAGE):
            at = self.physical(self._vmemmap + begin)
            if at is not None:
                records[begin : begin + _PAGE] = self._data[at : at + _PAGE]
        return np.frombuffer(records, "<u8").reshape(-1, _PAGE_STRUCT // 8)

    def _check(self, system_map: Path) -> None:
        missing = [name for name in _NEEDED if name not in self._symbols]
        if missing:
            raise ProbeError(
                f"{system_map} has no {missing[0]}", "give the System.map of a kernel of 6.12"
            )
        banner = self._symbols["linux_banner"] - IMAGE
        if self._data[banner : banner + 14] != b"Linux version ":
            raise ProbeError(
                f"the guest's kernel is not the one of {system_map}, or not where it was linked",
                "boot the vmlinux beside it, without KASLR, and wait until it is up",
            )

    # ---- reading -------------------------------------------------------------------------------

    def _word(self, physical: int) -> int | None:
        if not 0 <= physical <= len(self._data) - 8:
            return None
        return int(struct.unpack_from("<Q", self._data, physical)[0])

    def _pointer(self, symbol: str) -> int:
        return self._word(self._symbols[symbol] - IMAGE) or 0

    def physical(self, address: int) -> int | None:
        """Return where the kernel has mapped this address; None if it has not, or not in memory."""
        table = self._symbols["init_top_pgt"] - IMAGE
        for shift in (39, 30, 21, 12):
            entry = self._word(table + (address >> shift & 511) * 8)
            if entry is None or not entry & _PRESENT:
                return None
            table = entry & _ADDRESS_BITS
            if shift == 12 or (shift < 39 and entry & _LARGE):
                inside = (1 << shift) - 1
                return (table & ~inside) | (address & inside)
        return None

    def _at(self, address: int) -> int | None:
        physical = self.physical(address)
        return None if physical is None else self._word(physical)

    def _text(self, address: int) -> str:
        """Return the short printable text at this address, or nothing."""
        physical = self.physical(address)
        if physical is None:
            return ""
        raw = bytes(self._data[physical : physical + 64]).partition(b"\0")[0]
        return raw.decode("ascii") if raw.isascii() and raw.decode("ascii").isprintable() else ""

    # ---- what there is -------------------------------------------------------------------------

    def _per_cpu_areas(self) -> list[tuple[int, int]]:
        """Return begin and end of each CPU's area; one that is not there still has the template."""
        first = self._symbols["__per_cpu_offset"] - IMAGE
        begins = []
        for cpu in range(64):
            begin = self._word(first + 8 * cpu)
            if not begin or not self._direct <= begin < self._vmalloc:
                break
            begins.append(begin)
        begins.sort()
        gaps = [after - before for before, after in itertools.pairwise(begins)]
        # Alone, it is as large as its static part, and what follows is not told apart.
        size = min(gaps, default=-(-self._per_cpu_end // _PAGE) * _PAGE)
        return [(begin, begin + size) for begin in begins]

    @functools.cached_property
    def _cache_nodes(self) -> dict[int, str]:
        """Where the slab caches' list nodes are, and the name of each; nothing if one has none."""
        head = self._symbols["slab_caches"]
        nodes: dict[int, str] = {}
        node = self._at(head)
        while node and node != head and len(nodes) < _MAX_CACHES and node not in nodes:
            nodes[node] = self._text(self._at(node - 8) or 0)
            node = self._at(node)
        return nodes if all(nodes.values()) else {}

    @functools.cached_property
    def _list_offset(self) -> int | None:
        """Where the list node is in a struct kmem_cache; None if that is not certain.

        It is where the caches that slab pages name have a node of the list. Nine of ten are
        enough, for a record can have been seen half written; but no other offset may fit as many:
        caches lie side by side, so a neighbour's node is nearly always there, too.
        """
        caches = self._pages.cache
        named = [int(cache) for cache in np.unique(caches[caches != 0])]
        nodes = self._cache_nodes
        fits = {offset: sum(cache + offset in nodes for cache in named) for offset in _LIST_OFFSETS}
        best, second = sorted(fits, key=lambda offset: -fits[offset])[:2]
        certain = len(named) > 4 and fits[best] >= 0.9 * len(named) and fits[best] > fits[second]
        return best if certain else None

    def _cache(self, address: int) -> _Cache | None:
        """Return the cache whose struct kmem_cache is there, if one is."""
        if self._list_offset is None:
            return None
        name = self._cache_nodes.get(address + self._list_offset)
        size = self._at(address + _CACHE_SIZE_OFFSET)
        if name is None or size is None:
            return None
        return _Cache(name, size & 0xFFFFFFFF)

    @functools.cached_property
    def _tables(self) -> list[tuple[int, int, str]]:
        """Return begin, end and name of TCP's hash tables, which are no slab objects.

        From struct inet_hashinfo: a pointer that does not lead to the heap is left out.
        """
        base = self._symbols.get("tcp_hashinfo")
        if base is None:
            return []
        ehash, locks, masks, bhash, bhash2, sizes = (
            self._at(base + offset) or 0 for offset in (0, 8, 16, 32, 48, 56)
        )
        ports = sizes & 0xFFFFFFFF
        found = (
            (ehash, 8 * ((masks & 0xFFFFFFFF) + 1), "TCP's table of connections"),
            (locks, 4 * ((masks >> 32) + 1), "locks of TCP's table of connections"),
            (bhash, 16 * ports, "TCP's table of ports"),
            (bhash2, 16 * ports, "TCP's table of ports and addresses"),
        )
        return [
            (begin, begin + size, name)
            for begin, size, name in found
            if self._direct <= begin < self._vmemmap and size < len(self._data)
        ]

    # ---- what a line is ------------------------------------------------------------------------

    def identify(self, address: int) -> Thing:
        """Say what the kernel or a process has at this virtual address, as of now."""
        for begin, end, what in self._regions:
            if begin <= address < end:
                return what(address)
        return Thing("unknown", "unknown memory")

    @functools.cached_property
    def _regions(self) -> list[tuple[int, int, Callable[[int], Thing]]]:
        """Return begin, end and who knows what is there; of several that overlap, the first."""
        pages = self._vmemmap + len(self._data) // _PAGE * _PAGE_STRUCT
        return [
            (0, KERNEL_HALF, lambda _: Thing("user", "user memory")),
            (IMAGE, MODULES, self._variable),
            (MODULES, MODULES_END, self._module),
            (self._vmemmap, pages, self._record_of_a_page),
            *((begin, end, functools.partial(_table, name)) for begin, end, name in self._tables),
            *((*area, functools.partial(self._per_cpu_variable, area[0])) for area in self._areas),
            (self._direct, self._direct + len(self._data), self._heap),
            (self._vmalloc, self._vmemmap, lambda _: Thing("vmalloc", "vmalloc memory")),
        ]

    def _module(self, address: int) -> Thing:
        name, _ = self._modules.find(address)
        return Thing("module", name or "module")

    def _record_of_a_page(self, address: int) -> Thing:
        page = (address - self._vmemmap) // _PAGE_STRUCT
        return Thing("struct page", f"struct page of {self._page_name(page)}")

    def _variable(self, address: int) -> Thing:
        name, offset = self._variables.find(address)
        return Thing("variable", name, _down(offset))

    def _per_cpu_variable(self, begin: int, address: int) -> Thing:
        offset = address - begin
        if offset >= self._per_cpu_end:
            return Thing("per-CPU", "allocated per-CPU memory", _down(offset))
        name, inside = self._per_cpu.find(offset)
        return Thing("per-CPU", name, _down(inside))

    def _heap(self, address: int) -> Thing:
        physical = address - self._direct
        # The image is in the direct map as well; but what only the boot needed has been freed.
        if self._symbols["_text"] <= physical + IMAGE < self._symbols["__init_begin"]:
            return self._variable(physical + IMAGE)
        page = physical // _PAGE
        address_of_cache = int(self._pages.cache[page])
        if not address_of_cache:
            return Thing("page", self._page_name(page))
        cache = self._cache(address_of_cache)
        if cache is None:
            return Thing("slab", "slab objects of an unknown cache")
        inside = physical - int(self._pages.head[page]) * _PAGE
        return Thing("slab", cache.name, _down(inside % cache.size if cache.size else 0))

    def _page_name(self, page: int) -> str:
        address_of_cache = int(self._pages.cache[page])
        if address_of_cache:
            cache = self._cache(address_of_cache)
            return cache.name if cache else "slab"
        if self._pages.free[page]:
            return "free pages"
        return "page tables" if self._pages.table[page] else "pages"


_NEEDED = (
    *("linux_banner", "_text", "_end", "__init_begin", "__per_cpu_end", "__per_cpu_offset"),
    *("page_offset_base", "vmalloc_base", "vmemmap_base", "init_top_pgt", "slab_caches"),
)


def _table(name: str, _: int) -> Thing:
    return Thing("table", name)


def _down(offset: int) -> int:
    return offset // LINE_BYTES * LINE_BYTES


def _read_system_map(path: Path) -> dict[str, int]:
    """Return name -> address of all symbols; of several with one name, the first."""
    symbols: dict[str, int] = {}
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            word, _, name = line.split()
            symbols.setdefault(name, int(word, 16))
    except OSError as error:
        raise ProbeError(f"{path}: {error.strerror}", "build the kernel first") from error
    except ValueError as error:
        raise ProbeError(f"{path}: not a System.map", "build the kernel again") from error
    return symbols
