"""`invoke handout`: the students' repository, made from the instructors' tree.

What the two have in common is copied (labs/handout.toml says which files). Of a lab's own files
students get the starter, and in place of the solution what a grade and the module need of it:
objects (`grader.given`), or its source where the instructor says so.

Nothing of a solution may be in what they get, and that is looked for when all is done, in every
file and in every object of git: see `Secrets`. What cannot be seen in that way: a solution told in
other words; a single line of it inside given C code, where the same line may rightly be; and what
can be learned from the objects by taking them apart, as from any program.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import string
import subprocess
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grader import given, results, setup
from grader import variant as variants
from grader.errors import UserError
from grader.lab import load_lab
from grader.progress import Progress
from grader.submission import shown
from images.build import build_programs, library_object
from images.build import made_for as made_for_library
from kernel.build import (
    DEBIAN_TARBALL,
    UAPI,
    Kernel,
    build_kernel,
    build_objects,
    made_for,
    module_lab_files,
    tarball,
)

TEMPLATE = "labs/HANDOUT.md"
# A person's name goes into the commit only if the tree's git knows one.
NEUTRAL_IDENTITY = ("MegaPipe lab", "lab@megapipe.invalid")
# Characters without white space; shorter lines are anybody's ("return ret;").
DISTINCTIVE_LINE = 16
DISTINCTIVE_REGION = 24
MAX_LEAKS = 10
# Where C code is that students get: a line of a solution that is there is no secret.
GIVEN_CODE = (".c", ".h", ".S", ".patch")
# How a line of a comment begins and ends.
_DECORATION = re.compile(r"^\s*(?:/\*+|\*+(?!/)|//)\s|\s*\*+/\s*$")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


class LeakError(UserError):
    """Something of a solution would have been handed out."""

    def __init__(self, leaks: Sequence[Leak]) -> None:
        listed = [str(leak) for leak in leaks[:MAX_LEAKS]]
        if len(leaks) > MAX_LEAKS:
            listed.append(f"and {len(leaks) - MAX_LEAKS} more")
        super().__init__(
            "the handout would hold parts of a solution, and was not made:\n  "
            + "\n  ".join(listed),
            "take them out of these files of the tree, or the files out of labs/handout.toml",
        )
        self.leaks = tuple(leaks)


@dataclass(frozen=True)
class Leak:
    """A place where something of a solution stands, and what it is a part of."""

    place: str
    source: str
    text: str

    def __str__(self) -> str:
        return f"{shown(self.place)}: of {self.source}: {shown(self.text)}"


# ------------------------------------------------------------------------------------- secrets


@dataclass(frozen=True)
class Secrets:
    """What must not be found: regions of solutions, and their distinctive lines.

    White space does not count, nor what makes a line a comment. A line is distinctive if it has
    `DISTINCTIVE_LINE` characters and is in no starter and in no code that is given; a region of
    more than one line always is.
    """

    needles: Mapping[bytes, tuple[str, str]]
    """What to look for, without white space: which file it is of, and how it begins there."""
    public_names: frozenset[str]
    """Identifiers of starters and of given code. An object has no function of another name."""

    @classmethod
    def of(cls, solved: Mapping[str, str], public: Iterable[str]) -> Secrets:
        """Collect those of the solved texts (name -> text); `public` is all given code."""
        known = [variants.starter_text(text, name) for name, text in solved.items()]
        known += public
        haystack = b"\n".join(_squeezed(text.encode()) for text in known)
        needles: dict[bytes, tuple[str, str]] = {}
        for name, text in solved.items():
            for region in variants.solution_regions(text, name):
                for needle, shown_as in _needles(region, haystack):
                    needles.setdefault(needle, (name, shown_as))
        words = {word for text in known for word in _IDENTIFIER.findall(text)}
        return cls(needles, frozenset(words))

    def found_in(self, place: str, data: bytes) -> Iterator[Leak]:
        """Look at one file's content."""
        squeezed = _squeezed(data)
        for needle, (source, text) in self.needles.items():
            if needle in squeezed:
                yield Leak(place, source, text)


