"""The stack probe: every instruction of the guest at its call path, seen from outside.

`stacks.c` follows calls, returns and interrupts without the guest's help; this module gives it
the functions' addresses and reads what it has counted::

    with StackProbe(4, sources.of_kernel(kernel)) as stacks:
        ...start QEMU with stacks.qemu_arguments()...
        stacks.set_modules(sources.of_module(ko, sections))
        before = stacks.read()
        ...
        (stacks.read() - before).paths()

The counts are those of the standard probe (see `probe.c` for what an instruction is), distributed.
"""

from __future__ import annotations

import fnmatch
import functools
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from grader.probe import stack_file
from grader.probe.errors import ProbeError
from grader.probe.files import PluginFiles
from grader.probe.loading import arguments
from grader.probe.sources import Function, Site
from grader.probe.stack_file import LABEL_FUNCTIONS, ROOT, STATE_NEW, Header, Kind

MAX_VCPUS = 64
# Booting alone takes some hundred thousand paths.
NODE_SLOTS = 1 << 20
# Functions of modules.
LATE_ROOM = 1 << 14

# What is no function of the kernel.
NONE = Site("[unknown caller]", "")
USER = Site("user", "")
UNKNOWN = Site("[unknown]", "")
LOST = Site("[lost]", "")

# Names that mean something for the stack, as patterns; the first that fits counts.
KINDS: tuple[tuple[str, Kind], ...] = (
    ("entry_SYSCALL_64", Kind.ENTRY),
    ("entry_SYSENTER_compat", Kind.ENTRY),
    ("entry_SYSCALL_compat", Kind.ENTRY),
    ("asm_int80_emulation", Kind.ENTRY),
    ("irq_entries_start", Kind.ENTRY),
    ("spurious_entries_start", Kind.ENTRY),
    ("asm_common_interrupt", Kind.ENTRY),
    ("asm_spurious_interrupt", Kind.ENTRY),
    ("asm_sysvec_*", Kind.ENTRY),
    ("asm_exc_*", Kind.ENTRY),
    ("common_interrupt_return", Kind.EXIT),
    ("error_return", Kind.EXIT),
    ("swapgs_restore_regs_and_return_to_usermode", Kind.EXIT),
    ("ret_from_fork_asm", Kind.TASK),
    ("__switch_to_asm", Kind.SWITCH),
    ("__switch_to", Kind.SWITCH),
    ("__x86_indirect_*", Kind.TRANSPARENT),
    ("__x86_return_thunk", Kind.TRANSPARENT),
    ("retbleed_*", Kind.TRANSPARENT),
    ("srso_*", Kind.TRANSPARENT),
    ("its_return_thunk", Kind.TRANSPARENT),
)

CallPath = tuple[Site, ...]


def kind_of(name: str) -> Kind:
    """Return what the function of this name means for the stack."""
    for pattern, kind in KINDS:
        if fnmatch.fnmatchcase(name, pattern):
            return kind
    return Kind.PLAIN


@dataclass(frozen=True, eq=False)
class StackReading:
    """One reading, or the difference of two: instructions by call path, over all vCPUs."""

    keys: npt.NDArray[np.uint64]
    """Of each node: its parent's place, and its label."""
    instructions: npt.NDArray[np.int64]
    """Of each node itself, without what it called."""
    entries: npt.NDArray[np.int64]
    """Of each node, how often its function was entered there."""
    labels: Mapping[int, Site]
    lost_frames: int
    """Calls that were too deep to follow: counted where they were called."""

    def __sub__(self, earlier: StackReading) -> StackReading:
        """Return what was counted since `earlier`, a reading of the same probe."""
        old = earlier.keys != 0
        if len(self.keys) != len(earlier.keys) or (self.keys != earlier.keys)[old].any():
            raise ProbeError(
                "these are readings of different probes", "subtract one of the same probe"
            )
        return StackReading(
            self.keys,
            self.instructions - earlier.instructions,
            self.entries - earlier.entries,
            self.labels,
            self.lost_frames - earlier.lost_frames,
        )

    @property
    def total(self) -> int:
        """All instructions, user code included."""
        return int(self.instructions.sum())

    def paths(self) -> Mapping[CallPath, int]:
        """Return call path (outermost first) -> instructions of its last function itself.

        Paths without instructions are left out.
        """

        @functools.cache
        def path(place: int) -> CallPath:
            key = int(self.keys[place])
            parent, label = key >> 32, key & 0xFFFFFFFF
            site = self.labels.get(label, UNKNOWN)
            return (*(path(parent) if parent != ROOT else ()), site)

        found: dict[CallPath, int] = {}
        for place in np.flatnonzero(self.instructions).tolist():
            # Counted at the root: transparent code that nobody called.
            name = (NONE,) if place == ROOT else path(place)
            found[name] = found.get(name, 0) + int(self.instructions[place])
        return MappingProxyType(found)

    def functions(self) -> Mapping[Site, tuple[int, int]]:
        """Return function -> how often it was entered, and the instructions of itself."""
        found: dict[Site, tuple[int, int]] = {}
        for place in np.flatnonzero((self.instructions != 0) | (self.entries != 0)).tolist():
            label = int(self.keys[place]) & 0xFFFFFFFF
            site = NONE if place == ROOT else self.labels.get(label, UNKNOWN)
            entries, instructions = found.get(site, (0, 0))
            found[site] = (
                entries + int(self.entries[place]),
                instructions + int(self.instructions[place]),
            )
        return MappingProxyType(found)


