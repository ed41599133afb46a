"""The students' repository: what is in it, what must not be, and that it works."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grader import cache, given, handout, setup, variant
from grader.errors import UserError
from grader.handout import LeakError, Secrets
from grader.lab import LABS
from kernel.build import Kernel

SOLVED = """\
#include "batch.h"

static u32 drain(struct mp_channel *ch)
{
	/* BEGIN SOLUTION */
	u32 taken = mp_all(ch);

	/* Of several callbacks at a time the first one
	* takes all that has gathered.
	*/
	mp_publish_everything(ch);
	return taken;
	/* ELSE STARTER */
	//| return mp_one(ch);
	/* END SOLUTION */
}
"""
PUBLIC = "void other(void)\n{\n\tmp_publish_everything(ch);\n}\n"
SECRETS = Secrets.of({"1-a/a.c": SOLVED}, [PUBLIC])


def found(text: str) -> list[str]:
    return [leak.text for leak in SECRETS.found_in("here", text.encode())]


# ------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "text",
    [
        "u32 taken = mp_all(ch);",
        "see `u32  taken=mp_all( ch );` there",
        "u32 taken =\n\t\tmp_all(ch);",
        "* Of several callbacks at a time the first one",
        "> of course: Of several\tcallbacks at a time\nthe first one",
        "it takes all that has gathered.",
    ],
)
def test_a_distinctive_line_is_found_however_it_is_set(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize("text", ["", "return taken;", PUBLIC, variant.starter_text(SOLVED)])
def test_what_anybody_writes_and_what_is_given_is_no_leak(text: str) -> None:
    assert found(text) == []


def test_a_region_whose_lines_are_all_public_is_found_as_a_whole() -> None:
    solved = "/* BEGIN SOLUTION */\n\tfirst_public_function();\n\n\tsecond();\n/* END SOLUTION */\n"
    public = "second();\nfirst_public_function();\n"
    secrets = Secrets.of({"a.c": solved}, [public])
    assert not list(secrets.found_in("here", public.encode()))
    (leak,) = secrets.found_in("here", b"x first_public_function(); second(); y")
    assert leak.text == "first_public_function(); ..."


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "README.md").write_text("hello\n")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@lab.invalid"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder: Path, message: str = "x") -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)


def test_a_leak_in_a_file_names_it(repository: Path) -> None:
    assert handout.leaks(repository, SECRETS) == []
    (repository / "notes").mkdir()
    (repository / "notes" / "hint.txt").write_text("try u32 taken = mp_all(ch);\n")
    (leak,) = handout.leaks(repository, SECRETS)
    assert str(leak) == "notes/hint.txt: of 1-a/a.c: u32 taken = mp_all(ch);"


def test_a_leak_in_git_alone_is_found(repository: Path) -> None:
    (repository / "old").write_text("u32 taken = mp_all(ch);\n")
    commit(repository)
    (repository / "old").unlink()
    commit(repository)
    (leak,) = handout.leaks(repository, SECRETS)
    assert leak.place.startswith("git object ") and leak.place.endswith("(blob)")
    commit(repository, "now with u32 taken = mp_all(ch);")
    kinds = {leak.place.split()[-1] for leak in handout.leaks(repository, SECRETS)}
    assert "(commit)" in kinds


def test_a_name_in_an_object_is_found(repository: Path) -> None:
    source = repository / "a.c"
    source.write_text("static int telling = 1;\nint main(void) { return telling++; }\n")
    subprocess.run(["gcc", "-c", source, "-o", repository / "a.o"], check=True)
    source.unlink()
    (leak,) = handout.leaks(repository, SECRETS)
    assert (leak.place, leak.text) == ("a.o", "the name telling")
    code = given.neutral((repository / "a.o").read_bytes(), SECRETS.public_names)
    (repository / "a.o").write_bytes(code)
    assert handout.leaks(repository, SECRETS) == []


# ----------------------------------------------------------------------------------- a small tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one lab, whose solution is handed out: nothing has to be compiled."""
    folder = tmp_path / "tree"
    lab = folder / "labs" / "1-batching"
    lab.mkdir(parents=True)
    shutil.copy(LABS / "1-batching" / "lab.toml", lab)
    for name in ("mp_batch.c", "mp_flush.c"):
        (lab / name).write_text(SOLVED)
    (lab / "README.md").write_text("the lab\n")
    (lab / "mutants").mkdir()
    (lab / "mutants" / "a.patch").write_text("u32 taken = mp_one(ch) + 1;\n")
    for name in ("HANDOUT.md", "handout.toml"):
        shutil.copy(LABS / name, folder / "labs")
    (folder / "README.md").write_text("for instructors\n")
    (folder / ".gitignore").write_text("/results/\n")
    git(folder, "init", "--quiet")
    git(folder, "config", "user.name", "Ada")
    git(folder, "config", "user.email", "ada@lab.invalid")
    commit(folder)
    return folder


def make(tree: Path, target: Path, uncommitted: bool = False) -> None:
    handout.make(tree, target, source=["1-batching"], uncommitted=uncommitted)


def files_in(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.parts
    }


