"""A plugin's way into the QEMU at hand: compiled, tried out, cached."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from grader import cache
from grader.probe import counters as counter_file
from grader.probe import lock_file, sharing_file, stack_file
from grader.probe.errors import PluginUnavailable

QEMU = "qemu-system-x86_64"
# The first QEMU that speaks each version of the plugin interface, newest first.
API_VERSIONS = (((10, 1), 5), ((10, 0), 4), ((9, 1), 3), ((9, 0), 2), ((0, 0), 1))
LOADING_SECONDS = 60.0
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden")


def plugin(name: str = "probe", qemu: Path | None = None) -> Path:
    """Return the plugin `name`.c built for this QEMU (default: the one on the PATH), cached.

    Which version of the plugin interface a QEMU accepts is found by loading the plugin into it.
    Raises `PluginUnavailable` with what to do.
    """
    path = shutil.which(qemu or QEMU)
    if path is None:
        raise PluginUnavailable(
            f"{qemu or QEMU} not found", "install QEMU (Debian: qemu-system-x86)"
        )
    version = _qemu_version(path)
    status = Path(path).stat()
    here = Path(__file__).parent
    key = cache.digest(
        here / f"{name}.c",
        here / "plugin.h",
        here / "qemu_plugin_api.h",
        Path(__file__),
        str(Path(path).resolve()),
        f"{status.st_size} {status.st_mtime_ns}",
        version,
    )

    def make(folder: Path) -> None:
        refusals = []
        for api in candidates(version):
            build(api, folder / f"{name}.so", name)
            refusal = try_loading(path, folder, name)
            if refusal is None:
                return
            refusals.append(refusal)
            if not _about_version(refusal):
                break
        raise PluginUnavailable(*explain(version, refusals[0]))

    return cache.entry("probe", key, make) / f"{name}.so"


def _qemu_version(path: str) -> str:
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=LOADING_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PluginUnavailable(f"{path} --version fails: {error}", "install QEMU again") from error
    return answer.stdout.partition("\n")[0]


def candidates(version: str) -> list[int]:
    """Return the interface versions to try, likeliest first, with a QEMU that says `version`."""
    found = re.search(r"version (\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else API_VERSIONS[0][0]
    expected = next(api for first, api in API_VERSIONS if release >= first)
    return [expected, *(api for _, api in API_VERSIONS if api != expected)]


def build(api: int, output: Path, name: str = "probe") -> None:
    """Compile the plugin `name`.c for one version of the interface."""
    compile_library(Path(__file__).parent / f"{name}.c", output, f"-DPROBE_API_VERSION={api}")


def compile_library(source: Path, output: Path, *options: str) -> None:
    """Compile a library that QEMU loads. Raises `PluginUnavailable` with what to do."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise PluginUnavailable(f"no C compiler for {source.name}", "install gcc")
    run = subprocess.run(
        [compiler, *FLAGS, *options, "-o", output, source],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise PluginUnavailable(
            f"{compiler} does not compile {source}:\n{run.stderr.strip()}",
            f"use gcc 10 or later, and put {source.name} back as it was",
        )


def try_loading(qemu: str, folder: Path, name: str = "probe") -> str | None:
    """Load ``folder/<name>.so`` into a QEMU without a guest; return what it says if it refuses."""
    files, numbers = _to_try_with(name)
    options: dict[str, Path | int] = {**numbers}
    for option, content in files.items():
        options[option] = folder / option
        (folder / option).write_bytes(content)
    # No machine, hence no guest: only that QEMU takes the plugin is of interest.
    command = [qemu, "-M", "none", "-accel", "tcg", "-display", "none", "-nodefaults", "-S"]
    command += ["-monitor", "stdio"]
    command += arguments(folder / f"{name}.so", **options)
    try:
        run = subprocess.run(
            command,
            input="quit\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOADING_SECONDS,
            check=False,
        )
        # A plugin that was installed has left its state in the file.
        loaded = (folder / "counters").read_bytes() != files["counters"]
    except subprocess.TimeoutExpired:
        return f"no answer within {LOADING_SECONDS:.0f} s"
    except OSError as error:
        return f"cannot be run: {error.strerror}"
    finally:
        for option in files:
            (folder / option).unlink()
    if run.returncode == 0 and loaded:
        return None
    return run.stderr.strip() or f"exit status {run.returncode}, and not a word"


def _to_try_with(name: str) -> tuple[dict[str, bytes], dict[str, int]]:
    """Return with what the plugin `name` can be loaded: option -> a file's content, or a number."""
    if name == "stacks":
        return {"counters": stack_file.new_file(1, [], late_room=1, node_slots=64)}, {}
    if name == "sharing":
        counters = sharing_file.new_file(1, 1, 1, 1)
        return {"counters": counters, "functions": b"ffffffff81000000\n"}, {"memory_mib": 1}
    if name == "locks":
        return {"counters": lock_file.new_file(1), "functions": b""}, {}
    return {"counters": counter_file.new_file(1, 1), "functions": b"ffffffff81000000 none\n"}, {}


def _about_version(refusal: str) -> bool:
    return "API version" in refusal


def explain(version: str, said: str) -> tuple[str, str]:
    """Return why this QEMU, which `said` so, does not take the plugin, and what to do."""
    if re.search(r"-plugin: invalid option|plugin interface not enabled", said):
        reason = "was built without TCG plugins"
        todo = (
            "use your distribution's QEMU (Debian's and Ubuntu's qemu-system-x86 has them), or "
            "build QEMU with ./configure --enable-plugins"
        )
    elif "invalid accelerator" in said:
        reason, todo = "has no TCG", "install a QEMU that has (Debian: qemu-system-x86)"
    elif _about_version(said):
        reason = "speaks no version of the plugin interface that is known here"
        todo = "use QEMU 7.2 to 10.2, or check grader/probe/qemu_plugin_api.h against this one"
    else:
        reason, todo = "does not load the probe", "see what QEMU said, or install QEMU again"
    return f"{version} {reason}: {said}", todo


def arguments(plugin_file: Path, **options: Path | int | str) -> list[str]:
    """Return the arguments that make QEMU load the plugin with these options."""
    words = [str(plugin_file), *(f"{option}={value}" for option, value in options.items())]
    # A comma in an option's value is written twice.
    return ["-plugin", ",".join(word.replace(",", ",,") for word in words)]


def private_folder(parent: Path | None = None) -> Path:
    """Make a folder for the files that a plugin maps, below `parent` (default: memory)."""
    # On a disk, the kernel would write the ever changing pages back again and again.
    memory = Path("/dev/shm")
    if parent is None and os.access(memory, os.W_OK | os.X_OK):
        parent = memory
    return Path(tempfile.mkdtemp(prefix="megapipe-probe-", dir=parent))
