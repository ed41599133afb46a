"""Variant -> Kernel: the patched kernel, and megapipe.ko for it.

The kernel is built once for each content of {source archive, patches, configuration, compiler}
and kept in the user's cache; a variant of the student's files only builds the module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grader import cache, confined, given, rules
from grader.errors import UserError
from grader.progress import Progress

HERE = Path(__file__).parent
PATCHES = HERE / "patches"
CONFIG = HERE / "config"
MODULE = HERE / "megapipe"
LIMIT = HERE / "limit"
TURNS = HERE / "turns"
UAPI = MODULE / "uapi"
DEBIAN_TARBALL = Path("/usr/src/linux-source-6.12.tar.xz")

COMMANDS = "compile_commands.json"

# What a build leaves that neither the module nor a debugger needs.
_LEFTOVERS = ("*.o", "*.a", "*.cmd", ".tmp_vmlinux*", "vmlinux.unstripped")
# Go into the keys: raise them when the steps below change what they make.
_RECIPE = "1"
_MODULE_RECIPE = "6"
_OBJECTS_RECIPE = "3"
_OWN_RECIPE = "1"
# Lines that a build prints (6.12.117), by its last fragment; only the progress line rests on it.
_EXPECTED_STEPS = {"lab.config": 2430, "debug.config": 2130}


class BuildError(UserError):
    """The kernel itself does not build."""


class ModuleError(UserError):
    """The module does not compile, or breaks the rules: a student's mistake.

    `text` is the compiler's output, or what `grader.rules` says.
    """

    def __init__(self, text: str) -> None:
        super().__init__(f"megapipe.ko does not compile\n{text}", "mend the first error above")
        self.text = text


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted and for which modules can be built."""

    vmlinux: Path
    system_map: Path
    build: Path
    """The output folder, as ``make -C build M=...`` wants it."""
    source: Path
    release: str
    """As uname -r shows it, for example ``6.12.117-megapipe``."""
    debug: bool
    key: str


@dataclass(frozen=True)
class Module:
    """A kernel module: megapipe.ko, built from one variant, or mp_limit.ko."""

    ko: Path
    key: str


# --- inputs -----------------------------------------------------------------------------------


def tarball() -> Path:
    """Return the kernel's source archive: ``KERNEL_TARBALL``, or Debian's package."""
    given = os.environ.get("KERNEL_TARBALL")
    path = Path(given).expanduser() if given else DEBIAN_TARBALL
    if not path.is_file():
        raise BuildError(
            f"there is no kernel source at {path}",
            "install Debian's package linux-source-6.12, or set KERNEL_TARBALL to the path of "
            "a linux-6.12.y.tar.xz",
        )
    return path


def _archive_digest(path: Path) -> str:
    """Return the SHA-256 of a large file, remembered for as long as the file does not change."""
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    memory = cache.root() / "archive-digest.json"
    try:
        known = json.loads(memory.read_text())
        if known["identity"] == identity:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    cache.write_whole(memory, json.dumps({"identity": identity, "sha256": sha256}))
    return sha256


def read_config(lines: Iterable[str]) -> dict[str, str]:
    """Parse a kernel configuration or fragment: option -> value, ``n`` for one not set."""
    options = {}
    for line in lines:
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)", line.strip()):
            options[match[1]] = match[2]
        elif match := re.fullmatch(r"# (CONFIG_\w+) is not set", line.strip()):
            options[match[1]] = "n"
    return options


def merged_config(debian: Mapping[str, str], *fragments: Mapping[str, str]) -> dict[str, str]:
    """Return Debian's options without its modules, overlaid with the fragments in order."""
    options = {name: value for name, value in debian.items() if value != "m"}
    for fragment in fragments:
        options.update(fragment)
    return options