def _needles(region: str, public: bytes) -> Iterator[tuple[bytes, str]]:
    lines = [line for line in region.split("\n") if line.strip()]
    whole = _squeezed(region.encode())
    if len(lines) > 1 and len(whole) >= DISTINCTIVE_REGION:
        yield whole, f"{lines[0].strip()} ..."
    for line in lines:
        needle = _squeezed(_DECORATION.sub("", line).encode())
        if len(needle) >= DISTINCTIVE_LINE and needle not in public:
            yield needle, line.strip()


def _squeezed(data: bytes) -> bytes:
    return b"".join(data.split())


def leaks(repository: Path, secrets: Secrets) -> list[Leak]:
    """Search every file below a folder, git's own included, and every object that git holds."""
    found: list[Leak] = []
    for path in sorted(repository.rglob("*")):
        place = str(path.relative_to(repository))
        if path.is_file():
            found += secrets.found_in(place, path.read_bytes())
        if path.suffix == ".o":
            bases = {name.partition(".")[0] for name in given.local_symbols(path)}
            for name in sorted(bases - secrets.public_names):
                if not given.NEUTRAL.fullmatch(name):
                    found.append(Leak(place, "a solution", f"the name {name}"))
    for identity, data in _git_objects(repository):
        found += secrets.found_in(f"git object {identity}", data)
    return found


def _git_objects(repository: Path) -> Iterator[tuple[str, bytes]]:
    stream = io.BytesIO(
        _git(repository, "cat-file", "--batch-all-objects", "--batch", neutral=True)
    )
    while head := stream.readline():
        identity, kind, size = head.decode().split()
        yield f"{identity[:12]} ({kind})", stream.read(int(size))
        stream.readline()


# ---------------------------------------------------------------------------------------- tree


@dataclass(frozen=True)
class LabFile:
    """A file that students write, as the tree has it."""

    lab: str
    name: str
    solved: str
    """The text, with its markers."""

    @property
    def path(self) -> str:
        """Where it lies, in the tree and in a handout."""
        return f"labs/{self.lab}/{self.name}"


@dataclass(frozen=True)
class Plan:
    """What of a tree goes into a handout."""

    tree: Path
    copied: tuple[str, ...]
    """Files that are handed out as they are, relative to the tree."""
    files: tuple[LabFile, ...]
    """The labs' own files, of all labs."""
    labs: tuple[str, ...]
    """The labs that students work on."""
    source: tuple[str, ...]
    """The labs whose solution they get."""

    def hidden(self) -> list[LabFile]:
        """Return the files whose solution students must not get."""
        return [
            file
            for file in self.files
            if file.lab not in self.source and variants.solution_regions(file.solved, file.path)
        ]

    def secrets(self) -> Secrets:
        """Return what must not be found in the handout."""
        public = [
            (self.tree / name).read_text(encoding="utf-8")
            for name in self.copied
            if Path(name).suffix in GIVEN_CODE
        ]
        hidden = {file.path: file.solved for file in self.hidden()}
        public += [
            variants.solved_text(file.solved, file.path)
            for file in self.files
            if file.path not in hidden
        ]
        return Secrets.of(hidden, public)


