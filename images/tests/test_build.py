"""The guest's programs and its initramfs: what is in them, and that their bytes repeat."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from grader import given
from grader.given import GivenError, GivenObject
from images import build

HELLO = "#include <megapipe_abi.h>\n#include <stdio.h>\nint main(void) { return mp_answer(); }\n"


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small guest folder, with a space in its path and a library, and a cache of its own."""
    folder = tmp_path / "a guest"
    (folder / "libmegapipe").mkdir(parents=True)
    for name in ("init", "Makefile"):
        shutil.copy(build.GUEST / name, folder)
    (folder / "hello.c").write_text(HELLO)
    (folder / "libmegapipe" / "core.c").write_text(
        "int mp_student(void);\nint mp_answer(void) { return mp_student(); }\n"
    )
    (folder / "uapi").mkdir()
    (folder / "uapi" / "megapipe_abi.h").write_text("int mp_answer(void);\n")
    (folder / "student").mkdir()
    (folder / "student" / "flush.c").write_text("int mp_student(void) { return 42; }\n")
    monkeypatch.setattr(build, "GUEST", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    return folder


def programs(guest: Path) -> Path:
    return build.build_programs([guest / "student" / "flush.c"], guest / "uapi")


def listing(archive: Path) -> dict[str, list[str]]:
    with archive.open() as file:
        shown = subprocess.check_output(["cpio", "--quiet", "-itvn"], stdin=file, text=True)
    rows = [line.split() for line in shown.splitlines()]
    return {row[8]: row for row in rows}


def test_every_c_file_is_a_program_linked_with_the_library_and_the_given_file(guest: Path) -> None:
    folder = programs(guest)
    assert [path.name for path in (folder / "bin").iterdir()] == ["hello"]
    assert subprocess.run([folder / "bin" / "hello"], check=False).returncode == 42
    assert not build._needs_interpreter(folder / "bin" / "hello")
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_a_folder_with_a_main_is_one_program_of_all_its_files(guest: Path) -> None:
    folder = guest / "several"
    folder.mkdir()
    (folder / "several.h").write_text("int other(void);\n")
    (folder / "other.c").write_text('#include "several.h"\nint other(void) { return 7; }\n')
    (folder / "main.c").write_text('#include "several.h"\nint main(void) { return other(); }\n')
    built = programs(guest)
    assert sorted(path.name for path in (built / "bin").iterdir()) == ["hello", "several"]
    assert subprocess.run([built / "bin" / "several"], check=False).returncode == 7
    (folder / "several.h").write_text("int other(void); /* changed */\n")
    assert programs(guest) != built


def test_a_given_object_takes_the_place_of_its_source(guest: Path) -> None:
    source, uapi = guest / "student" / "flush.c", guest / "uapi"
    code = build.library_object(programs(guest), source).read_bytes()
    # Nothing of the compiler's own language, which only the same version of it reads.
    assert b".gnu.lto" not in code
    folder = guest / "student" / given.folder_name("flush.c")
    given.write(folder, "", [GivenObject("library", code, build.made_for(uapi))])
    source.unlink()
    built = build.build_programs([folder], uapi)
    assert subprocess.run([built / "bin" / "hello"], check=False).returncode == 42
    (guest / "libmegapipe" / "new.h").write_text("struct mp_changed { int x; };\n")
    with pytest.raises(GivenError, match="libmegapipe"):
        build.build_programs([folder], uapi)


def test_a_changed_header_is_built_again(guest: Path, tmp_path: Path) -> None:
    shutil.copytree(guest, tmp_path / "guest")
    folder = tmp_path / "guest" / "several"
    folder.mkdir()
    (folder / "several.h").write_text("#define ANSWER 7\n")
    (folder / "main.c").write_text('#include "several.h"\nint main(void) { return ANSWER; }\n')
    command = ["make", "--silent", "-f", "guest/Makefile", "S=guest", "O=out", "HEADERS=guest/uapi"]
    command.append("LIBRARY=guest/student/flush.c")
    for answer in (7, 8):
        (folder / "several.h").write_text(f"#define ANSWER {answer}\n")
        subprocess.run(command, cwd=tmp_path, check=True)
        done = subprocess.run([tmp_path / "out" / "bin" / "several"], check=False)
        assert done.returncode == answer


def test_the_key_follows_every_input(guest: Path) -> None:
    seen = {programs(guest)}
    assert programs(guest) in seen
    for name, text in (
        ("student/flush.c", "int mp_student(void) { return 43; }\n"),
        ("uapi/megapipe_abi.h", "int mp_answer(void); /* changed */\n"),
        ("libmegapipe/new.h", "\n"),
        ("hello.c", HELLO + "/* changed */\n"),
    ):
        (guest / name).write_text(text)
        folder = programs(guest)
        assert folder not in seen
        seen.add(folder)
    assert subprocess.run([folder / "bin" / "hello"], check=False).returncode == 43


def test_a_compile_error_shows_the_compilers_text_and_the_given_path(guest: Path) -> None:
    source = guest / "student" / "flush.c"
    source.write_text("int mp_student(void) { return undeclared_word; }\n")
    with pytest.raises(build.CompileError) as caught:
        programs(guest)
    assert "undeclared_word" in caught.value.text
    assert f"{source}:1:31: error:" in caught.value.text
    source.write_text("int mp_student(void) { return 42; }\n")
    assert programs(guest).is_dir()


def test_a_link_error_is_a_compile_error(guest: Path) -> None:
    with pytest.raises(build.CompileError, match="mp_student"):
        build.build_programs([], guest / "uapi")


def test_missing_inputs_are_named(guest: Path) -> None:
    with pytest.raises(build.BuildError, match="nowhere"):
        build.build_programs([guest / "nowhere.c"], guest / "uapi")
    twice = guest / "flush.c"
    twice.write_text("\n")
    with pytest.raises(build.BuildError, match="same file name"):
        build.build_programs([twice, guest / "student" / "flush.c"], guest / "uapi")


def test_an_image_without_a_library_folder(guest: Path) -> None:
    shutil.rmtree(guest / "libmegapipe")
    (guest / "hello.c").write_text("int main(void) { return 0; }\n")
    assert (build.build_programs([], guest / "uapi") / "bin" / "hello").is_file()


def test_headers_of_the_kernel_take_the_place_of_the_distributions(guest: Path) -> None:
    uapi = guest / "source" / "linux"
    for name in build.KERNEL_HEADERS:
        (uapi / name).parent.mkdir(parents=True, exist_ok=True)
        (uapi / name).write_text("enum { ANSWER = 43 };\n")
    # Not one of them: were it found, nothing would compile.
    (uapi / "linux" / "types.h").write_text("#error this is the kernel's own\n")
    (guest / "hello.c").write_text(
        "#include <linux/io_uring.h>\n#include <linux/types.h>\nint main(void) { return ANSWER; }\n"
    )
    student = guest / "student" / "flush.c"
    with pytest.raises(build.CompileError, match="ANSWER"):
        build.build_programs([student], guest / "uapi")
    built = build.build_programs([student], guest / "uapi", uapi)
    assert subprocess.run([built / "bin" / "hello"], check=False).returncode == 43
    (uapi / build.KERNEL_HEADERS[0]).write_text("enum { ANSWER = 44 };\n")
    again = build.build_programs([student], guest / "uapi", uapi)
    assert subprocess.run([again / "bin" / "hello"], check=False).returncode == 44
    (uapi / build.KERNEL_HEADERS[0]).unlink()
    with pytest.raises(build.BuildError, match=build.KERNEL_HEADERS[0]):
        build.build_programs([student], guest / "uapi", uapi)


def test_the_image_holds_what_the_guest_needs(guest: Path) -> None:
    source, module = guest / "module.c", guest / "some.ko"
    source.write_text("int answer(void) { return 42; }\n")
    subprocess.run(["gcc", "-g", "-c", source, "-o", module], check=True)
    source.unlink()
    image = build.build_image(programs(guest), [module])
    entries = listing(image.initramfs)
    # Without what only debuggers read.
    assert b".debug_info" in module.read_bytes()
    assert 0 < int(entries["some.ko"][4]) < module.stat().st_size
    for name in ("init", "bin/busybox", "bin/sh", "bin/hello", "some.ko", "etc/passwd", "tmp"):
        assert name in entries, name
    assert entries["init"][0] == "-rwxr-xr-x"
    assert {(row[2], row[3]) for row in entries.values()} == {("0", "0")}
    assert not [row for row in entries.values() if row[0][0] in "bcps"]
    assert not (image.initramfs.parent / "stage").exists()


def test_the_images_bytes_repeat(guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build_image(programs(guest), [])
    one = first.initramfs.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(guest.parent / "another cache"))
    second = build.build_image(programs(guest), [])
    assert second.initramfs != first.initramfs and second.key == first.key
    assert second.initramfs.read_bytes() == one


def test_a_busybox_with_libraries_is_refused(
    guest: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    found = shutil.which("true")
    assert found
    (tools / "busybox").symlink_to(found)
    folder = programs(guest)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(build.BuildError, match="not statically linked"):
        build.build_image(folder, [])
    (tools / "busybox").unlink()
    with pytest.raises(build.BuildError, match="busybox is missing"):
        build.build_image(folder, [])
