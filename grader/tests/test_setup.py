from __future__ import annotations

import fcntl
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pexpect
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grader import setup
from grader.errors import UserError
from grader.setup import Package

TOOL = Package("tool-package", "makes things", commands=("some-tool",))
OTHER = Package("other-package", "reads things", files=("/nonexistent/header.h",))

# Stand-ins for the system's programs: each logs its call, apt-get "installs" what it is asked.
APT_GET = """#!/bin/sh
echo "apt-get $*" >> "$LOG"
case $1 in
update) touch "$LOG.updated" ;;
install) [ -e "$LOG.fails" ] && exit 100; [ -e "$LOG.useless" ] || touch "$BIN/some-tool"
	chmod +x "$BIN/some-tool" 2>/dev/null ;;
esac
exit 0
"""
APT_CACHE = """#!/bin/sh
[ -e "$LOG.unknown" ] && exit 0
[ -e "$LOG.old" ] && [ ! -e "$LOG.updated" ] && exit 0
shift
for name; do printf '%s:\\n  Installed: (none)\\n  Candidate: 1.0\\n' "$name"; done
"""
DPKG_QUERY = """#!/bin/sh
[ -e "$LOG.installed" ] && cat "$LOG.installed"
exit 1
"""
SUDO = """#!/bin/sh
echo "sudo $*" >> "$LOG"
[ "$1" = -n ] && shift
exec "$@"
"""


