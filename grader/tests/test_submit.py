"""What `invoke submit` packs is what the grader reads, and it says what it leaves out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from grader import submission, submit, variant
from grader.errors import UserError
from grader.submission import SubmissionError

FILES = {"mp_batch.c": b"int batch;\n", "mp_flush.c": b"int flush;\n"}


@pytest.fixture
def handout(tmp_path: Path) -> Path:
    """A handout as git has it, with one lab."""
    root = tmp_path / "handout"
    lab = root / "labs" / "1-test"
    for folder in (lab, lab / variant.GIVEN / "starter"):
        folder.mkdir(parents=True)
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
    (lab / "lab.toml").write_text('files = ["mp_batch.c", "mp_flush.c"]\n')
    (root / "main.c").write_text("int main;\n")
    (root / ".gitignore").write_text("*.o\n")
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.invalid"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "x")


def pack(root: Path, out: Path) -> submit.Packed:
    return submit.pack(root, root / "labs" / "1-test", out)


def test_what_is_packed_is_what_is_read(handout: Path, tmp_path: Path) -> None:
    out = tmp_path / "it.tar.gz"
    packed = pack(handout, out)
    assert packed.path == out
    read = submission.read(out, tuple(FILES))
    assert read.files == FILES
    assert read.ignored == []
    with tarfile.open(out) as archive:
        assert archive.getnames() == ["megapipe-submission.json", "mp_batch.c", "mp_flush.c"]
        assert {(entry.uid, entry.uname, entry.mode) for entry in archive} == {(0, "", 0o644)}
        file = archive.extractfile(submission.MANIFEST)
        assert file
        manifest = json.load(file)
    assert manifest["lab"] == "1-test"
    assert manifest["handout"] == git(handout, "rev-parse", "HEAD")
    assert manifest["handout"].startswith(manifest["commit"])
    assert [entry["size"] for entry in manifest["files"]] == [11, 11]


def test_the_same_files_give_the_same_bytes(handout: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"
    pack(handout, one)
    pack(handout, two)
    assert one.read_bytes() == two.read_bytes()
    changed = handout / "labs" / "1-test" / "mp_batch.c"
    changed.write_text("int other;\n")
    os.utime(changed, (1_700_000_000, 1_700_000_000))
    pack(handout, two)
    assert one.read_bytes() != two.read_bytes()


def test_the_starter_is_recognised(handout: Path, tmp_path: Path) -> None:
    (handout / "labs" / "1-test" / "mp_batch.c").write_text("int mine;\n")
    assert pack(handout, tmp_path / "it.tar.gz").untouched == ["mp_flush.c"]


def test_what_else_was_changed_is_listed_committed_or_not(handout: Path, tmp_path: Path) -> None:
    (handout / "labs" / "1-test" / "mp_batch.c").write_text("int mine;\n")
    (handout / "main.c").write_text("int changed;\n")
    commit(handout)
    (handout / "labs" / "1-test" / "helper\n.h").write_text("int new;\n")
    (handout / "ignored.o").write_text("\n")
    (handout / ".gitignore").unlink()
    packed = pack(handout, handout / "out.tar.gz")
    assert packed.left_out == [
        "D .gitignore",
        "M main.c",
        "? ignored.o",
        "? labs/1-test/helper\\n.h",
    ]


def test_in_the_instructors_tree_the_last_commit_is_what_counts(
    handout: Path, tmp_path: Path
) -> None:
    git(handout, "rm", "-r", "--quiet", f"labs/1-test/{variant.GIVEN}")
    commit(handout)
    assert pack(handout, tmp_path / "it.tar.gz").left_out == []


def test_without_git_of_its_own_nothing_can_be_said(handout: Path, tmp_path: Path) -> None:
    (handout / ".git").rename(tmp_path / ".git")
    assert pack(handout, tmp_path / "it.tar.gz").left_out is None


def test_what_would_be_refused_is_not_packed(handout: Path, tmp_path: Path) -> None:
    (handout / "labs" / "1-test" / "mp_flush.c").write_bytes(b"\xff\n")
    with pytest.raises(SubmissionError, match=r"mp_flush\.c:1 is not UTF-8"):
        pack(handout, tmp_path / "it.tar.gz")
    (handout / "labs" / "1-test" / "mp_flush.c").write_bytes(b" " * submission.MAX_FILE + b"x")
    with pytest.raises(SubmissionError, match="larger than"):
        pack(handout, tmp_path / "it.tar.gz")
    (handout / "labs" / "1-test" / "mp_flush.c").unlink()
    with pytest.raises(UserError, match="is not there"):
        pack(handout, tmp_path / "it.tar.gz")
    assert not (tmp_path / "it.tar.gz").exists()


def test_a_file_that_is_not_the_one_that_was_packed_is_refused(
    handout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "it.tar.gz"
    pack(handout, out)
    folder = tmp_path / "unpacked"
    with tarfile.open(out) as archive:
        archive.extractall(folder, filter="data")
    assert submission.read(folder, tuple(FILES)).files == FILES
    (folder / "mp_flush.c").write_text("int exchanged;\n")
    with pytest.raises(SubmissionError, match=r"mp_flush\.c is not the file"):
        submission.read(folder, tuple(FILES))


def test_a_submission_for_another_lab_says_so(handout: Path, tmp_path: Path) -> None:
    out = tmp_path / "it.tar.gz"
    pack(handout, out)
    with pytest.raises(SubmissionError, match="packed for lab 1-test"):
        submission.read(out, ("mp_partition.c",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        '{"version": 1}',
        '{"version": 1, "lab": "x", "files": [1]}',
        '{"version": 2, "lab": "x", "files": []}',
        '{"version": 1, "lab": "x", "files": []}',
    ],
)
def test_a_manifest_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    out = tmp_path / "it.tar"
    with tarfile.open(out, "w:gz") as archive:
        for name, data in {**FILES, submission.MANIFEST: text.encode()}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(SubmissionError, match="megapipe-submission"):
        submission.read(out, tuple(FILES))


def test_a_whole_handout_can_be_handed_in(handout: Path) -> None:
    (handout / "labs" / "1-test" / "mp_batch.c").write_text("int mine;\n")
    read = submission.read(handout, tuple(FILES))
    assert read.files == {**FILES, "mp_batch.c": b"int mine;\n"}
    assert f"labs/1-test/{variant.GIVEN}/starter/mp_batch.c" in read.ignored
