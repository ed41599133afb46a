"""What this machine has, lacks or has in a broken state, and what to do about each.

A check is a small function that looks at one thing and returns one or more `Finding`. It looks
by doing wherever that is possible: it links a program, loads the plugin into QEMU, boots a guest
under KVM, makes a tap in a namespace.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grader import cache, confined, container, given, setup
from grader.given import GivenError
from grader.lab import LABS
from grader.network import NetworkUnavailable, Sandbox
from grader.probe import PluginUnavailable, plugin
from kernel.build import DEBIAN_TARBALL, BuildError, source_key, tarball

GB = 10**9
# The kernel's source, unpacked and built once plainly and once with the checkers.
CACHE_BYTES = 6 * GB
CHECKOUT_BYTES = GB // 2
MEMORY_BYTES = 2 * GB
# The versions of QEMU that the project has been made for.
QEMU_OLDEST = (7, 2)
QEMU_NEWEST = 10
TUN = Path("/dev/net/tun")
KVM = Path("/dev/kvm")


class State(StrEnum):
    """How a thing stands. Only `MISSING` and `BROKEN` keep the project from working."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"
    BROKEN = "broken"

    @property
    def bad(self) -> bool:
        """Whether nothing can be graded with it."""
        return self in (State.MISSING, State.BROKEN)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `todo` is empty where there is nothing to do."""

    what: str
    state: State
    found: str
    todo: str = ""


Check = Callable[[], Iterable[Finding]]
STYLES = {State.OK: "green", State.WARN: "yellow", State.MISSING: "red", State.BROKEN: "red"}


def run(checks: Sequence[Check] | None = None, console: Console | None = None) -> int:
    """Print what the checks find; return 1 if something needed is missing or broken, else 0."""
    console = Console() if console is None else console
    findings = list(_examine(CHECKS if checks is None else checks, console))
    if console.is_terminal:
        console.print(table(findings))
        for finding in findings:
            if finding.todo:
                # Outside the table, so that a command to be copied is one line.
                title = Text(f"{finding.what}: ", style=STYLES[finding.state])
                console.print(title + Text(finding.todo), soft_wrap=True)
    bad = any(finding.state.bad for finding in findings)
    if bad:
        console.print("something is to be put right before anything can be graded")
    else:
        console.print("this machine can grade")
    return 1 if bad else 0


def _examine(checks: Sequence[Check], console: Console) -> Iterator[Finding]:
    """Carry the checks out; without a terminal, print each finding as it comes."""
    with console.status("looking at this machine") as status:
        for check in checks:
            status.update(f"looking at {check.__name__.replace('_', ' ')}")
            for finding in _guarded(check):
                if not console.is_terminal:
                    # Whole lines, for whoever searches them: no wrapping and no markup.
                    console.out(plain(finding), highlight=False)
                yield finding


def _guarded(check: Check) -> list[Finding]:
    name = check.__name__.replace("_", " ")
    try:
        return list(check())
    except Exception as error:
        # A doctor that falls over on a strange machine helps nobody: report it and go on.
        return [
            Finding(
                name,
                State.BROKEN,
                f"the check itself failed: {type(error).__name__}: {error}",
                "report this as an error of the project",
            )
        ]


def table(findings: Iterable[Finding]) -> Table:
    """Return the findings as a table for a terminal, without what to do."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    made.add_column("what", no_wrap=True)
    made.add_column("found", overflow="fold")
    for finding in findings:
        made.add_row(
            Text(finding.state, style=STYLES[finding.state]),
            Text(finding.what),
            Text(finding.found),
        )
    return made


def plain(finding: Finding) -> str:
    """Return a finding as lines of text, the first of which starts with its state."""
    blank = " " * 28
    found = finding.found.replace("\n", f"\n{blank}")
    todo = finding.todo.replace("\n", f"\n{blank}   ")
    line = f"{finding.state:<8} {finding.what:<18} {found}"
    return f"{line}\n{blank}-> {todo}" if todo else line


# ------------------------------------------------------------------------------------ checks


