"""Variant -> Image -> booted machine with a probe: the place where one variant is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from grader import given
from grader.lab import LABS, Lab, known_labs, load_lab
from grader.machine import Machine, MachineConfig
from grader.probe import Probe, ProbeConfig, ProbeError, Symbols, sources
from grader.probe.locks import LockProbe
from grader.probe.sharing import SharingProbe
from grader.probe.stacks import StackProbe
from grader.progress import Progress
from grader.variant import Variant, lab_of, solution, solved_file, starter
from images.build import Image, build_image, build_programs
from kernel.build import (
    UAPI,
    Kernel,
    Module,
    build_kernel,
    build_limit,
    build_module,
    module_lab_files,
    source_key,
)

MEMORY_MIB = 512
# The debug kernel keeps shadow memory, and everything takes several times as long.
DEBUG_MEMORY_MIB = 768
DEBUG_SLOWNESS = 5.0
# Of exact runs: where they stand still to be read (a system call that nothing in the guest makes
# but images/guest/exact-clients.c), and how long it may take from one to the next.
MARK = "__x64_sys_personality"
MARK_SECONDS = 600.0
POLL_SECONDS = 0.02


class Stopped(Exception):
    """The run was given up by whoever started it."""


@dataclass(frozen=True)
class Built:
    """Everything that is made from a variant before a machine boots it."""

    variant: Variant
    kernel: Kernel
    module: Module
    limit: Module
    programs: Path
    image: Image


def kernel_files(lab: Lab, variant: Variant) -> Mapping[str, Path]:
    """Return the labs' files that go into the module: this lab's, and the others' as given."""
    files = {}
    for name in module_lab_files():
        if name in lab.kernel_files:
            files[name] = variant.files[name]
        else:
            files[name] = solved_file(lab_of(LABS, name), name)
    return files


def library_files(lab: Lab, variant: Variant) -> list[Path]:
    """Return the labs' files that go into libmegapipe: this lab's, and the others' as given."""
    files = []
    for name in known_labs():
        other = load_lab(name)
        for file in other.files:
            if other.has_code and file not in other.kernel_files:
                own = name == lab.name
                files.append(variant.files[file] if own else solved_file(other.folder, file))
    return files


@dataclass(frozen=True)
class Script:
    """What a machine in exact mode does by itself, with nobody outside to talk to."""

    command: str
    image: Image
    servers: int
    """How many of the vCPUs, the first ones, are the server's."""


def build(lab: Lab, variant: Variant, kernel: Kernel) -> Built:
    """Compile a variant; a student's mistake is a `ModuleError` or a `CompileError`."""
    module = build_module(kernel, kernel_files(lab, variant))
    library = library_files(lab, variant)
    limit = build_limit(kernel)
    programs = build_programs(library, UAPI, kernel.source / "include/uapi")
    image = build_image(programs, [module.ko, limit.ko])
    return Built(variant, kernel, module, limit, programs, image)


def build_solution(lab: Lab, progress: Progress) -> Built:
    """Compile the lab's solution, and whatever it needs, as the phase ``build``."""
    given.check_source(LABS, source_key())
    # A lab of answers builds the same whatever they are, and a handout has no solved ones.
    variant = solution(lab.folder) if lab.has_code else starter(lab.folder)
    with progress.phase("build"):
        return build(lab, variant, build_kernel(progress=progress))


def module_sections(machine: Machine, name: str) -> dict[str, int]:
    """Return section -> address of a module's code in the guest; nothing if it is not loaded."""
    output = machine.run(f"cd /sys/module/{name}/sections 2>/dev/null && grep -H . .text*").output
    lines = output.decode(errors="replace").splitlines()
    found = (line.partition(":") for line in lines)
    return {section: int(address, 16) for section, _, address in found if address}


def module_symbols(machine: Machine) -> list[tuple[int, str]]:
    """Return (address, name) of each symbol of the loaded modules: the guest's own word for it."""
    listed = machine.run("grep -F '[' /proc/kallsyms", cap=1 << 24).text
    found = (line.split() for line in listed.splitlines())
    return [(int(word, 16), name.partition(".")[0]) for word, _, name, _ in found]


