from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from grader import submission
from grader.submission import SubmissionError, read, shown, unpack

WANTED = ("mp_batch.c", "mp_flush.c")
GOOD = {"mp_batch.c": b"int batch;\n", "mp_flush.c": "int flush; /* für dich */\n".encode()}
REST = {"mp_flush.c": GOOD["mp_flush.c"]}

Make = Callable[[Path, dict[str, bytes]], Path]


def make_zip(path: Path, entries: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def tar_bytes(
    entries: dict[str, bytes], *special: tarfile.TarInfo, kind: int = tarfile.PAX_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in special:
            archive.addfile(info)
    return buffer.getvalue()


def make_tar(path: Path, entries: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    path.write_bytes(gzip.compress(tar_bytes(entries, *special)))
    return path


def make_folder(path: Path, entries: dict[str, bytes]) -> Path:
    for name, data in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def refused(path: Path, why: str) -> SubmissionError:
    """Check that it is refused for this reason, with advice, in printable text."""
    with pytest.raises(SubmissionError, match=why) as error:
        read(path, WANTED)
    assert error.value.todo
    assert all(c.isprintable() or c == "\n" for c in error.value.report())
    return error.value


# ---------------------------------------------------------------------------------- taken


@pytest.mark.parametrize("make", [make_zip, make_tar, make_folder])
@pytest.mark.parametrize("prefix", ["", "labs/1-batching/", "jane-doe-submission/", "./"])
def test_the_files_are_found_wherever_they_lie(make: Make, prefix: str, tmp_path: Path) -> None:
    entries = {f"{prefix}{name}": data for name, data in GOOD.items()}
    made = make(tmp_path / "it", {**entries, "notes/README.md": b"hello"})
    done = unpack(made, WANTED, tmp_path / "out")
    assert {name: path.read_bytes() for name, path in done.files.items()} == GOOD
    assert done.ignored == ["notes/README.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(WANTED)


def test_xz_gnu_and_stored_archives_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(lzma.compress(tar_bytes(GOOD)))
    assert read(path, WANTED).files == GOOD
    path.write_bytes(gzip.compress(tar_bytes({"d" * 150 + "/x": b"x", **GOOD}, kind=1)))
    assert read(path, WANTED).files == GOOD
    assert read(make_zip(path, GOOD, method=zipfile.ZIP_STORED), WANTED).files == GOOD


def test_directory_entries_are_no_files(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("mp_batch.c")
    folder.type = tarfile.DIRTYPE
    refused(make_tar(tmp_path / "it", REST, folder), r"lacks mp_batch\.c")
    assert read(make_zip(tmp_path / "z", {"top/": b"", **GOOD}), WANTED).ignored == []


def test_windows_separators_are_separators(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "it", {f"work\\{name}": data for name, data in GOOD.items()})
    assert read(path, WANTED).files == GOOD


def test_archives_inside_are_ignored(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"mp_batch.c": b"other\n"}).read_bytes()
    made = read(make_zip(tmp_path / "it", {**GOOD, "inner.zip": inner}), WANTED)
    assert made.files == GOOD
    assert made.ignored == ["inner.zip"]


def test_the_list_of_ignored_files_is_bounded_and_printable(tmp_path: Path) -> None:
    many = {f"f{i:03}\u202ecod.exe": b"" for i in range(100)}
    made = read(make_zip(tmp_path / "it", {**many, **GOOD}), WANTED)
    assert made.ignored[0] == "f000\\u202ecod.exe"
    assert made.ignored[-1] == "... and 80 more"
    assert len(made.ignored) == submission.MAX_LISTED + 1


def test_nothing_is_written_over(tmp_path: Path) -> None:
    out = make_folder(tmp_path / "out", {"mp_flush.c": b"mine"})
    with pytest.raises(SubmissionError, match="already holds"):
        unpack(make_zip(tmp_path / "it", GOOD), WANTED, out)
    assert [path.name for path in out.iterdir()] == ["mp_flush.c"]
    assert (out / "mp_flush.c").read_bytes() == b"mine"


def test_a_link_in_the_target_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mp_batch.c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SubmissionError, match="already holds"):
        unpack(make_zip(tmp_path / "it", GOOD), WANTED, tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


# ------------------------------------------------------------------------- not what it takes


@pytest.mark.parametrize("make", [make_zip, make_tar, make_folder])
@pytest.mark.parametrize(
    ("entries", "why"),
    [
        (REST, r"lacks mp_batch\.c"),
        ({**REST, "MP_Batch.c": b"x\n"}, r"found only: mp_flush\.c, MP_Batch\.c"),
        ({**GOOD, "old/mp_batch.c": b"x\n"}, r"more than once: mp_batch\.c, old/mp_batch\.c"),
        ({**REST, "mp_batch.c": b" \n\n"}, "is empty"),
        ({**REST, "mp_batch.c": b'int a;\nchar b[] = "\0";\n'}, r"mp_batch\.c:2 holds a NUL"),
        ({**REST, "mp_batch.c": b"int a;\n/* f\xfcr */\n"}, r"mp_batch\.c:2 is not UTF-8"),
        ({**REST, "mp_batch.c": b"x" * (submission.MAX_FILE + 1)}, "larger than 256 KiB"),
    ],
)
def test_unusable_files_are_refused(
    make: Make,
    entries: dict[str, bytes],
    why: str,
    tmp_path: Path,
) -> None:
    error = refused(make(tmp_path / "it", entries), why)
    assert "mp_batch.c" in error.report()


def test_a_file_of_the_largest_size_is_taken(tmp_path: Path) -> None:
    largest = os.urandom(submission.MAX_FILE // 2).hex().encode()
    assert read(make_zip(tmp_path / "it", {**REST, "mp_batch.c": largest}), WANTED).files


@pytest.mark.parametrize(
    "data", [b"", b"int a;\n", b"PK\3\4", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"Rar!\x1a\x07\x01\0"]
)
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.zip").write_bytes(data)
    refused(tmp_path / "it.zip", "is damaged|is not a")


def test_what_is_not_there_or_not_a_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "cannot read")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "neither a folder nor a file")


@pytest.mark.parametrize("kind", ["zip", "gz", "xz"])
def test_damaged_archives_are_refused_wherever_the_damage_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    if kind == "zip":
        whole = make_zip(path, GOOD).read_bytes()
    else:
        whole = (gzip if kind == "gz" else lzma).compress(tar_bytes(GOOD))
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, ".")
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(SubmissionError):
            assert read(path, WANTED).files == GOOD


def test_a_tar_that_breaks_off_inside_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes(GOOD, kind=tarfile.USTAR_FORMAT)
    second = 2 * tarfile.BLOCKSIZE
    for data in (
        whole[: second + 700],
        whole[:second] + b"\xff" * 100 + whole[second + 100 :],
    ):
        (tmp_path / "it").write_bytes(gzip.compress(data))
        refused(tmp_path / "it", "is damaged")


# ------------------------------------------------------------------------------- hostile


HOSTILE_NAMES = [
    ("/etc/mp_batch.c", "absolute"),
    ("C:/mp_batch.c", "absolute"),
    ("../mp_batch.c", "leads out"),
    ("a/../../mp_batch.c", "leads out"),
    ("x\x1b[2J.c", r"x\\x1b\[2J\.c has control"),
    ("two\nlines", r"two\\nlines has control"),
]


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(("name", "why"), HOSTILE_NAMES)
def test_hostile_names_are_refused_even_beside_good_files(
    make: Make, name: str, why: str, tmp_path: Path
) -> None:
    refused(make(tmp_path / "it", {**GOOD, name: b"x\n"}), why)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]


def test_hostile_windows_names_are_refused(tmp_path: Path) -> None:
    refused(make_zip(tmp_path / "it", {**GOOD, "..\\..\\mp_batch.c": b"x"}), "leads out")


def test_a_name_cut_at_a_nul_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "it", {**REST, "mp_batch.c#exe": b"x\n"})
    path.write_bytes(path.read_bytes().replace(b".c#exe", b".c\0exe"))
    refused(path, "has control")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "it"
    data = tar_bytes({**GOOD, "n????": b"x"}, kind=tarfile.USTAR_FORMAT)
    good = tarfile.TarInfo("n????")
    good.size = 1
    bad = tarfile.TarInfo("n\udcff\udcfe??")
    bad.size = 1
    swapped = data.replace(
        good.tobuf(tarfile.USTAR_FORMAT), bad.tobuf(tarfile.USTAR_FORMAT, "utf-8")
    )
    assert swapped != data
    path.write_bytes(gzip.compress(swapped))
    refused(path, r"n\\udcff\\udcfe\?\? has a name that is not UTF-8")
    make_zip(path, {**GOOD, "nü": b"x"})
    path.write_bytes(path.read_bytes().replace("nü".encode(), b"n\xff\xfe"))
    refused(path, "a name that is not UTF-8")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "is a symbolic link"),
        (tarfile.LNKTYPE, "is a hard link"),
        (tarfile.CHRTYPE, "not an ordinary file"),
        (tarfile.BLKTYPE, "not an ordinary file"),
        (tarfile.FIFOTYPE, "not an ordinary file"),
        (tarfile.GNUTYPE_SPARSE, "not an ordinary file|is damaged"),
    ],
)
@pytest.mark.parametrize("name", ["mp_batch.c", "other"])
def test_special_entries_of_a_tar_are_refused(
    kind: bytes, why: str, name: str, tmp_path: Path
) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    refused(make_tar(tmp_path / "it", REST, info), why)


