"""From a bare machine to a running task: the virtual environment and the Debian packages.

Standard library only, because nothing else is there yet. `main` makes sure that ``.venv`` holds
exactly the Python packages pinned in ``pyproject.toml`` and that the programs of `PACKAGES` are
there, then becomes Invoke. When everything is in place it changes nothing and takes a moment.

``.venv/megapipe.json`` (`Stamp`) says what the environment holds. It is marked incomplete before
anything is touched, so an installation that was cut short is known and done anew. A virtual
environment without a stamp was made by somebody else and is kept: only packages are added.
"""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from grader.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parent.parent
KERNEL_SOURCE = "linux-source-6.12"
STAMP_NAME = "megapipe.json"
LOCK_NAME = "megapipe.lock"
# Ordinary users of Debian do not have these in PATH, but depmod and others live there.
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# These verbs only need Python.
VERBS_WITHOUT_PACKAGES = frozenset(
    {"clean", "doctor", "lab", "notebooks", "plot", "starter", "submit"}
)
LAB = "1-batching"
HELP = frozenset({"-h", "--help"})


@dataclasses.dataclass(frozen=True)
class Package:
    """A Debian package and what the project uses of it.

    `commands` and `files` are what it provides: where all of them are found, the
    machine needs no package of that name. `modules` are Python modules of the running interpreter.
    """

    name: str
    reason: str
    commands: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    optional: bool = False


PACKAGES = (
    Package("python3-venv", "makes .venv for the Python packages", modules=("venv", "ensurepip")),
    Package("git", "fetches the project and keeps your work", ("git",)),
    Package("gcc", "compiles the kernel, the module and the programs", ("gcc",)),
    Package("binutils", "links them and reads their symbols", ("ld", "nm", "objcopy")),
    Package("libc6-dev", "C headers and static libraries", files=("/usr/include/stdio.h",)),
    Package("make", "runs the kernel's build", ("make",)),
    Package("flex", "the kernel's configuration parser", ("flex",)),
    Package("bison", "the kernel's configuration parser", ("bison",)),
    Package("bc", "computes the kernel's time constants", ("bc",)),
    Package("perl", "generates some of the kernel's sources", ("perl",)),
    Package("libelf-dev", "the kernel's objtool is built with it", files=("/usr/include/gelf.h",)),
    Package(
        "libssl-dev",
        "the kernel's certificate tools are built with it",
        files=("/usr/include/openssl/ssl.h",),
    ),
    Package("kmod", "lists the modules' dependencies (depmod)", ("depmod",)),
    Package("rsync", "installs the kernel's headers", ("rsync",)),
    Package("patch", "applies the project's patches to the kernel", ("patch",)),
    Package("xz-utils", "unpacks the kernel's source", ("xz",)),
    Package(KERNEL_SOURCE, "the kernel's source", files=(f"/usr/src/{KERNEL_SOURCE}.tar.xz",)),
    Package("cpio", "packs the guest's file system", ("cpio",)),
    Package("busybox-static", "the guest's shell and tools", ("busybox",)),
    Package("qemu-system-x86", "the machine that runs the kernel", ("qemu-system-x86_64",)),
    Package("e2fsprogs", "makes the disk of a test (mkfs.ext4)", ("mkfs.ext4",)),
    Package("iproute2", "sets up the network of a run", ("ip",)),
    Package(
        "util-linux",
        "gives each run its own namespaces (unshare)",
        ("unshare", "setpriv", "prlimit"),
    ),
    Package(
        "bubblewrap", "compiles students' files apart from the rest of the machine", ("bwrap",)
    ),
    Package("universal-ctags", "finds the kernel's functions in its source", ("ctags-universal",)),
    Package("gdb", "only for boot --gdb", ("gdb",), optional=True),
)


def say(text: str) -> None:
    """Tell the user what is being done; on standard error, to keep the task's output clean."""
    print(text, file=sys.stderr, flush=True)


def is_handout(root: Path) -> bool:
    """Return whether a checkout is a students' repository (`grader.handout`)."""
    return any(root.glob("labs/*/given"))


def usual_lab(root: Path) -> str:
    """Return the lab that a verb takes when none is named: in a handout its first."""
    own = sorted(path.parts[-3] for path in root.glob("labs/*/given/starter"))
    return own[0] if own and LAB not in own else LAB


def add_system_folders() -> None:
    """Let this process and its children find the programs in ``/usr/sbin`` and its like."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path += [folder for folder in SYSTEM_FOLDERS if folder not in path]
    os.environ["PATH"] = os.pathsep.join(path)


# ---------------------------------------------------------------------------------- packages


def debian_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those Debian packages that are installed; none elsewhere."""
    if shutil.which("dpkg-query") is None:
        return {}
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev} ${Version}\n", *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    versions = {}
    for line in done.stdout.splitlines():
        match line.split():
            # The second letter is the state: installed, whatever is planned for the package.
            case [name, state, version] if state[1:2] == "i":
                versions[name] = version
    return versions


