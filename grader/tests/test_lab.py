"""lab.toml: the real one is right, and each mistake in one is named."""

import re
from pathlib import Path

import pytest

from grader.errors import UserError
from grader.lab import LABS, LabError, known_labs, load_lab

REAL = (LABS / "1-batching" / "lab.toml").read_text()


def test_the_real_lab() -> None:
    lab = load_lab("1-batching")
    assert "1-batching" in known_labs()
    assert lab.kernel_files == ("mp_batch.c",)
    assert {check.evidence for check in lab.checks} == {"wire", "probe, confirmed by wire"}
    same = {check.id: check.load for check in lab.checks}
    assert same["wakeups-long"] == same["crossings-long"]
    assert all(check.hint for check in lab.checks)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('id = "serve-long"', 'id = "serve-short"', "two checks are called serve-short"),
        ('metric = "wakeups"', 'metric = "luck"', "metric is none of"),
        ('same_run = "crossings-long"', 'same_run = "nothing"', "same_run names no earlier"),
        ("share = 0.60, points = 12", "share = 0.90, points = 12", "steps must increase"),
        ('check = "crossings-long"', 'check = "serve-one"', "is no reduction check"),
        ('rubric = "performance"', 'rubric = "beauty"', "there is no rubric beauty"),
        ("points = 7\n", "", "a serve check has points"),
        ('kernel = ["mp_batch.c"]', 'kernel = ["other.c"]', "kernel lists a file"),
        ("title = ", "titel = ", "missing or unknown key"),
        ("[active]", "[active", "Expected"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in REAL
    folder = tmp_path / "1-batching"
    folder.mkdir()
    (folder / "lab.toml").write_text(REAL.replace(old, new, 1))
    with pytest.raises(LabError, match=re.escape(complaint)):
        load_lab("1-batching", tmp_path)


def test_an_unknown_lab_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        load_lab("7-magic")
    assert "1-batching" in caught.value.todo