@pytest.mark.parametrize(
    ("mode", "why"), [(stat.S_IFLNK, "symbolic link"), (stat.S_IFIFO, "not an ordinary file")]
)
def test_special_entries_of_a_zip_are_refused(mode: int, why: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "it", "w") as archive:
        info = zipfile.ZipInfo("mp_batch.c")
        info.external_attr = (mode | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("mp_flush.c", GOOD["mp_flush.c"])
    refused(tmp_path / "it", why)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "it", GOOD)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    refused(path, "is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_bound_are_refused(method: int, tmp_path: Path) -> None:
    refused(make_zip(tmp_path / "it", GOOD, method=method), "unusual method")


@pytest.mark.parametrize("claimed", [10, 0xFFFFFFF0])
def test_a_zip_bomb_that_lies_about_its_size_is_refused(claimed: int, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "it", {**REST, "mp_batch.c": b"\n" * (64 << 20)})
    honest, lie = struct.pack("<L", 64 << 20), struct.pack("<L", claimed)
    data = path.read_bytes()
    assert data.count(honest) == 2
    path.write_bytes(data.replace(honest, lie))
    refused(path, "is damaged" if claimed == 10 else "unpacks to more than")


def test_an_honest_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "it", {**GOOD, "zeros": b"\0" * (20 << 20)})
    refused(path, "unpacks to more than 200 times")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_tar_bomb_is_refused(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(pack(tar_bytes({**GOOD, "zeros": b"\0" * (40 << 20)})))
    refused(tmp_path / "it", "unpacks to more than")


def test_incompressible_bulk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it.zip").write_bytes(b"PK\3\4" + bytes(submission.MAX_ARCHIVE))
    refused(tmp_path / "it.zip", "larger than 8 MiB")


def test_an_xz_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    compressor = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    data = bytearray(compressor.compress(tar_bytes(GOOD)) + compressor.flush())
    # The block header's only filter property is the dictionary's size; its CRC32 follows.
    start = 12
    header = data[start : start + (data[start] + 1) * 4 - 4]
    at = header.index(b"\x21\x01") + 2
    header[at] = 37  # 1.5 GiB
    crc = struct.pack("<L", zlib.crc32(header))
    data[start : start + len(header) + 4] = header + crc
    assert len(lzma.decompress(data)) == len(tar_bytes(GOOD)), "it is a sound archive"
    (tmp_path / "it").write_bytes(data)
    refused(tmp_path / "it", "is damaged")


@pytest.mark.parametrize("make", [make_zip, make_tar, make_folder])
def test_too_many_entries_are_refused(make: Make, tmp_path: Path) -> None:
    many = {f"e{i}": b"" for i in range(submission.MAX_ENTRIES + 1)}
    refused(make(tmp_path / "it", {**many, **GOOD}), "more than 2000|unpacks to more than")


def test_a_hundred_thousand_entries_are_refused(tmp_path: Path) -> None:
    block = tarfile.TarInfo("e").tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "it").write_bytes(gzip.compress(block * 100_000))
    refused(tmp_path / "it", "unpacks to more than")
    noisy = b"".join(
        tarfile.TarInfo(os.urandom(40).hex()).tobuf(tarfile.USTAR_FORMAT) for _ in range(5_000)
    )
    (tmp_path / "it").write_bytes(gzip.compress(noisy))
    refused(tmp_path / "it", "more than 2000 entries")