def unmet_options(wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """Return what a fragment asks for and the finished configuration does not have."""
    return [
        f"{name}={value} (is {got.get(name, 'n')})"
        for name, value in wanted.items()
        if got.get(name, "n") != value
    ]


def _config_text(options: Mapping[str, str]) -> str:
    return "".join(
        f"# {name} is not set\n" if value == "n" else f"{name}={value}\n"
        for name, value in options.items()
    )


def _compiler() -> str:
    try:
        done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError("gcc does not run", "see `invoke doctor`") from error
    return done.stdout.splitlines()[0]


# --- the kernel -------------------------------------------------------------------------------


def build_kernel(debug: bool = False, progress: Progress | None = None) -> Kernel:
    """Return the kernel, building it if this content has not been built yet.

    A build that is interrupted goes on where it stopped. Errors: `BuildError`.
    """
    progress = progress or Progress(quiet=True)
    archive = tarball()
    fragments = [CONFIG / "lab.config"] + ([CONFIG / "debug.config"] if debug else [])
    source_key = _source_key(archive)
    key = cache.digest(source_key, CONFIG / "debian-cloud.config", *fragments, _compiler())
    final = cache.root() / "kernel" / key
    source = cache.root() / "source" / source_key / "linux"
    if not (final.is_dir() and source.is_dir()):
        waiting = "waiting: another run is building this kernel"
        with cache.locked(f"kernel-{key}", lambda: progress.update(waiting)):
            source = _unpack(source_key, archive, progress)
            if not final.is_dir():
                building = final.with_name(f".{key}.building")
                _make_kernel(building, source, fragments, progress)
                building.rename(final)
    release = (final / "include/config/kernel.release").read_text().strip()
    return Kernel(
        vmlinux=final / "vmlinux",
        system_map=final / "System.map",
        build=final,
        source=source,
        release=release,
        debug=debug,
        key=key,
    )


def source_key() -> str:
    """Return the digest of all that the kernel's source is made of; raises `BuildError`."""
    return _source_key(tarball())


def _source_key(archive: Path) -> str:
    return cache.digest(_RECIPE, _archive_digest(archive), PATCHES)


def _unpack(key: str, archive: Path, progress: Progress) -> Path:
    def make(folder: Path) -> None:
        progress.update(f"unpacking {archive.name}")
        try:
            # tar(1): Python's xz is one thread and many times slower on 80,000 files.
            _run(["tar", "-xf", str(archive), "-C", str(folder)])
        except BuildError as error:
            raise BuildError(
                f"{archive} cannot be unpacked: {error.problem}",
                "check the archive (and the space left in the cache: `invoke doctor`)",
            ) from error
        roots = list(folder.iterdir())
        makefile = roots[0] / "Makefile" if len(roots) == 1 else folder
        version = (
            re.search(r"^VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = \d+", makefile.read_text(), re.M)
            if makefile.is_file()
            else None
        )
        if version is None:
            raise BuildError(
                f"{archive} is not a Linux 6.12.y source archive",
                "set KERNEL_TARBALL to a linux-6.12.y.tar.xz",
            )
        roots[0].rename(folder / "linux")
        for patch in sorted(PATCHES.glob("*.patch")):
            progress.update(f"applying {patch.name}")
            _run(
                ["patch", "-p1", "-s", "--no-backup-if-mismatch", "-i", str(patch)],
                folder / "linux",
            )

    return cache.entry("source", key, make) / "linux"


def _make_kernel(folder: Path, source: Path, fragments: list[Path], progress: Progress) -> None:
    """Configure and build in `folder`, which may hold an interrupted build."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [read_config(path.read_text().splitlines()) for path in fragments]
    debian = read_config((CONFIG / "debian-cloud.config").read_text().splitlines())
    text = _config_text(merged_config(debian, *wanted))
    stamp = folder / ".wanted-config"
    if not stamp.is_file() or stamp.read_text() != text:
        progress.update("configuring")
        (folder / ".config").write_text(text)
        _run(["make", "-C", str(source), f"O={folder}", "olddefconfig"])
        got = read_config((folder / ".config").read_text().splitlines())
        unmet = unmet_options(merged_config({}, *wanted), got)
        if unmet:
            raise BuildError(
                "this kernel does not take the lab's configuration: " + ", ".join(unmet),
                "adapt kernel/config/ to it (or use Debian's linux-source-6.12)",
            )
        stamp.write_text(text)

    log = folder / "build.log"
    jobs = os.cpu_count() or 1
    command = ["make", "-C", str(source), f"O={folder}", f"-j{jobs}", "vmlinux", "modules"]
    environment = {
        **os.environ,
        # Nothing of who built it, where and when goes into the image.
        "KBUILD_BUILD_USER": "lab",
        "KBUILD_BUILD_HOST": "megapipe",
        "KBUILD_BUILD_TIMESTAMP": "@0",
    }
    steps = _EXPECTED_STEPS[fragments[-1].name]
    with log.open("w") as output:
        make = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            assert make.stdout is not None
            for count, line in enumerate(make.stdout):
                output.write(line)
                done = min(99, 100 * count // steps)
                progress.update(f"compiling the kernel, once: {done} %  {line.strip()[:60]}")
            status = make.wait()
        finally:
            _end_group(make)
    if status:
        tail = "".join(log.read_text().splitlines(keepends=True)[-30:])
        raise BuildError(
            f"the kernel does not build (make: {status})\n{tail}",
            f"read the first error in {log}; disk full? wrong compiler? `invoke doctor` knows more",
        )
    for pattern in _LEFTOVERS:
        for path in folder.rglob(pattern):
            path.unlink()


def _end_group(process: subprocess.Popen[str]) -> None:
    """End make and its children when we are interrupted: none may go on writing."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        process.wait()


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}", "see `invoke doctor`") from error
    if done.returncode:
        raise BuildError(
            f"{' '.join(command[:4])} ... failed\n{(done.stdout + done.stderr)[-2000:]}",
            "see `invoke doctor`",
        )