def python() -> Iterator[Finding]:
    """Look at the interpreter and at the packages pinned for it."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", State.OK, f"{version} ({sys.executable})")
    wrong = []
    pins = setup.pins(setup.ROOT / "pyproject.toml")
    for pin in pins:
        name, _, wanted = pin.partition("==")
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = "none"
        if there != wanted:
            wrong.append(f"{name} {there} instead of {wanted}")
    if wrong:
        yield Finding(
            "python packages",
            State.BROKEN,
            ", ".join(wrong),
            "run   python3 tasks.py doctor   which installs what is pinned",
        )
    else:
        yield Finding("python packages", State.OK, f"all {len(pins)} as pinned")


def packages() -> Iterator[Finding]:
    """Look at the Debian packages, or at what they provide where they are not."""
    versions = setup.debian_versions([package.name for package in setup.PACKAGES])
    lacking = []
    for package in setup.PACKAGES:
        version = versions.get(package.name)
        if setup.provided(package):
            yield Finding(package.name, State.OK, version or _where(package))
        elif version is not None and not package.modules:
            contents = ", ".join((*package.commands, *package.files))
            yield Finding(
                package.name,
                State.BROKEN,
                f"{version} is installed, but not all it holds is there: {contents}",
                setup.install_advice([package]).replace("install", "install --reinstall", 1),
            )
        elif package.optional:
            advice = setup.install_advice([package])
            yield Finding(package.name, State.WARN, f"not there; {package.reason}", advice)
        else:
            lacking.append(package)
            yield Finding(package.name, State.MISSING, package.reason)
    if lacking:
        yield Finding(
            "debian packages",
            State.MISSING,
            f"{len(lacking)} of {len(setup.PACKAGES)}",
            f"let   python3 tasks.py build   install them, or {setup.install_advice(lacking)}",
        )


def _where(package: setup.Package) -> str:
    if package.name == setup.KERNEL_SOURCE:
        return "KERNEL_TARBALL instead"
    paths = [shutil.which(command) or command for command in package.commands]
    return ", ".join((*paths, *package.files)) or "part of this Python"


def compiler() -> Iterator[Finding]:
    """Compile and link a static program, as the guest's are."""
    gcc = shutil.which("gcc")
    if gcc is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [gcc, "-static", "-x", "c", "-", "-o", f"{folder}/program"],
            input='#include <stdio.h>\nint main(void) { return puts("") == EOF; }\n',
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        yield Finding("compiler", State.OK, "links static programs")
    else:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        advice = setup.install_advice([p for p in setup.PACKAGES if p.name == "libc6-dev"])
        yield Finding("compiler", State.BROKEN, f"cannot link a static program: {last}", advice)


def kernel_source() -> Iterator[Finding]:
    """Look at the archive that the kernel is built from."""
    try:
        path = tarball()
    except BuildError as error:
        yield Finding("kernel source", State.MISSING, error.problem, error.todo)
    else:
        version = setup.debian_versions([setup.KERNEL_SOURCE]).get(setup.KERNEL_SOURCE, "")
        which = version if path == DEBIAN_TARBALL else "(KERNEL_TARBALL)"
        yield Finding("kernel source", State.OK, f"{path} {which}".rstrip())


def given_objects() -> Iterator[Finding]:
    """Look, in a handout, whether the labs' objects are for this source of the kernel."""
    if not setup.is_handout(setup.ROOT):
        return
    try:
        given.check_source(LABS, source_key())
    except GivenError as error:
        yield Finding("given objects", State.BROKEN, error.problem, error.todo)
    except BuildError:
        return  # there is no source at all, as has been said
    else:
        yield Finding("given objects", State.OK, "are for this source of the kernel")


