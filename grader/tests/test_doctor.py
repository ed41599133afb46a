from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from grader import cache, cleaning, doctor, setup
from grader.doctor import Finding, State
from grader.errors import UserError


def report(*checks: doctor.Check, terminal: bool = False) -> tuple[int, str]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80, color_system=None)
    return doctor.run(checks, console), text.getvalue()


def good() -> Iterator[Finding]:
    yield Finding("thing", State.OK, "1.0 [not markup]")


def poor() -> Iterator[Finding]:
    yield Finding("kvm", State.WARN, "slow", "nothing")


def lacking() -> Iterator[Finding]:
    yield Finding("gcc", State.MISSING, "compiles", f"run   apt-get install {'x' * 100} gcc")


def falls_over() -> Iterator[Finding]:
    raise RuntimeError("oops")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_warning_does_not_keep_a_machine_from_grading(terminal: bool) -> None:
    status, text = report(good, poor, terminal=terminal)
    assert status == 0
    assert "can grade" in text
    assert "1.0 [not markup]" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_missing_makes_the_status_1_and_says_what_to_do(terminal: bool) -> None:
    status, text = report(good, lacking, terminal=terminal)
    assert status == 1
    assert f"run   apt-get install {'x' * 100} gcc\n" in text, "a command is one line"


def test_without_a_terminal_each_line_starts_with_its_state() -> None:
    _, text = report(good, poor, lacking)
    states = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert states == ["ok", "warn", "missing", "something"]


def test_a_check_that_falls_over_is_a_finding_and_the_rest_goes_on() -> None:
    status, text = report(falls_over, good)
    assert status == 1
    assert "falls over" in text
    assert "oops" in text
    assert "thing" in text


PROGRAM = '#!/bin/sh\necho "{}"\nexit {}\n'


def fake_qemu(folder: Path, text: str, status: int = 0) -> None:
    path = folder / "qemu-system-x86_64"
    path.write_text(PROGRAM.format(text, status))
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "status", "state"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", 0, State.OK),
        ("QEMU emulator version 10.0.13 (Debian 1:10.0.13)", 0, State.OK),
        ("QEMU emulator version 7.1.0", 0, State.BROKEN),
        ("QEMU emulator version 11.0.0", 0, State.WARN),
        ("error while loading shared libraries", 127, State.BROKEN),
    ],
)
def test_versions_of_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int, state: State
) -> None:
    fake_qemu(tmp_path, text, status)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (finding,) = doctor.qemu()
    assert finding.state is state
    assert bool(finding.todo) is (state is not State.OK)


def test_packages_that_are_missing_are_named_with_one_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = setup.Package("present", "is there", commands=("sh",))
    gone = [setup.Package(f"gone-{i}", "is not", commands=(f"no-{i}",)) for i in range(2)]
    comfort = setup.Package("comfort", "is nice", commands=("no-3",), optional=True)
    monkeypatch.setattr(setup, "PACKAGES", (here, *gone, comfort))
    found = {finding.what: finding for finding in doctor.packages()}
    states = [found[name].state for name in ("present", "gone-0", "gone-1", "comfort")]
    assert states == [State.OK, State.MISSING, State.MISSING, State.WARN]
    assert "gone-0" in found["debian packages"].todo
    assert "comfort" not in found["debian packages"].todo


def test_an_installed_package_that_lost_its_program_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = setup.Package("flex", "the parser", commands=("no-such-flex",))
    monkeypatch.setattr(setup, "PACKAGES", (package,))
    monkeypatch.setattr(setup, "debian_versions", lambda names: dict.fromkeys(names, "2.6"))
    (finding,) = doctor.packages()
    assert finding.state is State.BROKEN
    assert "no-such-flex" in finding.found
    assert "--reinstall" in finding.todo


def test_other_versions_of_python_packages_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "pins", lambda _: ["rich==0.1", "no-such-package==1.0"])
    finding = list(doctor.python())[-1]
    assert finding.state is State.BROKEN
    assert "instead of 0.1" in finding.found
    assert "no-such-package none" in finding.found


def test_a_named_kernel_source_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "linux-6.12.tar.xz"
    monkeypatch.setenv("KERNEL_TARBALL", str(archive))
    (finding,) = doctor.kernel_source()
    assert finding.state is State.MISSING
    archive.touch()
    (finding,) = doctor.kernel_source()
    assert finding.state is State.OK
    assert str(archive) in finding.found


def test_too_little_room_is_broken(tmp_path: Path) -> None:
    assert doctor._room("disk", tmp_path, 10, 20, "another").state is State.BROKEN
    assert doctor._room("disk", tmp_path, 20, 20, "another").state is State.OK


def test_a_missing_tun_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TUN", tmp_path / "tun")
    (finding,) = doctor.tun()
    assert finding.state is State.MISSING
    (tmp_path / "tun").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (finding,) = doctor.tun()
    assert finding.state is State.BROKEN
    assert "chmod" in finding.todo


def test_students_files_need_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.confinement()
    assert finding.state is State.OK
    monkeypatch.setenv("PATH", "/nowhere")
    (finding,) = doctor.confinement()
    assert finding.state is State.BROKEN
    assert "bubblewrap" in finding.todo


def test_this_machine_links_static_programs() -> None:
    (finding,) = doctor.compiler()
    assert finding.state is State.OK


# -------------------------------------------------------------------------------- cleaning


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache.root()
    (folder / "kernel" / "abc").mkdir(parents=True)
    (folder / "kernel" / "abc" / "vmlinux").write_bytes(os.urandom(1 << 20))
    return folder


def test_clean_frees_the_cache_and_says_how_much(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.disk_usage(own_cache) >= 1 << 20
    cleaning.run(yes=True)
    assert not own_cache.exists()
    assert "freed 1.1 MB" in capsys.readouterr().out


def test_clean_does_nothing_unasked(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="nobody to ask"):
        cleaning.run()
    assert (own_cache / "kernel" / "abc" / "vmlinux").exists()


def test_clean_leaves_a_cache_in_use_alone(own_cache: Path) -> None:
    with cache.locked("kernel-abc"), pytest.raises(UserError, match="kernel-abc"):
        cleaning.run(yes=True)
    assert (own_cache / "kernel" / "abc" / "vmlinux").exists()
