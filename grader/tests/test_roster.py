"""The layouts of a class's folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from grader import roster
from grader.roster import Roster, RosterError, Student, find, held
from grader.submission import SubmissionError

WANTED = ("mp_batch.c", "mp_flush.c")

METADATA = """
submission_100:
  :submitters:
  - :name: Ada Lovelace
    :sid: '0071'
    :email: ada@example.org
  :created_at: 2026-11-01 10:00:00.000000000 Z
  :score: !ruby/object:BigDecimal 18:0.1e2
  :results: {tests: [{output: "- :name: nobody"}]}
submission_101:
  :submitters:
  - :name: Off
    :sid:
    :email: off@example.org
  - :name: Grace Hopper
    :sid: 12
submission_102:
  :submitters:
  - :name: Absent
../escape:
  :submitters:
  - :name: Escape
submission_103: nothing
"""


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in WANTED:
        (path / name).write_text(f"int {path.name[:3]};\n")
    return path


def _archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in WANTED:
            archive.writestr(name, "int a;\n")
    return path


def _people(found: Roster) -> dict[str, list[Student]]:
    return {submission.place: list(submission.students) for submission in found.submissions}


def test_folders_and_archives_are_submissions_and_the_rest_is_named(tmp_path: Path) -> None:
    _folder(tmp_path / "zoe")
    _archive(tmp_path / "Bob.zip")
    for name in ("carl.tar.gz", "dora.tgz", "eve.tar.xz", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "results").mkdir()
    found = find(tmp_path, leave_out=[tmp_path / "results"])
    names = [submission.students[0].name for submission in found.submissions]
    assert names == ["Bob", "carl", "dora", "eve", "zoe"]
    assert found.unrecognised == ("notes.txt: neither a folder nor an archive",)


@pytest.mark.parametrize("nested", [False, True])
def test_gradescope_names_everybody_in_the_group(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "class"
    export = folder / "assignment_7_export" if nested else folder
    for number in (100, 101, 103, 104):
        _folder(export / f"submission_{number}")
    if not nested:
        _folder(tmp_path / "escape")
    (export / roster.METADATA).write_text(METADATA)
    found = find(folder)
    assert _people(found) == {
        "submission_100": [Student("Ada Lovelace", "0071")],
        "submission_101": [Student("Off", "off@example.org"), Student("Grace Hopper", "12")],
        "submission_102": [Student("Absent")],
        "../escape": [Student("Escape")],
        "submission_103": [Student("submission_103")],
        "submission_104": [Student("submission_104")],
    }
    absent = {s.place for s in found.submissions if s.path is None}
    assert absent == {"submission_102", "../escape"}
    assert found.unrecognised == ()


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\xff\xfe", "{1: 2}: 3"])
def test_gradescope_without_its_table_is_a_plain_folder(tmp_path: Path, text: str) -> None:
    _folder(tmp_path / "submission_1")
    (tmp_path / roster.METADATA).write_text(text, encoding="latin-1")
    found = find(tmp_path)
    assert _people(found) == {"submission_1": [Student("submission_1")]}
    (said,) = found.unrecognised
    assert said.startswith(roster.METADATA) and said.isprintable()


def test_moodle_folders_of_all_versions(tmp_path: Path) -> None:
    _folder(tmp_path / "Ada von Lovelace_4711_assignsubmission_file_")
    _folder(tmp_path / "Grace Hopper_12_assignsubmission_file")
    _folder(tmp_path / "Default group_assignsubmission_file_")
    _archive(tmp_path / "Bob_7_assignsubmission_file_lab.zip")
    (tmp_path / "Bob_8_assignsubmission_file_mp_batch.c").write_text("int a;\n")
    (tmp_path / "Ada von Lovelace_4711_assignsubmission_onlinetext_").mkdir()
    found = find(tmp_path)
    assert _people(found) == {
        "Ada von Lovelace_4711_assignsubmission_file_": [Student("Ada von Lovelace", "4711")],
        "Bob_7_assignsubmission_file_lab.zip": [Student("Bob", "7")],
        "Default group_assignsubmission_file_": [Student("Default group")],
        "Grace Hopper_12_assignsubmission_file": [Student("Grace Hopper", "12")],
    }
    assert found.unrecognised == (
        "Ada von Lovelace_4711_assignsubmission_onlinetext_: Moodle's onlinetext, not files",
        "Bob_8_assignsubmission_file_mp_batch.c: a loose file; download from Moodle with folders",
    )


def test_names_are_shown_escaped(tmp_path: Path) -> None:
    _folder(tmp_path / "a\n\x1b[2J\u202eb_5_assignsubmission_file_")
    (submission,) = find(tmp_path).submissions
    assert submission.students == (Student("a\\n\\x1b[2J\\u202eb", "5"),)
    assert submission.place.isprintable()
    assert submission.path is not None and submission.path.is_dir()


def test_a_folder_without_submissions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RosterError, match="no folder"):
        find(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RosterError, match=r"no submission in .*\(notes\.txt: neither"):
        find(tmp_path)


def test_the_archive_in_a_folder_is_what_counts_unless_files_lie_there(tmp_path: Path) -> None:
    top = tmp_path / "it"
    (top / "inner").mkdir(parents=True)
    (top / "readme.txt").write_text("")
    assert held(top, WANTED) == top
    packed = _archive(top / "inner" / "lab.zip")
    assert held(top, WANTED) == packed
    assert held(packed, WANTED) == packed
    _archive(top / "old.zip")
    with pytest.raises(SubmissionError, match=r"several archives: inner/lab\.zip, old\.zip"):
        held(top, WANTED)
    (top / "inner" / "mp_batch.c").write_text("int a;\n")
    assert held(top, WANTED) == top


def test_an_archive_behind_a_link_is_not_the_students(tmp_path: Path) -> None:
    _archive(tmp_path / "others.zip")
    top = tmp_path / "it"
    top.mkdir()
    (top / "mine.zip").symlink_to(tmp_path / "others.zip")
    assert held(top, WANTED) == top
