"""Which function each address of the kernel's code belongs to, and which file defines it.

The kernel is built without debug information. Its symbol table says which object's local symbols
belong together and what that object's source is called (``core.c``, which is the name of dozens);
universal-ctags says which files define which functions. Together they tell which ``core.c`` was
linked. A global function is looked for in those files only; one that a macro makes, so that ctags
does not see it, belongs to the file of its neighbours in memory.
"""

from __future__ import annotations

import bisect
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from grader import cache
from grader.probe.errors import ProbeError
from grader.probe.symbols import KERNEL_HALF
from kernel.build import Kernel

CTAGS = "ctags-universal"
# What the kernel of a server is made of. Of drivers/ see DRIVERS.
FOLDERS = (
    "arch/x86", "block", "crypto", "fs", "init", "io_uring", "ipc", "kernel", "kernel/sched",
    "lib", "mm", "net", "security", "virt",
)  # fmt: skip
# Of the drivers only what the machine has.
# Of these all files count, not only those with an object: one includes others.
INCLUDED_FROM = ("kernel/sched",)
# What those folders have that is never linked into the kernel for x86-64.
NOT_LINKED = ("arch/x86/boot", "arch/x86/um", "arch/x86/purgatory", "arch/x86/realmode")
DRIVERS = ("acpi", "base", "char", "clocksource", "cpuidle", "irqchip", "md", "net/virtio_net.c",
           "pci", "tty", "virtio")  # fmt: skip
# Functions that the kernel's macros define, as ctags patterns of language, pattern and name.
MACROS = (
    ("C", r"^(COMPAT_)?SYSCALL_DEFINE[0-6]\((\w+)", r"__x64_sys_\2"),
    ("C", r"^DEFINE_IDTENTRY\w*\((\w+)", r"\1"),
    ("Asm", r"^SYM_[A-Z_]*(START|ALIAS)[A-Z_]*\((\w+)", r"\2"),
)
# Words before a function's name that ctags would take for the name.
IGNORED = (
    "__init,__exit,noinline,notrace,__latent_entropy,__lockfunc,__sched,__cpuidle,__visible,"
    "noinstr,asmlinkage,__must_check,__pure,__irq_entry,__softirq_entry,__weak,__ref,__always_inline"
)
# Clones that only differ in how they were compiled; .part is a function of its own.
_COPY = re.compile(r"\.(?:isra|constprop|cold|llvm)(?:\.\d+)?")
_RECIPE = "1"


class Site(NamedTuple):
    """A function by its name, and the file that defines it, relative to the kernel's source.

    A module's functions are in ``<module>/``. What is no function has no file: see `stacks`.
    """

    name: str
    file: str


@dataclass(frozen=True)
class Function:
    """Code from `address` up to the next function; without a site, nothing known follows."""

    address: int
    site: Site | None


@dataclass(frozen=True)
class Symbol:
    """A text symbol of the kernel."""

    name: str
    address: int
    file: str
    """What the object's source is called; empty for a global symbol."""
    group: int
    """The object, by its number in the symbol table; -1 for a global symbol."""
    rank: int
    """Of several names for one address, the lowest is taken."""


def of_kernel(kernel: Kernel) -> tuple[Function, ...]:
    """Return the kernel's functions by address, from the cache.

    Errors: `ProbeError` if ctags is not there.
    """
    key = cache.digest(_RECIPE, kernel.key, Path(__file__))

    def make(folder: Path) -> None:
        symbols, objects, ends = _symbols(kernel.vmlinux)
        tags = _tags(kernel.source, objects)
        rows = [[f.address, *(f.site or ())] for f in place(symbols, tags, ends)]
        (folder / "functions.json").write_text(json.dumps(rows))

    rows = json.loads((cache.entry("functions", key, make) / "functions.json").read_text())
    return tuple(Function(row[0], Site(*row[1:]) if row[1:] else None) for row in rows)