# --- the module -------------------------------------------------------------------------------


def module_lab_files() -> tuple[str, ...]:
    """Return the names of the labs' files that megapipe.ko is linked from: Kbuild's mp_*.o."""
    text = (MODULE / "Kbuild").read_text()
    return tuple(f"{name}.c" for name in re.findall(r"\b(mp_\w+)\.o\b", text))


def build_module(kernel: Kernel, files: Mapping[str, Path]) -> Module:
    """Build megapipe.ko with the labs' kernel files (name -> file), one for each name.

    A file is C, or a folder of given objects. Errors: `ModuleError` with the compiler's text if it
    does not compile; `grader.given.GivenError` if no object fits this kernel.
    """
    return _build_module(kernel, "megapipe", MODULE, files)


def build_limit(kernel: Kernel) -> Module:
    """Build mp_limit.ko, the echo inside the kernel that servers are compared with."""
    try:
        return _build_module(kernel, "mp_limit", LIMIT, {})
    except ModuleError as error:
        raise BuildError(f"mp_limit.ko does not compile\n{error.text}", "put it back") from error


def build_turns(kernel: Kernel) -> Module:
    """Build mp_turns.ko, which bounds how long a CPU runs in exact mode."""
    try:
        return _build_module(kernel, "mp_turns", TURNS, {})
    except ModuleError as error:
        raise BuildError(f"mp_turns.ko does not compile\n{error.text}", "put it back") from error


def _build_module(kernel: Kernel, name: str, source: Path, files: Mapping[str, Path]) -> Module:
    chosen = {file: given.choose(path, made_for(kernel)) for file, path in files.items()}
    key = _module_key(kernel, source, chosen)

    def make(folder: Path) -> None:
        made = _compile_module(kernel, name, source, chosen)
        (folder / f"{name}.ko").write_bytes(made[f"{name}.ko"])
        texts = [text.decode() for file, text in sorted(made.items()) if file.endswith(".cmd")]
        commands = _compile_commands(kernel, _place(name), texts)
        (folder / COMMANDS).write_text(json.dumps(commands, indent=1))

    return Module(cache.entry("module", key, make) / f"{name}.ko", key)


def _module_key(kernel: Kernel, source: Path, files: Mapping[str, Path]) -> str:
    contents = (part for file in sorted(files) for part in (file, files[file].read_bytes()))
    return cache.digest(_MODULE_RECIPE, kernel.key, source, rules.key(), *contents)


def _place(name: str) -> str:
    """Return where a module is compiled."""
    return f"{confined.PLACE}/{name}"


def _object(file: str) -> str:
    return f"{Path(file).stem}.o"


def _own_objects(kernel: Kernel, name: str, source: Path) -> dict[str, bytes]:
    """Return the objects of the module's own files by name, and how each was compiled.

    They are made once for each kernel: nothing of a variant goes into them, and a module has a
    dozen of them beside the one or two files of a lab.
    """
    objects = [_object(path.name) for path in sorted(source.glob("*.c"))]

    def make(folder: Path) -> None:
        done = _make_in(kernel, name, _contents(source), objects, [*objects, ".*.o.cmd"])
        if done.status:
            raise BuildError(f"{name}.ko does not compile\n{_said(done, name)}", "put it back")
        for file, content in done.files.items():
            (folder / file).write_bytes(content)

    key = cache.digest(_OWN_RECIPE, kernel.key, source)
    folder = cache.entry("objects", key, make)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _contents(source: Path) -> dict[str, bytes]:
    paths = (path for path in source.rglob("*") if path.is_file())
    return {str(path.relative_to(source)): path.read_bytes() for path in paths}


def _make_in(
    kernel: Kernel,
    name: str,
    inputs: Mapping[str, bytes],
    targets: Sequence[str],
    outputs: Sequence[str],
) -> confined.Outcome:
    jobs = len(os.sched_getaffinity(0))
    return confined.run(
        ["make", "-s", "-C", str(kernel.build), f"M={_place(name)}", f"-j{jobs}", *targets],
        inputs,
        outputs,
        readable=(kernel.build, kernel.source),
        folder=name,
    )


def _said(done: confined.Outcome, name: str) -> str:
    """Return the compiler's words; what make adds names files that its reader has never seen."""
    lines = done.explained.replace(f"{_place(name)}/", "").splitlines()
    return "\n".join(line for line in lines if not line.startswith("make"))