def provided(package: Package) -> bool:
    """Return whether what the package is for is there, wherever it came from."""
    if package.name == KERNEL_SOURCE and os.environ.get("KERNEL_TARBALL"):
        return True
    return (
        all(shutil.which(command) for command in package.commands)
        and all(Path(file).exists() for file in package.files)
        and all(importlib.util.find_spec(module) for module in package.modules)
    )


def missing(packages: Sequence[Package] = PACKAGES) -> list[Package]:
    """Return the packages that this machine needs and does not have, optional ones left out."""
    # A package for Python counts only if *this* interpreter has what it gives.
    named = [p.name for p in packages if not p.modules]
    installed = debian_versions(named) if named else {}
    return [
        package
        for package in packages
        if not package.optional and package.name not in installed and not provided(package)
    ]


def install_command(packages: Sequence[Package]) -> list[str]:
    """Return the command that installs these packages, without what gives it the right to."""
    names = [package.name for package in packages]
    return ["apt-get", "install", "--yes", "--no-install-recommends", *names]


def install_advice(packages: Sequence[Package]) -> str:
    """Return what to tell somebody who lacks these packages."""
    if shutil.which("apt-get") is None:
        wanted = "\n".join(f"  {p.name}: {p.reason}{_contents(p)}" for p in packages)
        return (
            "install the equivalents of these Debian packages with your distribution's "
            f"package manager:\n{wanted}"
        )
    unknown = _unknown_to_apt(packages)
    commands = [shlex.join(install_command(packages))]
    if unknown:
        commands.insert(0, "apt-get update")
    if os.geteuid() == 0:
        command = " && ".join(commands)
    elif shutil.which("sudo") is not None:
        command = " && ".join(f"sudo {command}" for command in commands)
    else:
        command = f"su -c '{' && '.join(commands)}'"
    return f"run   {command}{_without_kernel_package(unknown)}"


def _without_kernel_package(unknown: Sequence[Package]) -> str:
    """Return the way round the kernel's package, if apt does not know that one."""
    if not any(package.name == KERNEL_SOURCE for package in unknown):
        return ""
    return (
        f"\nwhere apt knows no {KERNEL_SOURCE}, fetch a linux-6.12.N.tar.xz from "
        "https://kernel.org and name it:   "
        "KERNEL_TARBALL=/path/to/linux-6.12.N.tar.xz python3 tasks.py ..."
    )


def _contents(package: Package) -> str:
    contents = ", ".join((*package.commands, *package.files))
    return f" ({contents})" if contents else ""


def install(packages: Sequence[Package]) -> None:
    """Install these Debian packages, after asking where there is somebody to ask.

    Raises `UserError` with the command to run where it may not or cannot.
    """
    listing = "\n".join(f"  {package.name:<20} {package.reason}" for package in packages)
    problem = f"{_count(packages, 'Debian package')} missing:\n{listing}"
    todo = f"{install_advice(packages)}\nthen the same again"
    if shutil.which("apt-get") is None:
        raise UserError(problem, todo)
    asking = sys.stdin.isatty() and sys.stderr.isatty() and not _noninteractive()
    right = _right_to_install(asking)
    if right is None:
        raise UserError(problem, todo)
    say(problem)
    if asking and not _agreed(f"install with {shlex.join([*right[:1], 'apt-get'])}?"):
        raise UserError("nothing was installed", todo)
    environment = [*right, "env", "DEBIAN_FRONTEND=noninteractive"]
    updated = False
    if _unknown_to_apt(packages):
        updated = _apt([*environment, "apt-get", "update"])
        if unknown := _unknown_to_apt(packages):
            raise _unknown_packages(unknown)
    # Another apt (a daily update, say) may hold the lock for a while.
    command = [*environment, *install_command(packages), "-o", "DPkg::Lock::Timeout=300"]
    # Old lists name versions that the mirror has since replaced; only then are new ones fetched.
    done = _apt(command) or (
        not updated and _apt([*environment, "apt-get", "update"]) and _apt(command)
    )
    if not done:
        raise UserError("apt-get could not install them; its messages are above", todo)
    importlib.invalidate_caches()
    if still := missing(packages):
        names = ", ".join(package.name for package in still)
        raise UserError(
            f"{names}: installed, but this Python ({sys.executable}) does not find it",
            f"use Debian's own:   /usr/bin/python3 {ROOT / 'tasks.py'}",
        )