def of_module(ko: Path, sections: Mapping[str, int]) -> tuple[Function, ...]:
    """Return the functions of a loaded module whose `sections` lie at these addresses."""
    found: dict[int, tuple[int, str]] = {}
    ends = []
    with ko.open("rb") as file:
        elf: Any = ELFFile(file)
        numbers = {}
        for number, section in enumerate(elf.iter_sections()):
            # SHF_EXECINSTR; the code of the module's beginning is gone when it runs.
            if section["sh_flags"] & 4 and section.name in sections:
                numbers[number] = sections[section.name]
                ends.append(sections[section.name] + section["sh_size"])
        for symbol in elf.get_section_by_name(".symtab").iter_symbols():
            where = symbol["st_shndx"]
            if where in numbers and symbol["st_info"]["type"] == "STT_FUNC":
                address = numbers[where] + symbol["st_value"]
                rank = int(symbol["st_info"]["bind"] == "STB_LOCAL")
                choice = (rank, symbol.name)
                found[address] = min(found.get(address, choice), choice)
    folder = f"{ko.stem}/"
    known = {address: Site(plain(name), folder) for address, (_, name) in found.items()}
    return _sealed(known, ends)


def plain(name: str) -> str:
    """Return a function's name without the compiler's suffixes that mean nothing here."""
    return _COPY.sub("", name)


def _sealed(known: Mapping[int, Site], ends: Iterable[int]) -> tuple[Function, ...]:
    gaps = {end: None for end in ends if end not in known}
    return tuple(Function(*item) for item in sorted({**known, **gaps}.items()))


def _symbols(vmlinux: Path) -> tuple[list[Symbol], set[str], list[int]]:
    """Return the text symbols of an unstripped kernel, its objects, and where its code ends."""
    try:
        with vmlinux.open("rb") as file:
            elf: Any = ELFFile(file)
            text = {
                number: section["sh_addr"] + section["sh_size"]
                for number, section in enumerate(elf.iter_sections())
                if section["sh_flags"] & 4 and section["sh_addr"] & KERNEL_HALF
            }
            table = list(elf.get_section_by_name(".symtab").iter_symbols())
    except (OSError, ELFError, AttributeError) as error:
        raise ProbeError(
            f"{vmlinux}: not a kernel with symbols ({error})", "give the vmlinux of the build"
        ) from error
    found = []
    objects = set()
    name, group = "", -1
    for symbol in table:
        info = symbol["st_info"]
        if info["type"] == "STT_FILE":
            name, group = symbol.name, group + 1
            objects.add(name)
        elif symbol["st_shndx"] in text and (
            info["type"] == "STT_FUNC" or (info["type"] == "STT_NOTYPE" and symbol["st_size"])
        ):
            # Padding before a function, never executed.
            if symbol.name.startswith("__pfx_"):
                continue
            local = info["bind"] == "STB_LOCAL"
            underscores = len(symbol.name) - len(symbol.name.lstrip("_"))
            rank = 2 * underscores + (info["type"] != "STT_FUNC") + 100 * local
            found.append(
                Symbol(
                    symbol.name,
                    symbol["st_value"],
                    name if local else "",
                    group if local else -1,
                    rank,
                )
            )
    return found, objects, sorted(text.values())


