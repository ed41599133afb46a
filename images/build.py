"""Build what runs inside the guest: its programs, and the initramfs that carries them.

Both are entries of the cache, under a key of all that goes into them. Neither needs root.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from grader import cache, confined, given, rules
from grader.errors import UserError

GUEST = Path(__file__).parent / "guest"

# The guest runs a newer kernel than the one whose headers a distribution ships. These come from
# its source: each stands alone, so it needs nothing of what `make headers_install` does.
KERNEL_HEADERS = ("linux/io_uring.h",)

# Only in images for exact runs: every boot unpacks what is there.
_EXACT_SCRIPT = "exact"
_EXACT_PROGRAMS = ("exact-clients",)

# A file's time is part of the archive; any fixed one makes its bytes repeat.
_EPOCH = 1_000_000_000
# Goes into the image's key: raise it when the steps below change what they make.
_RECIPE = "2"


class BuildError(UserError):
    """The guest cannot be built, for a reason that has nothing to do with anybody's C."""


class CompileError(Exception):
    """A C file does not compile or link, or breaks the rules.

    `what` names what was being built, `text` is the compiler's own output, with the paths that
    the caller gave, or what `grader.rules` says.
    """

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what} does not compile:\n{text}")
        self.what = what
        self.text = text


@dataclass(frozen=True)
class Image:
    """An initramfs: the file, and the key of its content."""

    initramfs: Path
    key: str


def build_programs(
    library_sources: Sequence[Path], header_dir: Path, kernel_uapi: Path | None = None
) -> Path:
    """Return a folder whose ``bin/`` holds the guest's programs, statically linked.

    `library_sources` are the C files of libmegapipe that lie outside its own folder (a
    student's), or folders of given objects. `header_dir` is where the kernel's interface,
    megapipe.h, lies. `kernel_uapi` is include/uapi of the kernel's source, from which
    `KERNEL_HEADERS` are taken. Raises `CompileError` if a file does not compile, `BuildError` if
    a tool is missing, `grader.given.GivenError` if no object fits.
    """
    kernel_headers = {name: kernel_uapi / name for name in KERNEL_HEADERS} if kernel_uapi else {}
    for path in (*library_sources, header_dir, *kernel_headers.values()):
        if not path.exists():
            raise BuildError(
                f"{path} does not exist", "the guest's programs need it: check the path"
            )
    fitting = made_for(header_dir)
    library_sources = [given.choose(path, fitting) for path in library_sources]
    if len({source.name for source in library_sources}) < len(library_sources):
        raise BuildError("two library sources have the same file name", "rename one")
    parts: list[str | bytes | Path] = [_compiler(), rules.key()]
    for path in _sources(GUEST):
        parts += [str(path.relative_to(GUEST)), path]
    for source in library_sources:
        parts += [source.name, source]
    for header in sorted(header_dir.glob("*.h")):
        parts += [header.name, header]
    for name, header in kernel_headers.items():
        parts += [name, header]
    return cache.entry(
        "programs",
        cache.digest(*parts),
        functools.partial(_make_programs, tuple(library_sources), header_dir, kernel_headers),
    )


def made_for(header_dir: Path) -> dict[str, str]:
    """Return what an object of the library is compiled against: see `grader.given`.

    Not the compiler and not the C library: how functions call each other is the platform's ABI.
    """
    headers = [*sorted((GUEST / "libmegapipe").glob("*.h")), *sorted(header_dir.glob("*.h"))]
    named = (part for path in headers for part in (path.name, path))
    return {given.LIBRARY_HEADERS: cache.digest(*named)}


def library_object(programs: Path, source: Path) -> Path:
    """Return the object that `build_programs` has made of one of its library sources."""
    return programs / "obj" / "given" / f"{source.stem}.o"


def _sources(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix in {".c", ".h"} or path.name == "Makefile")
    )


@functools.cache
def _compiler() -> str:
    """Return what identifies the compiler and the C library that it links statically."""
    version = _tool(["gcc", "--version"]).stdout
    libc = Path(_tool(["gcc", "-print-file-name=libc.a"]).stdout.strip())
    if not libc.is_absolute():
        raise BuildError("there is no static C library", "Debian: apt install libc6-dev")
    return version + cache.digest(libc)


def _make_programs(
    library_sources: Sequence[Path],
    header_dir: Path,
    kernel_headers: Mapping[str, Path],
    folder: Path,
) -> None:
    words = {path.name: path.read_bytes() for path in library_sources if path.suffix == ".c"}
    if broken := rules.check_sources(words):
        raise CompileError("the guest's userland", broken)
    # The names that make sees, and where these files lie.
    places = {f"guest/{path.relative_to(GUEST)}": path for path in _sources(GUEST)}
    places |= {f"headers/{path.name}": path for path in header_dir.glob("*.h")}
    places |= {f"kernel/{name}": path for name, path in kernel_headers.items()}
    places |= {f"given/{path.name}": path for path in library_sources}
    objects = {path.name: f"obj/given/{path.stem}.o" for path in library_sources}
    jobs = len(os.sched_getaffinity(0))
    done = confined.run(
        [
            *("make", "--silent", "--no-print-directory", f"-j{jobs}", "--output-sync=target"),
            *("-f", "guest/Makefile", "S=guest", "O=.", "HEADERS=headers"),
            "KERNEL=kernel" if kernel_headers else "KERNEL=",
            "LIBRARY=" + " ".join(f"given/{source.name}" for source in library_sources),
        ],
        {name: path.read_bytes() for name, path in places.items()},
        outputs=("bin/*", *objects.values()),
    )
    if done.status:
        known = "|".join(re.escape(name) for name in sorted(places, key=len, reverse=True))
        text = re.sub(known, lambda match: str(places[match[0]]), done.explained)
        raise CompileError("the guest's userland", text)
    made = {name: done.files[objects[name]] for name in words}
    if broken := rules.check_objects(words, made):
        raise CompileError("the guest's userland", broken)
    for name, content in done.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        if target.parent.name == "bin":
            target.chmod(0o755)