class System:
    """A folder of programs that stands for the whole PATH, and the log of their calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        for name in ("sh", "env", "touch", "chmod", "cat", "printf"):
            found = next(p for d in ("/bin", "/usr/bin") if (p := Path(d, name)).exists())
            (self.bin / name).symlink_to(found)
        self.program("apt-get", APT_GET)
        self.program("apt-cache", APT_CACHE)
        self.program("dpkg-query", DPKG_QUERY)
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("BIN", str(self.bin))
        monkeypatch.setenv("LOG", str(self.log))
        for name in ("CI", "DEBIAN_FRONTEND", "KERNEL_TARBALL"):
            monkeypatch.delenv(name, raising=False)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def has(self, fact: str, text: str = "") -> None:
        Path(f"{self.log}.{fact}").write_text(text)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


INSTALL = "apt-get install --yes --no-install-recommends tool-package"
INSTALLED = f"{INSTALL} -o DPkg::Lock::Timeout=300"


# ------------------------------------------------------------------------------ packages


def test_what_is_missing_is_what_neither_dpkg_nor_the_path_has(system: System) -> None:
    assert setup.missing([TOOL, OTHER]) == [TOOL, OTHER]
    system.has("installed", "other-package ii  1.2-3\ntool-package rc  1.0\n")
    assert setup.missing([TOOL, OTHER]) == [TOOL]
    assert setup.debian_versions(["other-package"]) == {"other-package": "1.2-3"}
    system.program("some-tool", "#!/bin/sh\n")
    assert setup.missing([TOOL, OTHER]) == []


def test_a_held_package_is_there_and_a_broken_one_is_not(system: System) -> None:
    system.has("installed", "tool-package hi  1.0\nother-package iH  1.0\n")
    assert setup.missing([TOOL, OTHER]) == [OTHER]


def test_optional_packages_are_never_missing(system: System) -> None:
    assert setup.missing([Package("gdb", "debugs", ("no-such-gdb",), optional=True)]) == []


def test_a_tarball_stands_for_the_kernels_package(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(setup.KERNEL_SOURCE, "the source", files=("/nonexistent",))
    assert setup.missing([package]) == [package]
    monkeypatch.setenv("KERNEL_TARBALL", "/somewhere/linux.tar.xz")
    assert setup.missing([package]) == []


def test_a_package_for_python_counts_by_what_this_python_has(system: System) -> None:
    system.has("installed", "python3-venv ii  3.11\n")
    absent = Package("python3-venv", "makes .venv", modules=("no_such_module",))
    assert setup.missing([absent]) == [absent]


@pytest.mark.usefixtures("root")
def test_root_without_a_terminal_installs_at_once(system: System) -> None:
    setup.install([TOOL])
    assert system.calls() == [INSTALLED]


@pytest.mark.usefixtures("root")
def test_lists_are_fetched_only_where_apt_knows_too_little(system: System) -> None:
    system.has("old")
    setup.install([TOOL])
    assert system.calls() == ["apt-get update", INSTALLED]


@pytest.mark.usefixtures("root")
def test_a_failed_installation_is_tried_again_with_new_lists(system: System) -> None:
    system.has("fails")
    with pytest.raises(UserError, match="could not install") as error:
        setup.install([TOOL])
    assert system.calls() == [INSTALLED, "apt-get update", INSTALLED]
    assert INSTALL in error.value.todo


@pytest.mark.usefixtures("root")
def test_an_unknown_kernel_package_leads_to_the_tarball(system: System) -> None:
    system.has("unknown")
    with pytest.raises(UserError, match="knows no package") as error:
        setup.install([Package(setup.KERNEL_SOURCE, "the source", files=("/nonexistent",))])
    assert "KERNEL_TARBALL=" in error.value.todo
    assert system.calls() == ["apt-get update"]


@pytest.mark.usefixtures("root")
def test_an_installation_without_effect_is_noticed(system: System) -> None:
    system.has("useless")
    package = Package("python3-venv", "makes .venv", modules=("no_such_module",))
    with pytest.raises(UserError, match=r"python3-venv.*this Python") as error:
        setup.install([package])
    assert error.value.todo


@pytest.mark.usefixtures("user")
def test_a_user_without_a_terminal_is_told_what_to_run(system: System) -> None:
    with pytest.raises(UserError) as error:
        setup.install([TOOL])
    assert f"su -c '{INSTALL}'" in error.value.todo
    system.program("sudo", SUDO)
    with pytest.raises(UserError) as error:
        setup.install([TOOL])
    assert f"sudo {INSTALL}" in error.value.todo
    assert system.calls() == []


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("DEBIAN_FRONTEND", "noninteractive")])
def test_a_ci_job_installs_with_sudo_and_no_question(
    system: System, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError):
        setup.install([TOOL])
    system.program("sudo", SUDO)
    setup.install([TOOL])
    assert system.calls() == [f"sudo -n env DEBIAN_FRONTEND=noninteractive {INSTALLED}", INSTALLED]


@pytest.mark.usefixtures("root")
def test_elsewhere_the_programs_are_named(system: System) -> None:
    (system.bin / "apt-get").unlink()
    with pytest.raises(UserError) as error:
        setup.install([TOOL, OTHER])
    assert "some-tool" in error.value.todo
    assert "/nonexistent/header.h" in error.value.todo


@pytest.mark.parametrize(
    ("answer", "installs"), [("", True), ("y", True), ("n", False), ("what", False), (None, False)]
)
def test_on_a_terminal_it_asks(system: System, answer: str | None, installs: bool) -> None:
    system.program("sudo", SUDO)
    program = (
        "import os; os.geteuid = lambda: 1000\n"
        "from grader import setup; from grader.errors import UserError\n"
        "try: setup.install([setup.Package('tool-package', 'makes things', ('some-tool',))])\n"
        "except UserError as error: print(error.report())\n"
    )
    with pexpect.spawn(
        sys.executable, ["-c", program], cwd=str(setup.ROOT), encoding="utf-8", timeout=30
    ) as child:
        child.expect_exact("tool-package         makes things")
        child.expect_exact("[Y/n] ")
        if answer is None:
            child.sendeof()
        else:
            child.sendline(answer)
        child.expect(pexpect.EOF)
        assert ("nothing was installed" in child.before) is not installs
    assert (INSTALLED in system.calls()) is installs


def test_every_package_says_why_and_what_it_provides() -> None:
    assert len({package.name for package in setup.PACKAGES}) == len(setup.PACKAGES)
    for package in setup.PACKAGES:
        assert package.reason
        assert package.commands or package.files or package.modules, package.name


# --------------------------------------------------------------------------- environment


def wheel(folder: Path, version: str) -> None:
    info = f"demo-{version}.dist-info"
    with zipfile.ZipFile(folder / f"demo-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr("demo.py", f"VERSION = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: demo\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def pin(root: Path, version: str) -> None:
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "x"\ndependencies = ["demo=={version}"]\n'
        "[dependency-groups]\ndev = []\n"
    )


def demo_version(python: Path) -> str:
    command = [str(python), "-c", "import demo; print(demo.VERSION)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_environment_is_made_kept_updated_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for version in ("1.0", "2.0"):
        wheel(tmp_path, version)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    pin(tmp_path, "1.0")
    venv = tmp_path / ".venv"
    leftover = venv / "lib" / "half"
    leftover.mkdir(parents=True)
    setup._write_stamp(venv, setup.Stamp("", str(venv), "", complete=False))

    python = setup.prepare_environment(tmp_path)
    assert demo_version(python) == "1.0"
    assert not leftover.exists(), "what an interrupted run left is gone"
    assert "making" in capfd.readouterr().err

    kept = venv / "kept"
    kept.touch()
    assert setup.prepare_environment(tmp_path) == python
    assert capfd.readouterr().err == "", "nothing is done twice"

    pin(tmp_path, "2.0")
    assert not setup.is_current(tmp_path)
    setup.prepare_environment(tmp_path)
    assert demo_version(python) == "2.0"
    assert kept.exists()
    assert "updating" in capfd.readouterr().err

    (venv / setup.STAMP_NAME).unlink()
    setup.prepare_environment(tmp_path)
    assert kept.exists(), "somebody else's environment is kept"
    assert "has been kept" in capfd.readouterr().err

    pin(tmp_path, "3.0")
    with pytest.raises(UserError, match="pip could not"):
        setup.prepare_environment(tmp_path)
    stamp = setup._read_stamp(venv)
    assert stamp is not None
    assert not stamp.complete
    pin(tmp_path, "2.0")
    assert not setup.is_current(tmp_path), "what failed half-way does not count"


def test_a_moved_or_orphaned_environment_is_not_current(tmp_path: Path) -> None:
    pin(tmp_path, "1.0")
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    good = setup._wanted_stamp(venv, setup.pins(tmp_path / "pyproject.toml"))
    setup._write_stamp(venv, good)
    assert setup.is_current(tmp_path)
    venv.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "checkout")
    venv.symlink_to("checkout")
    assert not setup.is_current(tmp_path)
    setup._write_stamp(venv, setup._wanted_stamp(venv, setup.pins(tmp_path / "pyproject.toml")))
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/nonexistent/python3.11")
    assert not setup.is_current(tmp_path)
    (venv / setup.STAMP_NAME).write_text("{")
    assert not setup.is_current(tmp_path)


def test_a_second_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    with (tmp_path / setup.LOCK_NAME).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def finish(text: str) -> None:
            said.append(text)
            fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(setup, "say", finish)
        with setup._locked(tmp_path):
            pass
    assert len(said) == 1
    assert "waiting" in said[0]


def test_a_checkout_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    pin(tmp_path, "1.0")
    (tmp_path / ".venv").write_text("in the way")
    with pytest.raises(UserError, match="cannot make"):
        setup.prepare_environment(tmp_path)


def test_all_packages_are_pinned_with_all_that_they_need() -> None:
    requirements = [Requirement(pin) for pin in setup.pins(setup.ROOT / "pyproject.toml")]
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in requirements)
    pinned = {canonicalize_name(r.name) for r in requirements}
    for requirement in requirements:
        for text in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in pinned, f"{requirement} needs {needed}"


# ---------------------------------------------------------------------------------- main


def tree(folder: Path) -> Path:
    pin(folder, "1.0")
    (folder / "tasks.py").write_text((setup.ROOT / "tasks.py").read_text())
    return folder


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--list"], ["-h"], ["-l"]])
def test_verbs_are_listed_on_a_bare_machine_without_installing(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(arguments, tree(tmp_path)) == 0
    listing = capsys.readouterr().out
    for verb in ("doctor", "build", "boot", "load", "grade", "test", "clean", "starter"):
        assert f"  {verb} " in listing
    assert not (tmp_path / ".venv").exists()


def test_an_unknown_verb_installs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.main(["graed"], tree(tmp_path)) == 2
    assert "graed" in capsys.readouterr().err
    assert not (tmp_path / ".venv").exists()


def test_the_listing_and_invoke_name_the_same_verbs() -> None:
    command = [sys.executable, "-m", "invoke", "--list", "--list-format=json"]
    done = subprocess.run(command, cwd=setup.ROOT, capture_output=True, text=True, check=True)
    for verb, text in setup.task_help(setup.ROOT / "tasks.py").items():
        assert f'"name": "{verb}"' in done.stdout
        assert text
        assert text in done.stdout


def test_a_handout_has_no_verbs_of_instructors(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.py"
    tasks.write_text(
        "@verb(instructors=True)\ndef prove(): ...\n@verb(instructors=False)\ndef grade(): ...\n"
        "@verb()\ndef boot(): ...\n"
    )
    assert list(setup.task_help(tasks)) == ["prove", "grade", "boot"]
    assert not setup.is_handout(tmp_path)
    (tmp_path / "labs" / "2-test" / "given" / "starter").mkdir(parents=True)
    assert setup.is_handout(tmp_path)
    assert list(setup.task_help(tasks)) == ["grade", "boot"]


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["starter"], 1, "did not receive required positional arguments"),
        (["starter", "x", "--lab", "nothing"], 1, "error: there is no lab nothing"),
        (["grade", "--submission", "x", "--variant", "y"], 2, "exclude each other"),
        (["grade", "--submission", "/nonexistent"], 1, "error: cannot read /nonexistent"),
    ],
)
def test_expected_errors_print_no_traceback(arguments: list[str], status: int, error: str) -> None:
    command = [sys.executable, "-m", "invoke", *arguments]
    done = subprocess.run(command, cwd=setup.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert error in done.stderr
    assert "Traceback" not in done.stderr