def _tags(source: Path, names: set[str]) -> dict[str, set[str]]:
    """Return function name -> files that define it, of the source files with these names."""
    program = shutil.which(CTAGS)
    if program is None:
        raise ProbeError(f"{CTAGS} not found", "install Debian's package universal-ctags")
    wanted = {_source_file(name) for name in names}
    files: set[Path] = set()
    for folder in (*FOLDERS, *(f"drivers/{driver}" for driver in DRIVERS)):
        place_ = source / folder
        found = place_.rglob("*.[cS]") if place_.is_dir() else [place_]
        included = folder in INCLUDED_FROM
        files.update(path for path in found if included or path.name in wanted)
    relative = sorted(str(path.relative_to(source)) for path in files)
    listed = "".join(f"{path}\n" for path in relative if not path.startswith(NOT_LINKED))
    command = [program, "--options=NONE", "--languages=C,Asm", "--map-Asm=+.S"]
    command += ["--kinds-C=f", "--kinds-Asm=l", "--fields=", "--excmd=number", "--sort=no"]
    command += [f"--regex-{lang}=/{pattern}/{name}/f/" for lang, pattern, name in MACROS]
    command += ["-I", IGNORED, "-f", "-", "-L", "-"]
    run = subprocess.run(
        command, cwd=source, input=listed, capture_output=True, text=True, check=False
    )
    if run.returncode or "\t" not in run.stdout:
        raise ProbeError(
            f"{program} does not read the kernel's source: {run.stderr.strip()[-500:]}",
            "install Debian's package universal-ctags",
        )
    tags: dict[str, set[str]] = {}
    for line in run.stdout.splitlines():
        if not line.startswith("!"):
            name, file, *_ = line.split("\t")
            tags.setdefault(name, set()).add(file)
    return tags


def place(
    symbols: Sequence[Symbol], tags: Mapping[str, set[str]], ends: Iterable[int]
) -> tuple[Function, ...]:
    """Return the functions with their files: see the head of this module."""
    groups: dict[int, list[Symbol]] = {}
    for symbol in symbols:
        if symbol.group >= 0:
            groups.setdefault(symbol.group, []).append(symbol)
    by_name: dict[str, list[str]] = {}
    for files in tags.values():
        for file in files:
            by_name.setdefault(Path(file).name, []).append(file)
    chosen = {number: _file_of(group, tags, by_name) for number, group in groups.items()}
    linked = set(chosen.values())

    best: dict[int, Symbol] = {}
    for symbol in symbols:
        known = best.get(symbol.address)
        if known is None or (symbol.rank, symbol.name) < (known.rank, known.name):
            best[symbol.address] = symbol
    files_at: dict[int, str] = {}
    open_: dict[int, set[str]] = {}
    for address, symbol in best.items():
        defined = tags.get(_source_name(symbol.name), set())
        if symbol.group >= 0 and (file := chosen[symbol.group]):
            files_at[address] = file
            continue
        candidates = (defined & linked) or defined
        if len(candidates) == 1:
            (files_at[address],) = candidates
        else:
            open_[address] = candidates
    anchors = sorted(files_at)
    for address, candidates in open_.items():
        files_at[address] = _by_neighbours(address, candidates, anchors, files_at)
    sites = {a: Site(plain(symbol.name), files_at[a]) for a, symbol in best.items()}
    return _sealed(sites, ends)


def _source_file(name: str) -> str:
    # Of assembly the symbol table names the object.
    return f"{name.removesuffix('.o')}.S" if name.endswith(".o") else name


def _source_name(name: str) -> str:
    # A clone is called as its function; of a system call the source has only the number's name.
    return re.sub(r"^__(?:ia32|se|do)_sys_", "__x64_sys_", name.partition(".")[0])


def _file_of(
    group: Sequence[Symbol], tags: Mapping[str, set[str]], by_name: Mapping[str, Sequence[str]]
) -> str:
    """Return the source that defines most of an object's own functions; empty if none does."""
    name = _source_file(group[0].file)
    score: dict[str, int] = {}
    for symbol in group:
        for file in tags.get(_source_name(symbol.name), ()):
            if Path(file).name == name:
                score[file] = score.get(file, 0) + 1
    if score:
        return min(score, key=lambda file: (-score[file], file))
    files = set(by_name.get(name, ()))
    return files.pop() if len(files) == 1 else ""


def _by_neighbours(
    address: int, candidates: set[str], anchors: Sequence[int], files_at: Mapping[int, str]
) -> str:
    """Return the file of what lies before or behind, a candidate if there are any."""
    at = bisect.bisect(anchors, address)
    before = [files_at[anchors[at - 1]]] if at else []
    behind = [files_at[anchors[at]]] if at < len(anchors) else []
    for file in before + behind:
        if file in candidates:
            return file
    if candidates:
        return min(candidates)
    return (before or behind or [""])[0]
