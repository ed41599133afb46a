"""Given objects: the one that fits is chosen, what differs is named, and names go."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from grader import given
from grader.given import GivenError, GivenObject

PLAIN = {given.KERNEL_SOURCE: "1", given.KERNEL_CONFIGURATION: "plain", given.MODULE_HEADERS: "h"}
DEBUG = {**PLAIN, given.KERNEL_CONFIGURATION: "debug"}

SECRET = """\
int shared(int);
static int counter;
static __attribute__((noipa)) int secret_helper(int x)
{
	return shared(x) + ++counter;
}
static __attribute__((noipa)) int known_helper(int x)
{
	return secret_helper(x) + secret_helper(x + 1);
}
int answer(void)
{
	return known_helper(1);
}
"""
MAIN = """\
int answer(void);
int shared(int x) { return 10 * x; }
int main(void) { return answer(); }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / given.folder_name("mp_batch.c")
    given.write(
        made,
        "Linux 6.12.1",
        [GivenObject("kernel", b"plain", PLAIN), GivenObject("debug-kernel", b"debug", DEBUG)],
    )
    return made


def test_the_object_that_fits_is_chosen(folder: Path) -> None:
    assert given.choose(folder, PLAIN).read_bytes() == b"plain"
    assert given.choose(folder, DEBUG).read_bytes() == b"debug"


def test_a_c_file_stands_for_itself(tmp_path: Path) -> None:
    assert given.choose(tmp_path / "mp_batch.c", PLAIN) == tmp_path / "mp_batch.c"


@pytest.mark.parametrize("thing", PLAIN)
def test_what_does_not_fit_is_named(folder: Path, thing: str) -> None:
    with pytest.raises(GivenError, match=r"Linux 6\.12\.1") as caught:
        given.choose(folder, {**DEBUG, thing: "another"})
    named = [other for other in PLAIN if f"{other} is not" in caught.value.problem]
    assert named == [thing]
    assert caught.value.todo


def test_another_source_is_known_before_anything_is_built(folder: Path) -> None:
    labs = folder.parent / "labs"
    place = labs / "1-test" / "given" / "solution"
    given.check_source(labs, "2")
    place.mkdir(parents=True)
    folder.rename(place / folder.name)
    given.check_source(labs, "1")
    with pytest.raises(GivenError, match=r"another source of the kernel: Linux 6\.12\.1"):
        given.check_source(labs, "2")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"version": 99, "objects": [1]})])
def test_a_damaged_description_is_no_traceback(folder: Path, text: str) -> None:
    (folder / given.DESCRIPTION).write_text(text)
    with pytest.raises(GivenError, match="cannot be read"):
        given.choose(folder, PLAIN)


def test_names_go_and_the_code_stays(tmp_path: Path) -> None:
    source, before, after = (tmp_path / name for name in ("a.c", "a.o", "b.o"))
    source.write_text(SECRET)
    subprocess.run(["gcc", "-O2", "-g", "-c", source, "-o", before], check=True)
    assert {"secret_helper", "known_helper", "counter"} <= set(given.local_symbols(before))
    after.write_bytes(given.neutral(before.read_bytes(), {"known_helper"}))
    names = given.local_symbols(after)
    assert "known_helper" in names
    assert all(given.NEUTRAL.fullmatch(name) for name in names if name != "known_helper")
    assert len(names) == len(given.local_symbols(before))
    for word in (b"secret", b"counter", str(tmp_path).encode()):
        assert word in before.read_bytes()
        assert word not in after.read_bytes()
    (tmp_path / "main.c").write_text(MAIN)
    program = tmp_path / "program"
    subprocess.run(["gcc", tmp_path / "main.c", after, "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == 11 + 22


def test_what_the_compiler_split_stays_together(tmp_path: Path) -> None:
    assembly, before, after = (tmp_path / name for name in ("a.s", "a.o", "b.o"))
    lines = [f"{name}: ret\n" for name in ("own", "own.cold", "own.part.0", "other", "known.cold")]
    assembly.write_text(".text\n" + "".join(lines))
    subprocess.run(["as", assembly, "-o", before], check=True)
    after.write_bytes(given.neutral(before.read_bytes(), {"known"}))
    own, cold, part, other, known = given.local_symbols(after)
    assert (cold, part, known) == (f"{own}.cold", f"{own}.part.0", "known.cold")
    assert len({own, other}) == 2