class StackProbe(PluginFiles):
    """The call paths of one QEMU process; a context manager, see `PluginFiles`.

    Counted is what the first `recorded` vCPUs execute (None: all).
    """

    plugin_name = "stacks"

    def __init__(
        self,
        vcpus: int,
        functions: Sequence[Function],
        qemu: Path | None = None,
        parent: Path | None = None,
        node_slots: int = NODE_SLOTS,
        recorded: int | None = None,
    ) -> None:
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ProbeError(f"the probe cannot count for {vcpus} vCPUs", f"use 1 to {MAX_VCPUS}")
        super().__init__(qemu, parent)
        self._vcpus = vcpus
        self._recorded = vcpus if recorded is None else recorded
        self._sites = [NONE, USER, UNKNOWN, LOST]
        self._labels = {site: label for label, site in enumerate(self._sites)}
        self._functions = self._rows(functions)
        self._node_slots = node_slots

    def _rows(self, functions: Iterable[Function]) -> list[tuple[int, int, int]]:
        rows = []
        for function in sorted(functions, key=lambda one: one.address):
            label, kind = stack_file.LABEL_UNKNOWN, Kind.PLAIN
            if function.site is not None:
                label = self._labels.setdefault(function.site, len(self._sites))
                kind = kind_of(function.site.name)
                if label == len(self._sites):
                    self._sites.append(function.site)
            rows.append((function.address, label, int(kind)))
        return rows

    def _make_files(self, folder: Path) -> mmap.mmap:
        counters = folder / "counters"
        counters.write_bytes(
            stack_file.new_file(self._vcpus, self._functions, LATE_ROOM, self._node_slots)
        )
        with counters.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)

    def _header(self) -> Header:
        header = Header.read(self._opened())
        if header.state != STATE_NEW:
            self._remove_folder()
        return header

    def qemu_arguments(self) -> list[str]:
        """Return the arguments with which QEMU, under ``-accel tcg``, loads this probe."""
        plugin_file, folder = self._to_load()
        options = {"recorded": self._recorded} if self._recorded < self._vcpus else {}
        return arguments(plugin_file, counters=folder / "counters", **options)

    @property
    def counting(self) -> bool:
        """Whether a QEMU has loaded the probe; from then on `read` works."""
        return self._header().state != STATE_NEW

    def set_modules(self, functions: Iterable[Function]) -> None:
        """Say which functions the loaded modules have; until then they are unknown.

        May be said again at any time while the guest runs, as modules come and go.
        """
        self._header()
        stack_file.write_late(self._opened(), self._rows(functions))

    def read(self) -> StackReading:
        """Return the counts now; take a reading that matters while the guest is idle."""
        header = self._header()
        nodes = stack_file.nodes(self._opened())
        counts = nodes["instructions"].astype(np.int64)
        counts.flags.writeable = False
        entries = nodes["entries"].astype(np.int64)
        entries.flags.writeable = False
        labels = dict(enumerate(self._sites))
        assert len(labels) >= LABEL_FUNCTIONS
        labelled = MappingProxyType(labels)
        return StackReading(nodes["key"], counts, entries, labelled, header.lost_frames)