def build_image(programs: Path, modules: Sequence[Path], clients: Sequence[Path] = ()) -> Image:
    """Return an initramfs with busybox, the init script, `programs`/bin/* and kernel modules.

    With `clients`, statically linked programs, the image is one for exact runs: they and what
    runs them are in it, too.

    The archive is not compressed: QEMU hands it over in memory, and unpacking it would be the
    guest's work, at the emulator's speed.
    """
    busybox = _busybox()
    parts: list[str | bytes | Path] = [_RECIPE, GUEST / "init", busybox, programs / "bin", _cpio()]
    parts += modules
    if clients:
        parts += [GUEST / _EXACT_SCRIPT, *clients]
    key = cache.digest(*parts)
    folder = cache.entry(
        "image", key, functools.partial(_make_image, busybox, programs, modules, clients)
    )
    return Image(folder / "initramfs", key)


_BUSYBOX = "Debian: apt install busybox-static"


def _busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise BuildError("busybox is missing", _BUSYBOX)
    path = Path(found)
    if b"\x7fELF" not in path.read_bytes()[:4] or _needs_interpreter(path):
        raise BuildError(
            f"{path} is not statically linked, and the guest has no libraries", _BUSYBOX
        )
    return path


def _needs_interpreter(path: Path) -> bool:
    with path.open("rb") as file:
        return any(segment["p_type"] == "PT_INTERP" for segment in ELFFile(file).iter_segments())


@functools.cache
def _cpio() -> str:
    return _tool(["cpio", "--version"]).stdout


def _make_image(
    busybox: Path,
    programs: Path,
    modules: Sequence[Path],
    clients: Sequence[Path],
    folder: Path,
) -> None:
    stage = folder / "stage"
    for name in ("bin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (stage / name).mkdir(parents=True)
    # Scripts of the guest look for their interpreter, and people for their tools, there too.
    (stage / "sbin").symlink_to("bin")
    (stage / "usr").symlink_to(".")
    # Tools print names, not numbers, and some refuse to run for a user who has none.
    _write(stage / "etc/passwd", "root::0:0:root:/tmp:/bin/sh\nlab::1000:1000:lab:/tmp:/bin/sh\n")
    _write(stage / "etc/group", "root::0:\ntty::5:\nlab::1000:\n")

    _copy(busybox, stage / "bin/busybox", 0o755)
    for applet in _tool([str(busybox), "--list"]).stdout.split():
        if applet != "busybox":
            (stage / "bin" / applet).symlink_to("busybox")
    for program in (*sorted((programs / "bin").iterdir()), *clients):
        if program.name in _EXACT_PROGRAMS and not clients:
            continue
        target = stage / "bin" / program.name
        target.unlink(missing_ok=True)
        _copy(program, target, 0o755)
    _copy(GUEST / "init", stage / "init", 0o755)
    if clients:
        _copy(GUEST / _EXACT_SCRIPT, stage / "bin" / _EXACT_SCRIPT, 0o755)
    for module in modules:
        # Nine tenths of it are for debuggers, which read the original outside.
        _tool(["objcopy", "--strip-debug", str(module), str(stage / module.name)])
        (stage / module.name).chmod(0o644)

    # The kernel brings /dev/console itself, and init mounts devtmpfs over it: no node is needed
    # in the archive, and so no privilege to make one.
    entries = sorted(path.relative_to(stage) for path in stage.rglob("*"))
    for entry in entries:
        path = stage / entry
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
        os.utime(path, (_EPOCH, _EPOCH), follow_symlinks=False)
    archive = folder / "initramfs"
    with archive.open("wb") as output:
        packed = subprocess.run(
            [
                *("cpio", "--quiet", "--create", "--null"),
                *("--format=newc", "--reproducible", "--owner=+0:+0"),
            ],
            input=b"\0".join(os.fsencode(entry) for entry in entries) + b"\0",
            stdout=output,
            stderr=subprocess.PIPE,
            cwd=stage,
            check=False,
        )
    if packed.returncode != 0:
        raise BuildError(
            f"cpio failed: {packed.stderr.decode(errors='replace')}", "is the disk full?"
        )
    shutil.rmtree(stage)


def _copy(source: Path, target: Path, mode: int) -> None:
    shutil.copyfile(source, target)
    target.chmod(mode)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def _tool(
    argv: Sequence[str], *, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a tool, both outputs as one text; its messages in English whoever runs it."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise BuildError(f"{argv[0]} is missing", f"Debian: apt install {argv[0]}") from None
    if check and done.returncode != 0:
        raise BuildError(f"{' '.join(argv)} failed:\n{done.stdout}", "see what it says")
    return done