def qemu() -> Iterator[Finding]:
    """Look at QEMU's version."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        return
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version (\d+)\.(\d+)\S*", done.stdout)
    if done.returncode != 0 or version is None:
        text = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        yield Finding("qemu", State.BROKEN, f"{path}: {text}", "reinstall qemu-system-x86")
        return
    found = f"{version[0].removeprefix('version ')} ({path})"
    number = (int(version[1]), int(version[2]))
    if number < QEMU_OLDEST:
        yield Finding("qemu", State.BROKEN, found, "use 7.2 or newer (Debian 12 has it)")
    elif number[0] > QEMU_NEWEST:
        yield Finding("qemu", State.WARN, found, "only 7.2 to 10 have been tried")
    else:
        yield Finding("qemu", State.OK, found)


def qemu_plugin() -> Iterator[Finding]:
    """Build the probe and let QEMU load it."""
    if shutil.which("qemu-system-x86_64") is None or shutil.which("gcc") is None:
        return
    try:
        plugin()
    except PluginUnavailable as error:
        yield Finding("qemu plugin", State.BROKEN, error.problem, error.todo)
    else:
        yield Finding("qemu plugin", State.OK, "QEMU loads the probe")


def kvm() -> Iterator[Finding]:
    """Boot a kernel under KVM: that the device opens proves nothing."""
    comfort = "nothing need be done: grading never uses KVM, only boot --kvm does"
    kernels = (cache.root() / "kernel").glob("[!.]*/vmlinux")
    newest = max(kernels, key=lambda path: path.stat().st_mtime, default=None)
    if KVM.exists() and newest is None:
        yield Finding(
            "kvm", State.WARN, f"{KVM} is there, but there is no kernel yet to try", comfort
        )
        return
    from grader.machine import kvm_works  # noqa: PLC0415  (it brings in all that a boot needs)

    works, why = kvm_works(newest or Path("/nonexistent"))
    if works:
        yield Finding("kvm", State.OK, "runs a kernel")
    else:
        yield Finding("kvm", State.WARN, why, comfort)


def tun() -> Iterator[Finding]:
    """Open the device that taps are made with."""
    if not TUN.exists():
        yield Finding("tun device", State.MISSING, f"no {TUN}", "run   sudo modprobe tun")
    elif not os.access(TUN, os.R_OK | os.W_OK):
        yield Finding(
            "tun device",
            State.BROKEN,
            f"{TUN} is not open to you",
            f"run   sudo chmod 0666 {TUN}   (as Debian itself sets it; lasts until the next start)",
        )
    else:
        yield Finding("tun device", State.OK, str(TUN))


def network() -> Iterator[Finding]:
    """Make a tap with two queues in namespaces of its own, as every run does."""
    if container.thrown_away():
        yield Finding("namespaces", State.OK, f"not used: {container.VARIABLE}=1, for --exact only")
        return
    try:
        with Sandbox() as sandbox:
            sandbox.add_tap(2)
    except NetworkUnavailable as error:
        yield Finding("namespaces", State.BROKEN, error.problem, error.todo)
    else:
        yield Finding("namespaces", State.OK, "a tap with two queues was made in one")


def confinement() -> Iterator[Finding]:
    """Run something where students' files are compiled."""
    try:
        done = confined.run(["gcc", "--version"], {}, [])
    except confined.Unavailable as error:
        yield Finding("confinement", State.BROKEN, error.problem, error.todo)
        return
    if done.status == 0:
        yield Finding("confinement", State.OK, "gcc runs apart from the rest of the machine")
    else:
        yield Finding(
            "confinement",
            State.BROKEN,
            f"gcc does not run apart from the rest of the machine: {done.text.strip()}",
            "use the gcc of your distribution: only what lies below /usr is seen there",
        )


def disk() -> Iterator[Finding]:
    """Look at the room for what is built and for the checkout."""
    folder = cache.root()
    free = shutil.disk_usage(folder).free
    need = CACHE_BYTES
    # What has been built already need not find room again; counted only where it matters.
    if free < need:
        need = max(GB // 2, need - disk_usage(folder))
    yield _room("disk (cache)", folder, free, need, "XDG_CACHE_HOME=/another/place")
    free = shutil.disk_usage(setup.ROOT).free
    yield _room("disk (checkout)", setup.ROOT, free, CHECKOUT_BYTES, "a checkout elsewhere")


def _room(what: str, folder: Path, free: int, need: int, way_out: str) -> Finding:
    found = f"{free / GB:.1f} GB free in {folder}, {need / GB:.1f} needed"
    if free < need:
        return Finding(what, State.BROKEN, found, f"free some, or use {way_out}")
    return Finding(what, State.OK, found)


def disk_usage(folder: Path) -> int:
    """Return how many bytes of disk the files below a folder take."""
    total = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118
            except FileNotFoundError:
                continue  # somebody else is at work here
    return total


def memory() -> Iterator[Finding]:
    """Look at the memory that is free for a guest and a compiler."""
    there = psutil.virtual_memory()
    found = f"{there.available / GB:.1f} of {there.total / GB:.1f} GB available"
    if there.available < MEMORY_BYTES:
        need = f"{MEMORY_BYTES / GB:.0f} GB"
        yield Finding("memory", State.WARN, found, f"close other programs; {need} are comfortable")
    else:
        yield Finding("memory", State.OK, found)


def cores() -> Iterator[Finding]:
    """Look at the processors that this process may use."""
    count = len(os.sched_getaffinity(0))
    if count < 2:
        yield Finding("cores", State.WARN, str(count), "it works, but takes twice as long")
    else:
        yield Finding("cores", State.OK, str(count))


CHECKS: tuple[Check, ...] = (
    python,
    packages,
    compiler,
    kernel_source,
    given_objects,
    qemu,
    qemu_plugin,
    kvm,
    tun,
    network,
    confinement,
    disk,
    memory,
    cores,
)