def test_a_handout_is_one_honest_commit(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "handout"
    make(tree, target)
    assert git(target, "log", "--format=%an <%ae>") == "Ada <ada@lab.invalid>"
    message = git(target, "log", "--format=%B")
    assert f"from commit {git(tree, 'rev-parse', '--short=12', 'HEAD')} of" in message
    assert "given of: 1-batching" in message
    assert git(target, "status", "--porcelain", "--ignored") == ""
    assert files_in(target) == {
        ".gitignore",
        "README.md",
        "labs/1-batching/README.md",
        "labs/1-batching/lab.toml",
        *(
            f"labs/1-batching/{folder}{name}"
            for folder in ("", "given/starter/", "given/solution/")
            for name in ("mp_batch.c", "mp_flush.c")
        ),
    }
    assert "for instructors" not in (target / "README.md").read_text()
    assert "$" not in (target / "README.md").read_text()
    assert list(target.parent.iterdir()) == [target]


def test_in_a_handout_each_variant_is_a_file_of_its_own(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "handout"
    make(tree, target)
    lab = target / "labs" / "1-batching"
    assert variant.usual(lab) == "mine" and variant.usual(LABS / "1-batching") == "solution"
    assert variant.mine(lab).key == variant.starter(lab).key
    (lab / "mp_batch.c").write_text("int mine;\n")
    assert variant.mine(lab).files["mp_batch.c"].read_text() == "int mine;\n"
    assert variant.starter(lab).files["mp_batch.c"].read_text() == variant.starter_text(SOLVED)
    solution = variant.solution(lab).files["mp_batch.c"].read_text()
    assert solution == variant.solved_text(SOLVED)
    assert "SOLUTION" not in solution and "mp_all" in solution and "mp_one" not in solution


def test_a_lab_that_is_only_there_for_others_cannot_be_worked_on(
    tree: Path, tmp_path: Path
) -> None:
    other = tree / "labs" / "2-other"
    other.mkdir()
    (other / "lab.toml").write_text(
        (LABS / "1-batching" / "lab.toml").read_text().replace('"mp_batch.c"', '"other.c"')
    )
    (other / "other.c").write_text(SOLVED)
    (other / "mp_flush.c").write_text(SOLVED)
    commit(tree)
    target = tmp_path / "handout"
    handout.make(tree, target, labs=["2-other"], source=["1-batching", "2-other"])
    assert (target / "labs" / "2-other" / "given" / "starter" / "other.c").is_file()
    first = target / "labs" / "1-batching"
    assert files_in(first) == {
        "lab.toml",
        "given/solution/mp_batch.c",
        "given/solution/mp_flush.c",
    }
    for choose in (variant.mine, variant.starter):
        with pytest.raises(UserError, match="1-batching is here only") as caught:
            choose(first)
        assert "--lab 2-other" in caught.value.todo
    assert setup.usual_lab(target) == "2-other"
    assert setup.usual_lab(tree) == setup.LAB


def test_lab_files_must_be_committed_unless_one_says_so(tree: Path, tmp_path: Path) -> None:
    changed = tree / "labs" / "1-batching" / "mp_batch.c"
    changed.write_text(SOLVED.replace("mp_one", "mp_two"))
    with pytest.raises(UserError, match=r"not committed: labs/1-batching/mp_batch\.c"):
        make(tree, tmp_path / "handout")
    assert not (tmp_path / "handout").exists()
    make(tree, tmp_path / "handout", uncommitted=True)
    handed_out = tmp_path / "handout" / "labs" / "1-batching" / "mp_batch.c"
    assert "mp_two" in handed_out.read_text()
    head = git(tree, "rev-parse", "--short=12", "HEAD")
    assert f"from commit {head}+ of" in git(tmp_path / "handout", "log", "--format=%B")


def test_nothing_is_made_over_what_is_there(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "handout"
    target.mkdir()
    make(tree, target)
    before = files_in(target)
    with pytest.raises(UserError, match="there already"):
        make(tree, target)
    assert files_in(target) == before


def test_unknown_labs_are_refused_with_the_known_ones(tree: Path, tmp_path: Path) -> None:
    for labs, source in ((["9-x"], []), ([], ["9-x"])):
        with pytest.raises(UserError, match="no lab 9-x") as caught:
            handout.make(tree, tmp_path / "handout", labs=labs, source=source)
        assert "1-batching" in caught.value.todo


def test_a_tree_that_git_does_not_know_is_refused(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / ".git")
    with pytest.raises(UserError, match="git ls-files failed"):
        make(tree, tmp_path / "handout")


def test_what_fails_on_the_way_leaves_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(handout, "leaks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tree, tmp_path / "handout")
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


# ------------------------------------------------------------------------------------ this tree


@pytest.fixture(scope="module")
def real() -> handout.Plan:
    return handout.plan(setup.ROOT)


def test_nothing_that_is_copied_holds_a_solution(real: handout.Plan) -> None:
    secrets = real.secrets()
    assert len(secrets.needles) > 50
    for file in real.hidden():
        assert list(secrets.found_in(file.path, file.solved.encode()))
        starter = variant.starter_text(file.solved, file.path)
        assert not list(secrets.found_in(file.path, starter.encode()))
    for name in real.copied:
        assert not list(secrets.found_in(name, (setup.ROOT / name).read_bytes()))


def test_every_file_of_the_module_and_the_library_is_hidden(real: handout.Plan) -> None:
    assert {file.name for file in real.hidden()} >= {
        "mp_batch.c",
        "mp_flush.c",
        "mp_partition.c",
        "mp_lwsocket.c",
    }


def test_nothing_of_instructors_is_copied(real: handout.Plan) -> None:
    words = ("mutant", "cheat", "prove", "handout", "HANDOUT", ".ci")
    assert [name for name in real.copied if any(word in name for word in words)] == []


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_what_is_copied_imports_nothing_that_is_not(real: handout.Plan) -> None:
    copied = set(real.copied)
    lacking = set()
    for name in copied:
        # The verbs of instructors are none in a handout.
        if not name.endswith(".py") or name == "tasks.py":
            continue
        for module in _imports(setup.ROOT / name):
            stem = module.replace(".", "/")
            for file in (f"{stem}.py", f"{stem}/__init__.py"):
                if (setup.ROOT / file).is_file() and file not in copied:
                    lacking.add((name, file))
    assert lacking == set()


def test_what_its_texts_link_to_is_there(real: handout.Plan) -> None:
    there = {*real.copied, handout.TEMPLATE, "README.md"}
    folders = {str(parent) for name in there for parent in Path(name).parents}
    texts = [name for name in there if name.endswith(".md") and name != "README.md"]
    assert len(texts) > 3
    for name in texts:
        # The template becomes the README at the top.
        folder = "" if name == handout.TEMPLATE else str(Path(name).parent)
        for link in re.findall(r"\]\(([^)#:$]+)\)", (setup.ROOT / name).read_text()):
            target = os.path.normpath(Path(folder) / link)
            assert target in there | folders, f"{name} links to {link}"


# ------------------------------------------------------------------------------ the whole of it


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as it is now, committed."""
    folder = tmp_path_factory.mktemp("tree") / "tree"
    listed = git(setup.ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (setup.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(setup.ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def in_handout(target: Path, *arguments: str) -> str:
    """Run Python as a student would, with the handout's own code."""
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=target,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SERVE = """\
from grader import variant
from grader.experiment import Session
from grader.lab import LoadShape, load_lab
from grader.station import Station, build
from kernel.build import build_kernel

lab = load_lab("1-batching")
kernel = build_kernel()
for choose in (variant.mine, variant.solution):
    built = build(lab, choose(lab.folder), kernel)
    with Station(built, counted=False) as station:
        with Session(station, "mp-server --batch", LoadShape(32, 2, 64), 1) as session:
            print(choose.__name__, session.run(256).transactions)
build(lab, variant.solution(lab.folder), build_kernel(debug=True))
print(sorted(path.name for path in variant.solution(lab.folder).files.values()))
"""


def test_in_a_handout_the_objects_serve(
    copied_tree: Path, kernel: Kernel, debug_kernel: Kernel, tmp_path: Path
) -> None:
    assert kernel.key != debug_kernel.key
    target = tmp_path / "handout"
    handout.make(copied_tree, target)
    assert in_handout(target, "-c", SERVE).splitlines() == [
        "mine 256",
        "solution 256",
        "['mp_batch.objects', 'mp_flush.objects']",
    ]
    objects = list(target.rglob("*.o"))
    assert {path.name for path in objects} == {"kernel.o", "debug-kernel.o", "library.o"}
    for path in objects:
        assert str(cache.root()).encode() not in path.read_bytes(), path
    listed = in_handout(target, "-m", "invoke", "--list")
    assert " grade " in listed and " submit " in listed and " handout " not in listed
    in_handout(target, "-m", "pytest", "-q", "--collect-only", "-m", "not vm")
    packed = in_handout(target, "-m", "invoke", "submit", "--out", str(tmp_path / "it.tar.gz"))
    assert "mp_batch.c is the starter still" in packed
    made = variant.submission(LABS / "1-batching", tmp_path / "it.tar.gz")
    assert made.key == variant.starter(LABS / "1-batching").key


def test_a_planted_line_stops_the_verb(
    copied_tree: Path, kernel: Kernel, debug_kernel: Kernel, tmp_path: Path
) -> None:
    assert kernel.key != debug_kernel.key
    planted = tmp_path / "planted"
    shutil.copytree(copied_tree, planted)
    file = next(f for f in handout.plan(copied_tree).hidden() if f.path.endswith(".c"))
    regions = variant.solution_regions(file.solved, file.path)
    line = max(regions[0].split("\n"), key=len).strip()
    template = planted / handout.TEMPLATE
    template.write_text(f"{template.read_text()}\nHint: `{line}`\n")
    commit(planted)
    with pytest.raises(LeakError) as caught:
        handout.make(planted, tmp_path / "handout")
    assert any(leak.place == "README.md" for leak in caught.value.leaks)
    assert any(leak.place.startswith("git object") for leak in caught.value.leaks)
    assert line in caught.value.problem
    assert not (tmp_path / "handout").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted"]