def _compile_module(
    kernel: Kernel, name: str, source: Path, files: Mapping[str, Path]
) -> dict[str, bytes]:
    """Return what the build leaves: the module, the objects of `files`, and how all was done."""
    words = {file: path.read_bytes() for file, path in files.items() if path.suffix != ".o"}
    if broken := rules.check_sources(words):
        raise ModuleError(broken)
    inputs = _contents(source)
    own = _own_objects(kernel, name, source) if files else {}
    # Kbuild copies what is called .o_shipped, and compiles nothing.
    for file in [file for file in own if file.endswith(".o")]:
        del inputs[f"{Path(file).stem}.c"]
        inputs[f"{file}_shipped"] = own[file]
    for file, path in files.items():
        shipped = f"{_object(file)}_shipped" if path.suffix == ".o" else file
        inputs[shipped] = path.read_bytes()
    outputs = [f"{name}.ko", ".*.o.cmd", *map(_object, files)]
    done = _make_in(kernel, name, inputs, [], outputs)
    if done.status:
        raise ModuleError(_said(done, name))
    made = {file: done.files[_object(file)] for file in words}
    if broken := rules.check_objects(words, made, _functions(kernel), kernel.debug):
        raise ModuleError(broken)
    return {**done.files, **{file: how for file, how in own.items() if file.endswith(".cmd")}}


def _functions(kernel: Kernel) -> frozenset[str]:
    """Return the names of the kernel's functions."""
    rows = (line.split() for line in kernel.system_map.read_text().splitlines())
    return frozenset(name for _, kind, name in rows if kind in "tTwW")


# --- the labs' files as objects ---------------------------------------------------------------

# Options that describe the tools on the machine that built the kernel. What one of them makes of
# the kernel has an option of its own (CC_HAS_SLS: MITIGATION_SLS). Plugins of gcc are no such
# tools: one of them shuffles the members of structures.
_TOOL_OPTION = re.compile(r"CONFIG_(CC|GCC(?!_PLUGIN)|CLANG|AS|LD|LLD|RUST|RUSTC|PAHOLE|TOOLS)_")


def made_for(kernel: Kernel) -> dict[str, str]:
    """Return what an object of the module is compiled against: see `grader.given`.

    Layouts, inline functions and macros come from the kernel's source, its configuration and the
    module's headers, and nothing else matters to an object. Not the compiler: how functions call
    each other is the platform's ABI, and Kbuild, too, only warns of a module that another compiler
    has made. So `Kernel.key`, which has the compiler in it, would be too narrow: a security update
    of gcc, or a rustc beside it, would make every handout useless.
    """
    options = read_config((kernel.build / ".config").read_text().splitlines())
    own = sorted(item for item in options.items() if not _TOOL_OPTION.match(item[0]))
    headers = sorted(MODULE.rglob("*.h"))
    named = (part for path in headers for part in (path.name, path))
    return {
        given.KERNEL_SOURCE: kernel.source.parent.name,
        given.KERNEL_CONFIGURATION: cache.digest(*(f"{name}={value}" for name, value in own)),
        given.MODULE_HEADERS: cache.digest(*named),
    }


def build_objects(kernel: Kernel, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the objects of the labs' kernel files, as they are before they are linked.

    `files` are all of them, as for `build_module`. The objects hold no path of this machine.
    """
    key = cache.digest(_OBJECTS_RECIPE, _module_key(kernel, MODULE, files))

    def make(folder: Path) -> None:
        made = _compile_module(kernel, "megapipe", MODULE, files)
        for file in files:
            (folder / _object(file)).write_bytes(made[_object(file)])

    folder = cache.entry("objects", key, make)
    return {file: folder / _object(file) for file in files}


def _compile_commands(kernel: Kernel, place: str, texts: Iterable[str]) -> list[dict[str, str]]:
    """Return how each file was compiled, the files by their names only: see `compile_commands`."""
    commands = []
    for text in texts:
        match = re.match(r"savedcmd_\S+ := (gcc .*?) (\S+\.c)\s*(;.*)?\n", text)
        # Not what kbuild itself adds to every module.
        if match and str(Path(match[2]).parent) == place and not match[2].endswith(".mod.c"):
            command = f"{match[1]} {match[2]}".replace(f"{place}/", "")
            commands.append({"directory": str(kernel.build), "file": Path(match[2]).name,
                             "command": command})  # fmt: skip
    return commands


def compile_commands(module: Module, files: Mapping[str, Path]) -> list[dict[str, str]]:
    """Return the module's part of a compile_commands.json, with the files where they are kept."""
    commands = json.loads((module.ko.parent / COMMANDS).read_text())
    for entry in commands:
        name = entry["file"]
        path = files.get(name, MODULE / name)
        entry["file"] = str(path)
        entry["command"] = entry["command"].removesuffix(name) + f"-I{MODULE} {path}"
    return list(commands)