def plan(tree: Path, labs: Sequence[str] = (), source: Sequence[str] = ()) -> Plan:
    """Decide what is handed out of a tree; raises `UserError` for a lab that is not there."""
    tables = sorted(Path(name).parent.name for name in _tracked(tree, ["labs/*/lab.toml"]))
    files = _lab_files(tree, tables)
    for known, names in ((tables, labs), (sorted({file.lab for file in files}), source)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(
                f"there is no lab {', '.join(unknown)}", f"choose from {', '.join(known)}"
            )
    labs = tuple(labs) or tuple(tables)
    rules = tomllib.loads((tree / "labs" / "handout.toml").read_text(encoding="utf-8"))
    patterns = list(rules["include"])
    for name in tables:
        own = rules["lab"] if name in labs else rules["other_lab"]
        patterns += [f"labs/{name}/{pattern}" for pattern in own]
    copied = _tracked(tree, patterns, rules["exclude"])
    return Plan(tree, tuple(copied), tuple(files), labs, tuple(source))


def _lab_files(tree: Path, labs: Sequence[str]) -> list[LabFile]:
    own = set(module_lab_files())
    for name in labs:
        own.update(variants.lab_files(tree / "labs" / name))
    return [
        LabFile(Path(name).parent.name, Path(name).name, (tree / name).read_text(encoding="utf-8"))
        for name in _tracked(tree, ["labs/*/*"])
        if Path(name).name in own
    ]


def _tracked(tree: Path, patterns: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    wanted = [f":(glob){pattern}" for pattern in patterns]
    unwanted = [f":(glob,exclude){pattern}" for pattern in without]
    listed = _git(tree, "ls-files", "-z", "--", *wanted, *unwanted).decode()
    return [name for name in listed.split("\0") if name and (tree / name).is_file()]


def _git(folder: Path, *arguments: str, neutral: bool = False) -> bytes:
    """Run git there; `neutral`: without what a user's configuration and hooks would add."""
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    if neutral:
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, check=False
    )
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise UserError(
            f"git {arguments[0]} failed in {folder}: {message}",
            "a handout is made from a git checkout of the lab that has a commit",
        )
    return done.stdout


# ------------------------------------------------------------------------------------- objects


@dataclass(frozen=True)
class Compiled:
    """The solutions as objects: by the lab file's path."""

    objects: Mapping[str, Sequence[given.GivenObject]]
    origin: str
    """Which source of the kernel they are for, for people."""


def compiled(what: Plan, names: Collection[str], progress: Progress) -> Compiled:
    """Compile the solutions that students do not get, for all that they are needed for.

    Functions are called by `names` only, see `grader.given.neutral`.
    """
    hidden = what.hidden()
    in_module = {file.name: what.tree / file.path for file in what.files}
    in_module = {name: in_module[name] for name in module_lab_files()}
    in_library = {
        file.name: what.tree / file.path
        for file in what.files
        if file.name.endswith(".c") and file.name not in in_module
    }
    objects: dict[str, list[given.GivenObject]] = {file.path: [] for file in hidden}

    def add(name: str, made: Mapping[str, Path], fits: Mapping[str, str]) -> None:
        for file in hidden:
            if file.name in made:
                code = given.neutral(made[file.name].read_bytes(), names)
                objects[file.path].append(given.GivenObject(name, code, fits))

    for name, debug in (("kernel", False), ("debug-kernel", True)):
        kernel = build_kernel(debug, progress)
        progress.update(f"compiling the solutions: {name}")
        add(name, build_objects(kernel, in_module), made_for(kernel))
    programs = build_programs(list(in_library.values()), UAPI, kernel.source / "include/uapi")
    made = {name: library_object(programs, path) for name, path in in_library.items()}
    add("library", made, made_for_library(UAPI))
    return Compiled(objects, _origin(kernel))


def _origin(kernel: Kernel) -> str:
    archive = tarball()
    release = kernel.release.partition("-")[0]
    version = setup.debian_versions([setup.KERNEL_SOURCE]).get(setup.KERNEL_SOURCE, "")
    if archive == DEBIAN_TARBALL and version:
        return f"Linux {release}, Debian's {setup.KERNEL_SOURCE} {version}"
    return f"Linux {release}, {archive.name}"


# ------------------------------------------------------------------------------------ the verb


def make(
    tree: Path,
    target: Path,
    labs: Sequence[str] = (),
    source: Sequence[str] = (),
    uncommitted: bool = False,
    progress: Progress | None = None,
) -> None:
    """Make the students' repository in the folder `target`: whole, searched, or not at all.

    `labs` are those that students work on, without any: all. The solutions of the labs in `source`
    are given as C. `tree` is the checkout that all is taken from. Raises `LeakError` if anything of
    another solution would be in it, and `UserError` if the tree or the target will not do.
    """
    progress = progress or Progress(quiet=True)
    target = target.absolute()
    if target.is_symlink() or (target.exists() and not _is_empty_folder(target)):
        raise UserError(f"{target} is there already", "name a folder that is not, or is empty")
    results.make_folder(target.parent)
    what = plan(tree, labs, source)
    for name in _uncommitted(what, allowed=uncommitted):
        progress.say(f"not committed, handed out as it is: {name}")
    secrets = what.secrets()
    with progress.phase("objects"):
        made = Compiled({}, "any, for there are none")
        if what.hidden():
            made = compiled(what, secrets.public_names, progress)
    stage = target.with_name(f".{target.name}.making")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with progress.phase("handout"):
            progress.update("copying")
            _assemble(stage, what, made)
            _commit(stage, what)
            progress.update("looking for solutions in it")
            if found := leaks(stage, secrets):
                raise LeakError(found)
            stage.replace(target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    progress.say(f"{target}: {', '.join(what.labs)}; {len(what.copied)} files from this tree")
    if count := len(secrets.needles):
        progress.say(f"looked for {count} parts of solutions in all of it: none is there")
    if made.objects:
        progress.say(f"its objects are for {made.origin}")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _uncommitted(what: Plan, allowed: bool) -> list[str]:
    """Return which files differ from the last commit; those of labs must not unless `allowed`."""
    listed = _git(what.tree, "diff", "--name-only", "--no-renames", "-z", "HEAD", "--").decode()
    handed_out = {*what.copied, *(file.path for file in what.files), TEMPLATE}
    changed = [name for name in listed.split("\0") if name in handed_out]
    if (own := [name for name in changed if name.startswith("labs/")]) and not allowed:
        raise UserError(
            f"not committed: {', '.join(own)}",
            "commit, so that the handout can say what it was made from; or add --uncommitted",
        )
    return changed


def _assemble(stage: Path, what: Plan, made: Compiled) -> None:
    for name in what.copied:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(what.tree / name, stage / name)
    hidden = {file.path for file in what.hidden()}
    for file in what.files:
        folder = stage / "labs" / file.lab / variants.GIVEN
        if file.lab in what.labs:
            text = variants.starter_text(file.solved, file.path)
            _write(stage / file.path, text)
            _write(folder / "starter" / file.name, text)
        if file.path not in hidden:
            text = variants.solved_text(file.solved, file.path)
            _write(folder / "solution" / file.name, text)
        elif objects := made.objects[file.path]:
            given.write(folder / "solution" / given.folder_name(file.name), made.origin, objects)
    _write(stage / "README.md", _readme(what, setup.usual_lab(stage), made.origin))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _readme(what: Plan, first: str, origin: str) -> str:
    lines = []
    for name in what.labs:
        title = load_lab(name, what.tree / "labs").title
        there = f"labs/{name}/README.md" in what.copied
        lines.append(f"- {f'[{name}](labs/{name}/README.md)' if there else name}: {title}")
    template = string.Template((what.tree / TEMPLATE).read_text(encoding="utf-8"))
    return template.substitute(labs="\n".join(lines), first=first, origin=origin)


def _commit(stage: Path, what: Plan) -> None:
    """Make the first commit, in the name of whoever makes the handout."""
    commit = _git(what.tree, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    first = _git(what.tree, "rev-list", "--max-parents=0", "HEAD").decode().split()[-1]
    text = (
        f"MegaPipe lab: {', '.join(what.labs)}\n\n"
        f"Made by `invoke handout` from commit {commit.decode().strip()} of the instructors' tree\n"
        f"(the one that begins with commit {first[:12]}).\n"
    )
    if what.source:
        text += f"\nThe solution is given of: {', '.join(what.source)}.\n"
    name, email = _identity(what.tree)
    _git(stage, "init", "--quiet", "--initial-branch=main", "--template=", neutral=True)
    _git(stage, "config", "user.name", name, neutral=True)
    _git(stage, "config", "user.email", email, neutral=True)
    _git(stage, "add", "--all", "--force", neutral=True)
    _git(stage, "commit", "--quiet", "--message", text, neutral=True)
    # The students' commits are their own.
    _git(stage, "config", "--remove-section", "user", neutral=True)


def _identity(tree: Path) -> tuple[str, str]:
    """Return whom the tree's git knows its user as; somebody neutral if it does not."""
    words = []
    for key in ("user.name", "user.email"):
        # With the user's own configuration, where names are.
        done = subprocess.run(
            ["git", "config", "--get", key], cwd=tree, capture_output=True, text=True, check=False
        )
        words.append(done.stdout.strip())
    return (words[0], words[1]) if all(words) else NEUTRAL_IDENTITY