def pax(content: bytes, kind: bytes = b"x", size: int | None = None) -> bytes:
    info = tarfile.TarInfo("pax")
    info.type = kind
    info.size = len(content) if size is None else size
    padding = -len(content) % tarfile.BLOCKSIZE
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(padding)


@pytest.mark.parametrize(
    "prefix",
    [
        pax(b"1" * 200_000),  # tarfile looks at this in quadratic time
        pax(b"1" * 4096) * 70,
        pax(b"", size=-512),
        pax(b"12 size=-512\n") + tarfile.TarInfo("a").tobuf(),  # leads back to itself
        pax(b"7 a=bc\n") * 1500,  # tarfile recurses
        pax(b"12 path=\xff\xfe..\n"),
        pax(b"99999999999999999999 a=b\n"),
        pax(b"a" * 300, b"L", size=4 << 30),
    ],
)
def test_hostile_tar_headers_are_refused(prefix: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(gzip.compress(prefix + tar_bytes(GOOD), 1))
    refused(tmp_path / "it", ".")


def test_links_in_a_folder_are_refused_where_they_stand_for_a_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "it", REST)
    (folder / "mp_batch.c").symlink_to("/etc/hostname")
    refused(folder, "is a symbolic link")
    (folder / "mp_batch.c").unlink()
    (folder / "mp_batch.c").symlink_to("/etc")
    refused(folder, "is a symbolic link")
    (folder / "mp_batch.c").unlink()
    os.mkfifo(folder / "mp_batch.c")
    refused(folder, "not an ordinary file")


def test_loops_and_tools_folders_are_passed_by(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "it", {**GOOD, ".git/mp_batch.c": b"x\n", "sub/notes": b""})
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    made = read(folder, WANTED)
    assert made.files == GOOD
    assert sorted(made.ignored) == [".git/", "dangling", "sub/loop/", "sub/notes"]


def test_a_folder_of_great_depth_ends(tmp_path: Path) -> None:
    deep = make_folder(tmp_path / "it", GOOD)
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    assert read(tmp_path / "it", WANTED).files == GOOD


def test_a_wanted_name_is_a_plain_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain"):
        read(tmp_path, ["../x"])


def test_names_are_shown_on_one_printable_line() -> None:
    assert shown("a\n\x1b\u202e\udcffb") == "a\\n\\x1b\\u202e\\udcffb"
    assert len(shown("x" * 10_000)) == 100
