"""The probe: counts taken from outside the guest, by a QEMU TCG plugin.

`probe.c` counts, per vCPU, user and kernel instructions and the entries of chosen kernel
functions; this module builds it for the QEMU at hand, finds the functions' addresses in the
kernel that was built, and reads the counters while the guest runs::

    symbols = Symbols.of_kernel(vmlinux)
    with Probe(ProbeConfig.standard(4, symbols), symbols) as probe:
        ...start QEMU with probe.qemu_arguments()...
        before = probe.read()
        ...
        cost = probe.read() - before

Addresses hold only in a guest whose kernel runs where it was linked: boot with ``nokaslr``.
What an instruction is depends on QEMU's version and the CPU model; see the head of `probe.c`.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grader.probe.counted import EVENTS, REPORTERS, STANDARD, Counted, select
from grader.probe.counters import (
    PASSED,
    PASSED_OFFSET,
    STATE_ENDED,
    STATE_NEW,
    Counters,
    Header,
    Total,
    new_file,
    parse,
)
from grader.probe.errors import PluginUnavailable, ProbeError, UnknownSymbol
from grader.probe.files import PluginFiles
from grader.probe.loading import arguments, plugin
from grader.probe.symbols import Symbols

__all__ = [
    "EVENTS",
    "REPORTERS",
    "STANDARD",
    "Counted",
    "Counters",
    "PluginUnavailable",
    "Probe",
    "ProbeConfig",
    "ProbeError",
    "Symbols",
    "Total",
    "UnknownSymbol",
    "parse",
    "plugin",
    "select",
]

# As in probe.c.
MAX_VCPUS = 64
MAX_FUNCTIONS = 512
MAX_ADDRESSES = 4096
COUNTER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


@dataclass(frozen=True)
class ProbeConfig:
    """What to count: for up to `vcpus` vCPUs, each counter's function names (or patterns)."""

    vcpus: int
    functions: Mapping[str, Sequence[str]]
    instructions: bool = True
    """False: functions only, at next to no cost in time."""
    mark: str = ""
    """A kernel function at whose entry the guest stands still until `Probe.pass_mark`."""

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ProbeError(
                f"the probe cannot count for {self.vcpus} vCPUs", f"use 1 to {MAX_VCPUS}"
            )
        if len(self.functions) > MAX_FUNCTIONS:
            raise ProbeError(f"{len(self.functions)} counters", f"use at most {MAX_FUNCTIONS}")
        for name, symbols in self.functions.items():
            if not COUNTER_NAME.fullmatch(name):
                raise ProbeError(
                    f"{name!r} cannot name a counter", "use letters, digits, _ . - only"
                )
            if isinstance(symbols, str) or not symbols:
                raise ProbeError(f"counter {name} counts nothing", "give a list of function names")

    @classmethod
    def standard(cls, vcpus: int, symbols: Symbols) -> ProbeConfig:
        """Count the `STANDARD` set, as far as this kernel has it."""
        return cls(vcpus, select(STANDARD, symbols))

    @classmethod
    def of_reports(cls, vcpus: int, symbols: Symbols) -> ProbeConfig:
        """Count what a kernel calls to report a bug, `REPORTERS`, and nothing else."""
        return cls(vcpus, select(REPORTERS, symbols), instructions=False)


class Probe(PluginFiles):
    """The counters of one QEMU process; a context manager, see `PluginFiles`."""

    plugin_name = "probe"

    def __init__(
        self,
        config: ProbeConfig,
        symbols: Symbols,
        qemu: Path | None = None,
        parent: Path | None = None,
    ) -> None:
        super().__init__(qemu, parent)
        self.config = config
        self._names = tuple(config.functions)
        self._addresses = {name: symbols.resolve(config.functions[name]) for name in self._names}
        self._mark = symbols.resolve([config.mark]) if config.mark else ()
        if sum(map(len, self._addresses.values())) > MAX_ADDRESSES:
            raise ProbeError(f"more than {MAX_ADDRESSES} addresses", "use narrower patterns")

    @property
    def addresses(self) -> Mapping[str, tuple[int, ...]]:
        """The addresses that each counter counts."""
        return self._addresses

    def _make_files(self, folder: Path) -> mmap.mmap:
        counters = folder / "counters"
        counters.write_bytes(new_file(self.config.vcpus, len(self._names)))
        with (folder / "functions").open("w") as lines:
            for name, addresses in self._addresses.items():
                lines.writelines(f"{address:x} {name}\n" for address in addresses)
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
        options = {} if self.config.instructions else {"instructions": "off"}
        if self._mark:
            options["mark"] = f"{self._mark[0]:x}"
        return arguments(
            plugin_file, counters=folder / "counters", functions=folder / "functions", **options
        )

    @property
    def counting(self) -> bool:
        """Whether a QEMU has loaded the probe; from then on `read` works."""
        return self._header().state != STATE_NEW

    @property
    def ended(self) -> bool:
        """Whether that QEMU has exited in an orderly way (not so if it was killed)."""
        return self._header().state == STATE_ENDED

    @property
    def marks(self) -> int:
        """How many marks the guest has reached; it stands still at the last unless it is passed."""
        return self._header().marks

    def pass_mark(self) -> None:
        """Let the guest go on from the mark that it has reached."""
        header = self._header()
        if header.passed < header.marks:
            PASSED.pack_into(self._opened(), PASSED_OFFSET, header.marks)

    def read(self) -> Counters:
        """Return the counters now; they survive the end of QEMU until the probe is closed.

        Each is read whole, but not all at one moment: take a reading that matters while the
        guest is idle. Before the guest's kernel runs in its own half, everything counts as user.
        """
        self._header()
        return parse(self._opened(), self._names)