def _count(things: Sequence[object], name: str) -> str:
    return f"1 {name} is" if len(things) == 1 else f"{len(things)} {name}s are"


def _noninteractive() -> bool:
    return os.environ.get("DEBIAN_FRONTEND") == "noninteractive" or os.environ.get(
        "CI", ""
    ).lower() not in ("", "0", "false")


def _right_to_install(asking: bool) -> list[str] | None:
    """Return what to put before apt-get; None where nobody allowed it or nothing can."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    if asking:
        return ["sudo"]
    return ["sudo", "-n"] if _noninteractive() else None


def _agreed(question: str) -> bool:
    print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        say("")
    # The end of input is no answer, an empty line is yes.
    return answer.strip().lower() in ("", "y", "yes") if answer else False


def _apt(command: Sequence[str]) -> bool:
    say(f"+ {shlex.join(command)}")
    return subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode == 0


def _unknown_to_apt(packages: Sequence[Package]) -> list[Package]:
    done = subprocess.run(
        ["apt-cache", "policy", *(package.name for package in packages)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
        text=True,
        check=False,
    )
    found = re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (?!\(none\))", done.stdout, re.M)
    return [package for package in packages if package.name not in found]


def _unknown_packages(unknown: Sequence[Package]) -> UserError:
    names = ", ".join(package.name for package in unknown)
    todo = (
        "add your distribution's ordinary package sources (Debian 12: main of bookworm, "
        "bookworm-updates and bookworm-security; Debian 13: the same of trixie)"
    )
    return UserError(f"apt knows no package {names}", todo + _without_kernel_package(unknown))


# ------------------------------------------------------------------------------- environment


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What a virtual environment holds.

    `key` stands for the list of pinned packages; `folder` and `python` (the interpreter behind
    ``bin/python``) are there because an environment survives neither being moved nor the
    replacement of its interpreter.
    """

    key: str
    folder: str
    python: str
    complete: bool


def pins(pyproject: Path) -> list[str]:
    """Return the pinned Python packages: what runs the project, and all dependency groups."""
    table = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    groups = table.get("dependency-groups", {}).values()
    return [*table["project"]["dependencies"], *(pin for group in groups for pin in group)]


def is_current(root: Path) -> bool:
    """Return whether the checkout's virtual environment is whole and up to date."""
    venv = root / ".venv"
    return _read_stamp(venv) == _wanted_stamp(venv, pins(root / "pyproject.toml"))


def prepare_environment(root: Path) -> Path:
    """Return the interpreter of the checkout's virtual environment, made or updated if need be.

    Raises `UserError` where it cannot be made (no network, no space, a read-only checkout).
    """
    venv = root / ".venv"
    if not is_current(root):
        try:
            venv.mkdir(exist_ok=True)
            with _locked(venv) as lock:
                if not is_current(root):
                    _fill(venv, pins(root / "pyproject.toml"), lock)
        except OSError as error:
            raise UserError(
                f"cannot make {venv}: {error.strerror or error}",
                "use a checkout that you may write to, on a file system with space left",
            ) from None
    return venv / "bin" / "python"


def _wanted_stamp(venv: Path, wanted: Sequence[str]) -> Stamp:
    key = hashlib.sha256("\n".join(sorted(wanted)).encode()).hexdigest()
    python = os.path.realpath(venv / "bin" / "python")
    return Stamp(key, str(venv.resolve()), python if Path(python).exists() else "", True)


