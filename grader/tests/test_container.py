"""Without namespaces, in a container that is thrown away: what works, and what still holds."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from grader import confined, container, exact
from grader.confined import Limits
from grader.errors import UserError
from grader.lab import load_lab
from grader.progress import Progress
from grader.samples import Cell
from grader.station import build_solution

GCC = ["gcc", "-O2", "-g", f"-ffile-prefix-map={confined.PLACE}=.", "-c", "a.c"]
SOURCE = {"a.c": b"int twice(int x) { return 2 * x; }\n"}


@pytest.fixture
def no_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Say that this is such a container, and let whoever makes namespaces fail, and be known."""
    used = tmp_path / "used"
    for tool in ("bwrap", "unshare", "nsenter"):
        shim = tmp_path / "bin" / tool
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(f"#!/bin/sh\necho {tool} >> {used}\nexit 1\n")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv(container.VARIABLE, "1")
    return used


@pytest.mark.usefixtures("no_namespaces")
def test_what_is_compiled_is_the_same_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    here = confined.run(GCC, SOURCE, ["a.o"])
    monkeypatch.delenv(container.VARIABLE)
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    assert here.status == 0
    assert here.files == confined.run(GCC, SOURCE, ["a.o"]).files


def test_limits_hold_and_no_process_is_left(no_namespaces: Path) -> None:
    mark = f"1000.{os.getpid()}"
    done = confined.run(["sh", "-c", f"setsid sleep {mark} & echo $$; exit 4"], {}, [])
    assert done.status == 4
    if os.geteuid() == 0:
        assert not [p for p in psutil.process_iter() if mark in " ".join(_words(p))]
    late = confined.run(["sleep", "60"], {}, [], allowed=Limits(seconds=0.2))
    assert "from start to end" in late.limit or late.status != 0
    large = confined.run(
        ["sh", "-c", "head -c 9000 /dev/zero > a"], {}, [], allowed=Limits(file=4096)
    )
    assert "became larger" in large.limit
    assert not no_namespaces.exists()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user compile")
@pytest.mark.usefixtures("no_namespaces")
def test_roots_compiler_is_another_user_who_must_see_the_sources(tmp_path: Path) -> None:
    assert confined.run(["id", "-u"], {}, []).text.strip() not in ("0", "")
    tmp_path.chmod(0o700)
    with pytest.raises(confined.Unavailable, match="cannot look into"):
        confined.run(["true"], {}, [], readable=[tmp_path])


def test_anything_but_yes_or_no_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(container.VARIABLE, "yes")
    with pytest.raises(UserError, match="MEGAPIPE_CONTAINER=yes"):
        container.thrown_away()


@pytest.mark.vm
def test_a_cell_is_measured_without_namespaces(
    no_namespaces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(container.VARIABLE)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", path.partition(":")[2])
    built = build_solution(load_lab("3-lwsocket"), Progress(quiet=True))
    made = exact.image(built)
    cell, setting, stop = Cell(1, 64, 1), exact.Setting(0), threading.Event()
    apart = exact.measure_cell(built, made, cell, "BPL", setting, stop)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv(container.VARIABLE, "1")
    here = exact.measure_cell(built, made, cell, "BPL", setting, stop)
    assert (here.short, here.long) == (apart.short, apart.long)
    assert not no_namespaces.exists()
