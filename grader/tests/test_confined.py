"""Compiling apart from the rest of the machine: what cannot be seen, reached or used up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from grader import cache, confined, setup
from grader.confined import Limits, Outcome

GCC = ["gcc", "-O2", "-c", "a.c"]


def shell(command: str, allowed: Limits | None = None) -> Outcome:
    return confined.run(["sh", "-c", command], {}, [], allowed=allowed)


def compiled(source: str, allowed: Limits | None = None) -> Outcome:
    return confined.run(GCC, {"a.c": source.encode()}, ["a.o"], allowed=allowed)


def test_what_is_made_comes_out_and_nothing_else() -> None:
    done = confined.run(
        ["sh", "-c", "cp in/a out1; cp in/a .hidden; cp in/a other; echo said; echo too >&2"],
        {"in/a": b"text"},
        ["out*", ".h*"],
    )
    assert (done.status, done.text) == (0, "said\ntoo\n")
    assert done.files == {"out1": b"text", ".hidden": b"text"}


def test_a_failure_has_the_commands_status_and_words() -> None:
    done = shell("echo no >&2; exit 3")
    assert (done.status, done.text, done.limit) == (3, "no\n", "")
    assert done.explained == "no\n"


def test_it_sees_no_home_no_processes_no_devices_and_no_network(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    seen = shell(f"cat {tmp_path}/secret /etc/passwd /etc/hostname; ls /dev; ls -A / /tmp")
    assert "secret\n" not in seen.text
    assert seen.text.count("No such file") == 3
    names = set(seen.text.split())
    assert "null" in names
    assert not names & {"home", "root", "proc", "sys", "run", "var", "sda", "tty", "mem", "zero"}
    tool = "import socket; print([name for _, name in socket.if_nameindex()])"
    interfaces = confined.run(["/usr/bin/python3", "-I", "-c", tool], {}, [])
    assert interfaces.text == "['lo']\n"


def test_it_may_write_to_its_own_folder_only(tmp_path: Path) -> None:
    done = confined.run(
        [
            "sh",
            "-c",
            f"for f in /x /usr/x /dev/x /etc/x {tmp_path}/x; do echo > $f; done; echo > x",
        ],
        {},
        ["x"],
        readable=[tmp_path],
    )
    assert done.files == {"x": b"\n"}
    assert done.text.count("Read-only") + done.text.count("denied") == 5
    assert list(tmp_path.iterdir()) == []


def test_it_sees_what_it_is_shown_and_not_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("shown", "hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    # Others may look at it: as root, the compiler is another user.
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    done = confined.run(
        ["sh", "-c", f"cat {tmp_path}/shown/file; ls {tmp_path}"], {}, [], [tmp_path / "shown"]
    )
    assert done.text == "shownshown\n"


def test_it_is_nobody_of_importance_and_cannot_become_more() -> None:
    tool = (
        "import os; "
        "from ctypes import CDLL; libc = CDLL(None); "
        "print(os.getuid(), libc.prctl(39, 0, 0, 0, 0), libc.prctl(23, 21, 0, 0, 0))"
    )
    done = confined.run(["/usr/bin/python3", "-I", "-c", tool], {}, [])
    uid, no_new_privileges, _ = done.text.split()
    assert int(uid) >= confined._FIRST_USER if os.geteuid() == 0 else int(uid) == os.geteuid()
    assert no_new_privileges == "1"
    mounting = shell("mount -t tmpfs none /build/tmp; chroot /usr /bin/true; unshare -n true")
    assert mounting.status != 0


@pytest.mark.parametrize(
    ("command", "allowed", "limit"),
    [
        ("sleep 1000", Limits(seconds=0.3), "it took more than"),
        ("while :; do :; done", Limits(cpu_seconds=1), "s of CPU time"),
        ("head -c 3000000 /usr/bin/gcc-* > x; cat x x x > y", Limits(file=1 << 20), "than 1 MiB"),
        (
            "for i in 1 2 3 4 5 6; do head -c 1000000 /usr/lib/*/libc.so.6 > $i; done",
            Limits(folder=3 << 20),
            "larger than 3 MiB together",
        ),
        (
            "for i in $(seq 40); do sleep 10 & done; wait",
            Limits(processes=20),
            "more than 20 processes",
        ),
    ],
    ids=["time", "cpu", "file", "folder", "processes"],
)
def test_each_limit_ends_it_and_is_named(
    command: str, allowed: Limits, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grader.limits.scaled", lambda seconds: seconds)
    # Where the shell itself is ended, what ended it is seen only from outside: as with make.
    done = confined.run(["sh", "-ec", f"sh -ec '{command}'; exit $?"], {}, [], allowed=allowed)
    assert done.status != 0
    assert limit in done.limit
    assert done.explained.startswith(f"gcc: error: stopped: {done.limit}")


@pytest.mark.parametrize(
    ("source", "memory", "limit"),
    [
        ("char x[1UL << 40] = {1};\n", 256 << 20, "a file became larger than 8 MiB"),
        ("#include __FILE__\n#include __FILE__\n", 256 << 20, "it printed more than 8 MiB"),
        (
            # How fast its memory grows is the machine's affair: of that it gets plenty.
            "#if __INCLUDE_LEVEL__ < 100\n#include __FILE__\n#include __FILE__\n#endif\n",
            64 << 30,
            "it took more than 2 s of CPU time",
        ),
        (
            "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(x)))\n"
            "int f(void) { return B(B(B(B(0 +)))) 0; }\n",
            256 << 20,
            "it needed more than 256 MiB of memory",
        ),
    ],
    ids=["an array", "a file that includes itself", "and in silence", "a macro"],
)
def test_c_that_asks_for_too_much(
    source: str, memory: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grader.limits.scaled", lambda seconds: seconds)
    done = compiled(source, Limits(cpu_seconds=2, memory=memory, file=8 << 20))
    assert done.status != 0
    assert limit in done.limit, done.text[-2000:]


@pytest.mark.parametrize(
    "name", ["/dev/stdin", "/etc/passwd", "../../../../etc/passwd", "/proc/self/environ"]
)
def test_c_that_includes_what_lies_outside(name: str) -> None:
    done = compiled(f'#include "{name}"\n')
    assert "No such file or directory" in done.text


def test_a_flood_of_messages_is_cut_off() -> None:
    done = shell("yes | head -c 3000000; exit 1")
    assert len(done.text) == 1 << 20


def test_what_is_no_ordinary_file_does_not_come_out() -> None:
    done = confined.run(["ln", "-s", "/etc/passwd", "out"], {}, ["out"])
    assert (done.status, done.files) == (1, {})
    assert "'out' is no ordinary file" in done.limit


def test_without_bubblewrap_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(confined.Unavailable, match="bwrap is missing"):
        shell("true")


def test_a_place_that_cannot_be_made_is_the_machines_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(confined, "PLACE", Path("/usr/nowhere"))
    with pytest.raises(confined.Unavailable, match="bwrap: "):
        shell("true")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_an_end_from_outside_leaves_nothing(number: signal.Signals) -> None:
    mark = f"1000.{os.getpid()}{int(number)}"
    # SIGINT is ignored in what a shell starts in the background, and so perhaps in these tests.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from grader import confined; print('begun', flush=True); "
        f"confined.run(['sh', '-c', 'sleep {mark} & sleep {mark}'], {{}}, [])"
    )

    def sleeping() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]

    before = set(cache.root().iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=setup.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        while len(sleeping()) < 2:
            assert process.poll() is None
        left = sleeping()
        process.send_signal(number)
        process.wait()
    # After SIGKILL nobody is left to wait for them.
    gone, alive = psutil.wait_procs(left, timeout=30)
    assert (len(gone), alive) == (2, [])
    assert set(cache.root().iterdir()) == before