class Station:
    """A variant, booted under TCG with the standard probe; a context manager.

    `start` begins the boot without waiting for it, so that several boot at a time. Without the
    probe (not `counted`) everything is faster, and has no cost. With `stacks`, the stack probe
    follows every call besides, with `sharing`, the sharing probe every access to memory, and
    everything is slower; with `locks`, for exact mode, the lock probe follows the kernel's locks.
    On the debug kernel, only its reports are counted.

    With a `script` the machine runs in exact mode: `start` it, go through its `marks`, and only
    then enter the ``with`` block, in which the agent can be asked what became of it.
    """

    def __init__(
        self,
        built: Built,
        vcpus: int = 4,
        name: str = "",
        memory_mib: int = 0,
        counted: bool = True,
        disk: Path | None = None,
        disk_bytes_per_second: int = 0,
        kernel_args: Sequence[str] = (),
        stacks: bool = False,
        sharing: bool = False,
        locks: bool = False,
        script: Script | None = None,
    ) -> None:
        self.built = built
        self.name = name or built.variant.name
        debug = built.kernel.debug
        memory_mib = memory_mib or (DEBUG_MEMORY_MIB if debug else MEMORY_MIB)
        self._probe: Probe | None = None
        if counted:
            symbols = Symbols.of_kernel(built.kernel.vmlinux)
            config = ProbeConfig.of_reports if debug else ProbeConfig.standard
            counting = config(vcpus, symbols)
            if script is not None:
                counting = replace(counting, mark=MARK)
            self._probe = Probe(counting, symbols)
        recorded = vcpus if script is None else script.servers
        self._stacks: StackProbe | None = None
        if stacks:
            self._stacks = StackProbe(vcpus, sources.of_kernel(built.kernel), recorded=recorded)
        self._sharing: SharingProbe | None = None
        if sharing:
            symbols = Symbols.of_kernel(built.kernel.vmlinux)
            self._sharing = SharingProbe(vcpus, memory_mib, symbols, recorded=recorded)
        self._locks: LockProbe | None = None
        if locks:
            self._locks = LockProbe(recorded, Symbols.of_kernel(built.kernel.vmlinux))
        self._config = MachineConfig(
            kernel=built.kernel.vmlinux,
            initramfs=built.image.initramfs if script is None else script.image.initramfs,
            exact=script is not None,
            command="" if script is None else script.command,
            vcpus=vcpus,
            memory_mib=memory_mib,
            disk=disk,
            disk_bytes_per_second=disk_bytes_per_second,
            kernel_args=tuple(kernel_args),
            symbols=(built.kernel.vmlinux, built.module.ko),
            slowness=DEBUG_SLOWNESS if debug else 1.0,
        )
        self._machine: Machine | None = None
        self._stack = ExitStack()

    def start(self) -> None:
        """Start the emulator; must be followed by ``with`` or by `close`."""
        with ExitStack() as stack:
            plugins: list[str] = []
            opened: list[Path] = []
            for probe in (self._probe, self._stacks, self._sharing, self._locks):
                if probe is not None:
                    stack.enter_context(probe)
                    plugins += probe.qemu_arguments()
                    opened += probe.opened
            config = replace(self._config, extra_qemu=tuple(plugins), opened=tuple(opened))
            self._machine = Machine(config)
            stack.callback(self._machine.close)
            self._machine.start()
            self._stack = stack.pop_all()

    def marks(self, count: int, stop: threading.Event) -> Iterator[int]:
        """Yield at each of the script's first `count` marks: the whole guest stands still there.

        It goes on when the next one is asked for. There are fewer if the script ends before. Raises
        `MachineError` if the guest does not get there, `Stopped` if `stop` has been set.
        """
        for number in range(count):
            limit = time.monotonic() + self.machine.scaled(MARK_SECONDS)
            while self.probe.marks <= number:
                self.machine.watch()
                if self.machine.speaks():
                    return
                if stop.wait(POLL_SECONDS):
                    raise Stopped
                if time.monotonic() > limit:
                    raise self.machine.hung("the script does not come to its next mark")
            yield number
            self.probe.pass_mark()

    @property
    def probe(self) -> Probe:
        """The counters of a station that is `counted`."""
        assert self._probe is not None
        return self._probe

    @property
    def stacks(self) -> StackProbe:
        """The call paths of a station with `stacks`; for its modules see `name_modules`."""
        assert self._stacks is not None
        return self._stacks

    @property
    def has_sharing(self) -> bool:
        """Whether this station has a sharing probe."""
        return self._sharing is not None

    @property
    def sharing(self) -> SharingProbe:
        """The transfers of a station with `sharing`; for its modules see `module_symbols`."""
        if self._sharing is None:
            raise ProbeError("this station has no sharing probe", "ask for it: sharing=True")
        return self._sharing

    @property
    def locks(self) -> LockProbe:
        """The locks of a station with `locks`."""
        if self._locks is None:
            raise ProbeError("this station has no lock probe", "ask for it: locks=True")
        return self._locks

    @property
    def machine(self) -> Machine:
        """The running machine."""
        assert self._machine is not None
        return self._machine

    def __enter__(self) -> Self:
        """Boot. Raises `MachineError` and leaves nothing if it does not get ready."""
        if self._machine is None:
            self.start()
        try:
            self.machine.__enter__()
            if self._stacks is not None and not self._config.exact:
                self.name_modules()
        except BaseException:
            self.close()
            raise
        return self

    def name_modules(self) -> None:
        """Tell the stack probe where the modules' functions are that the guest has loaded."""
        functions: list[sources.Function] = []
        for module in (self.built.module, self.built.limit):
            sections = module_sections(self.machine, module.ko.stem)
            functions += sources.of_module(module.ko, sections)
        self.stacks.set_modules(functions)

    def close(self) -> None:
        """End the machine; once is enough."""
        self._machine = None
        self._stack.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