def _read_stamp(venv: Path) -> Stamp | None:
    try:
        return Stamp(**json.loads((venv / STAMP_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write_stamp(venv: Path, stamp: Stamp) -> None:
    partial = venv / f"{STAMP_NAME}.partial"
    partial.write_text(json.dumps(dataclasses.asdict(stamp)) + "\n", encoding="utf-8")
    partial.rename(venv / STAMP_NAME)


@contextmanager
def _locked(venv: Path) -> Iterator[int]:
    """Hold the environment's lock; yields its descriptor, for the children to inherit.

    A child that outlives us (we were killed) thus keeps the next run waiting until it has ended.
    """
    with (venv / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is preparing {venv}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _fill(venv: Path, wanted: Sequence[str], lock: int) -> None:
    stamp = _read_stamp(venv)
    now = _wanted_stamp(venv, wanted)
    ours = stamp is not None
    whole = stamp is None or dataclasses.replace(now, key=stamp.key) == stamp
    keep = whole and _works(venv)
    verb = "updating" if keep else "making"
    say(f"{verb} {venv} with {len(wanted)} Python packages (a minute or so, once)")
    _write_stamp(venv, dataclasses.replace(now, complete=False))
    environment = _clean_environment()
    if not keep:
        _empty(venv, keep_names={STAMP_NAME, LOCK_NAME})
        # Inside a virtual environment this is the interpreter that it was made from.
        base = getattr(sys, "_base_executable", None) or sys.executable
        _child(
            [base, "-I", "-m", "venv", str(venv)],
            environment,
            lock,
            UserError(
                f"python3 could not make {venv}; its message is above",
                install_advice([p for p in PACKAGES if p.name == "python3-venv"]),
            ),
        )
    pip = [str(venv / "bin" / "python"), "-I", "-m", "pip"]
    # Only wheels: a package that had to be compiled would need more than the table installs.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    _child(
        [*pip, "install", *options, *wanted],
        environment,
        lock,
        UserError(
            "pip could not install the Python packages; its message is above",
            "make sure that this machine reaches https://pypi.org (behind a proxy set "
            "HTTPS_PROXY, for a mirror PIP_INDEX_URL), then the same again",
        ),
    )
    if not ours and keep:
        say(f"({venv} was there before; what it held has been kept)")
    _write_stamp(venv, _wanted_stamp(venv, wanted))


def _works(venv: Path) -> bool:
    """Return whether the environment's interpreter runs, is new enough and has pip."""
    python = venv / "bin" / "python"
    if not ((venv / "pyvenv.cfg").is_file() and python.exists()):
        return False
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)"
    done = subprocess.run(
        [python, "-I", "-c", probe],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode == 0


def _empty(folder: Path, keep_names: set[str]) -> None:
    for path in folder.iterdir():
        if path.name in keep_names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _clean_environment() -> dict[str, str]:
    # These would make pip install somewhere else, or Python load something else.
    dropped = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PIP_USER": "0"}


def _child(
    command: Sequence[str], environment: Mapping[str, str], lock: int, failure: UserError
) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        env=environment,
        pass_fds=(lock,),
        check=False,
    )
    if done.returncode != 0:
        raise failure


# -------------------------------------------------------------------------------------- main


def task_help(tasks: Path) -> dict[str, str]:
    """Return the verbs of a task file and the first line of each one's help.

    Read from the source, because Invoke may not be there yet. In a handout those for instructors
    are left out.
    """
    handout = is_handout(tasks.parent)
    functions = [
        node
        for node in ast.parse(tasks.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    return {
        function.name.replace("_", "-"): (ast.get_docstring(function) or "").split("\n")[0]
        for function in functions
        if not function.name.startswith("_") and not (handout and _for_instructors(function))
    }


def _for_instructors(function: ast.FunctionDef) -> bool:
    calls = [node for node in function.decorator_list if isinstance(node, ast.Call)]
    return any(
        keyword.arg == "instructors" and ast.literal_eval(keyword.value)
        for call in calls
        for keyword in call.keywords
    )


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Prepare the machine and become ``invoke ARGUMENTS``; return an exit status if it cannot."""
    arguments = list(arguments)
    try:
        add_system_folders()
        verbs = task_help(root / "tasks.py")
        verb = next((word for word in arguments if not word.startswith("-")), None)
        if verb is None and set(arguments) <= {"-h", "--help", "-l", "--list"}:
            if not is_current(root):
                print(_verb_list(verbs))
                return 0
            arguments = ["--list"]
        _check_machine()
        if verb is not None and verb not in verbs and not HELP & set(arguments):
            raise UsageError(f"there is no verb {verb!r}", f"use one of {', '.join(verbs)}")
        _install_for(verb, arguments)
        python = prepare_environment(root)
        command = [str(python), "-m", "invoke", "--search-root", str(root), *arguments]
        sys.stdout.flush()
        os.execve(python, command, _clean_environment())
    except UserError as error:
        say(error.report())
        return error.status
    except KeyboardInterrupt:
        say("\ninterrupted; the same command takes it up again")
        return 130


def _check_machine() -> None:
    machine = (platform.system(), platform.machine())
    if machine != ("Linux", "x86_64"):
        raise UserError(
            f"this is {' on '.join(machine)}; the lab needs Linux on x86_64",
            "use such a machine, or a virtual machine of that kind (KVM is not needed)",
        )


def _install_for(verb: str | None, arguments: Sequence[str]) -> None:
    only_python = verb in (None, *VERBS_WITHOUT_PACKAGES) or HELP & set(arguments)
    needed = [package for package in PACKAGES if package.modules] if only_python else PACKAGES
    if lacking := missing(needed):
        install(lacking)


def _verb_list(verbs: Mapping[str, str]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {name:<{width}}   {text}" for name, text in verbs.items()]
    return "\n".join(
        [
            "usage: python3 tasks.py VERB [OPTIONS]   (VERB --help says more)",
            "",
            *lines,
            "",
            "The first use makes .venv and says which Debian packages are missing.",
        ]
    )
