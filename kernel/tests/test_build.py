"""The kernel's configuration and patches, without building it."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

from grader import given
from kernel import build

DEBIAN = build.read_config((build.CONFIG / "debian-cloud.config").read_text().splitlines())
LAB = build.read_config((build.CONFIG / "lab.config").read_text().splitlines())
LABS = build.HERE.parent / "labs"
LAB_FILES = {name: next(LABS.glob(f"*/{name}")) for name in build.module_lab_files()}


def test_read_config_knows_values_strings_and_options_not_set() -> None:
    text = [
        "CONFIG_A=y",
        "# CONFIG_B is not set",
        'CONFIG_C="x y"',
        "# a comment",
        "",
        "CONFIG_D=12",
    ]
    assert build.read_config(text) == {
        "CONFIG_A": "y",
        "CONFIG_B": "n",
        "CONFIG_C": '"x y"',
        "CONFIG_D": "12",
    }


def test_merging_leaves_modules_out_and_lets_the_later_win() -> None:
    merged = build.merged_config(
        {"CONFIG_A": "y", "CONFIG_M": "m", "CONFIG_N": "m"},
        {"CONFIG_N": "y"},
        {"CONFIG_A": "n"},
    )
    assert merged == {"CONFIG_A": "n", "CONFIG_N": "y"}


def test_an_option_that_did_not_hold_is_named() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "n"}
    assert build.unmet_options(wanted, {"CONFIG_B": "y"}) == [
        "CONFIG_A=y (is n)",
        "CONFIG_B=n (is y)",
    ]


# What a request passes through, by subsystem. None of it may differ from Debian's kernel.
MEASURED_PATH = """
SMP PREEMPT_DYNAMIC PREEMPT_VOLUNTARY HZ NO_HZ_FULL VIRT_CPU_ACCOUNTING_GEN JUMP_LABEL
FAIR_GROUP_SCHED SCHED_AUTOGROUP CFS_BANDWIDTH NUMA NUMA_BALANCING SCHED_MC SCHED_SMT SLUB
SLAB_FREELIST_RANDOM SLAB_FREELIST_HARDENED SLUB_CPU_PARTIAL SLAB_MERGE_DEFAULT
INIT_ON_ALLOC_DEFAULT_ON INIT_STACK_ALL_ZERO MEMCG CGROUPS CGROUP_BPF SOCK_CGROUP_DATA SECURITY
SECURITY_NETWORK SECURITY_APPARMOR SECURITY_TOMOYO SECURITY_YAMA SECURITY_LANDLOCK BPF_LSM IMA
EVM AUDIT AUDITSYSCALL SECCOMP SECCOMP_FILTER HARDENED_USERCOPY FORTIFY_SOURCE
STACKPROTECTOR_STRONG VMAP_STACK RANDOMIZE_KSTACK_OFFSET_DEFAULT X86_KERNEL_IBT CPU_MITIGATIONS
MITIGATION_RETPOLINE MITIGATION_RETHUNK MITIGATION_UNRET_ENTRY MITIGATION_SPECTRE_V1
MITIGATION_CALL_DEPTH_TRACKING CALL_THUNKS NET INET IPV6 MPTCP NETFILTER NETFILTER_INGRESS
NETFILTER_EGRESS NET_CLS_ACT XFRM TCP_MD5SIG TCP_CONG_CUBIC DEFAULT_NET_SCH NET_SCH_FQ_CODEL
RPS XPS BQL RFS_ACCEL NET_RX_BUSY_POLL NET_FLOW_LIMIT PAGE_POOL SKB_EXTENSIONS SKB_DECRYPTED
SOCK_VALIDATE_XMIT XFRM_OFFLOAD NET_REDIRECT IP_ROUTE_CLASSID EPOLL EVENTFD IO_URING
FUNCTION_TRACER LIST_HARDENED BUG_ON_DATA_CORRUPTION IA32_EMULATION SYN_COOKIES
IP_MULTIPLE_TABLES
""".split()


def test_debian_has_each_option_of_the_measured_path() -> None:
    missing = [name for name in MEASURED_PATH if DEBIAN.get(f"CONFIG_{name}", "n") == "n"]
    assert missing == []


@pytest.mark.parametrize("name", MEASURED_PATH)
def test_the_fragment_leaves_the_measured_path_alone(name: str) -> None:
    option = f"CONFIG_{name}"
    assert LAB.get(option, DEBIAN[option]) == DEBIAN[option]


def test_the_kernel_that_was_built_has_the_measured_path(kernel: build.Kernel) -> None:
    built = build.read_config((kernel.build / ".config").read_text().splitlines())
    different = {
        name: built.get(f"CONFIG_{name}", "n")
        for name in MEASURED_PATH
        if built.get(f"CONFIG_{name}", "n") != DEBIAN[f"CONFIG_{name}"]
    }
    assert different == {}


@pytest.mark.parametrize("path", sorted(build.PATCHES.glob("*.patch")), ids=lambda path: path.name)
def test_each_patch_is_a_git_patch_that_says_why_a_module_cannot(path: Path) -> None:
    text = path.read_text()
    assert re.match(r"From [0-9a-f]{40} ", text)
    assert re.search(r"^Subject: \[PATCH \d/\d\] [\w/]+: ", text, re.M)
    assert re.search(r"\bmodule", text.split("\n---\n")[0])
    assert "Signed-off-by:" in text


def test_a_missing_archive_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_TARBALL", str(tmp_path / "none.tar.xz"))
    with pytest.raises(build.BuildError) as caught:
        build.tarball()
    assert "linux-source-6.12" in caught.value.todo


def test_an_archive_that_is_no_kernel_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "linux.tar.xz"
    archive.write_bytes(b"this is not an archive")
    monkeypatch.setenv("KERNEL_TARBALL", str(archive))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="cannot be unpacked"):
        build.build_kernel()
    left = list((tmp_path / "cache" / "megapipe-lab" / "source").rglob("*"))
    assert left == []


def _kernel(folder: Path, config: str) -> build.Kernel:
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / ".config").write_text(config)
    source = folder / "0123" / "linux"
    return build.Kernel(out / "vmlinux", out / "System.map", out, source, "6.12.1", False, "key")


@pytest.mark.parametrize(
    ("line", "matters"),
    [
        ('CONFIG_CC_VERSION_TEXT="gcc (Debian 13.3.0-1) 13.3.0"', False),
        ("CONFIG_CC_HAS_COUNTED_BY=y", False),
        ("CONFIG_RUSTC_VERSION=109500", False),
        ("CONFIG_AS_VERSION=24000", False),
        ("CONFIG_GCC_PLUGIN_RANDSTRUCT=y", True),
        ("CONFIG_MITIGATION_SLS=y", True),
        ("CONFIG_DEBUG_SPINLOCK=y", True),
        ("# CONFIG_SMP is not set", True),
    ],
)
def test_what_an_object_is_compiled_against(tmp_path: Path, line: str, matters: bool) -> None:
    plain = build.made_for(_kernel(tmp_path, "CONFIG_SMP=y\n"))
    other = build.made_for(_kernel(tmp_path, f"CONFIG_SMP=y\n{line}\n"))
    assert (plain != other) == matters
    assert plain[given.KERNEL_SOURCE] == other[given.KERNEL_SOURCE] == "0123"


def test_headers_of_the_module_matter_to_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _kernel(tmp_path, "CONFIG_SMP=y\n")
    monkeypatch.setattr(build, "MODULE", tmp_path / "module")
    (tmp_path / "module").mkdir()
    seen = [build.made_for(kernel)]
    for name, text in (("a.h", "int x;"), ("a.h", "int y;"), ("a.c", "int y;")):
        (tmp_path / "module" / name).write_text(text)
        seen.append(build.made_for(kernel))
    assert seen[0] != seen[1] != seen[2] == seen[3]


def test_the_module_builds_and_tells_editors_how(kernel: build.Kernel) -> None:
    module = build.build_module(kernel, LAB_FILES)
    commands = build.compile_commands(module, LAB_FILES)
    files = {Path(entry["file"]) for entry in commands}
    assert set(LAB_FILES.values()) <= files
    assert build.MODULE / "main.c" in files
    for entry in commands:
        done = subprocess.run(
            [*shlex.split(entry["command"]), "-fsyntax-only"],
            cwd=entry["directory"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def _code(ko: Path) -> dict[str, bytes]:
    """Return a module's code, and the tables that say something of each of its places."""
    with ko.open("rb") as file:
        parts = list(ELFFile(file).iter_sections())
        executed = [part for part in parts if part["sh_flags"] & SH_FLAGS.SHF_EXECINSTR]
        tables = [part for part in parts if part.name.endswith(("_sites", "mcount_loc", "_unwind"))]
        return {part.name: part.data() for part in (*executed, *tables)}


def test_a_module_of_given_objects_has_the_same_code(kernel: build.Kernel, tmp_path: Path) -> None:
    folders = {}
    for name, path in build.build_objects(kernel, LAB_FILES).items():
        code = given.neutral(path.read_bytes(), ())
        folders[name] = tmp_path / given.folder_name(name)
        objects = [given.GivenObject("kernel", code, build.made_for(kernel))]
        given.write(folders[name], "", objects)
    module, other = build.build_module(kernel, LAB_FILES), build.build_module(kernel, folders)
    assert module.key != other.key
    assert _code(module.ko) == _code(other.ko)
    assert {".text", ".return_sites", ".orc_unwind"} <= set(_code(other.ko))
    compiled = {Path(entry["file"]).name for entry in build.compile_commands(other, folders)}
    assert "main.c" in compiled and "mp_batch.c" not in compiled


def test_a_module_is_the_same_whether_its_own_files_are_compiled_with_the_labs_or_before(
    kernel: build.Kernel,
) -> None:
    files = {name: path.read_bytes() for name, path in LAB_FILES.items()}
    inputs = {**build._contents(build.MODULE), **files}
    done = build._make_in(kernel, "megapipe", inputs, [], ["megapipe.ko"])
    assert done.status == 0, done.text
    assert build.build_module(kernel, LAB_FILES).ko.read_bytes() == done.files["megapipe.ko"]


def test_a_mistake_in_a_file_of_the_modules_own_is_told(
    kernel: build.Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(build.MODULE, tmp_path / "module")
    monkeypatch.setattr(build, "MODULE", tmp_path / "module")
    with (tmp_path / "module/ring.c").open("a") as file:
        file.write("int broken = ;\n")
    with pytest.raises(build.BuildError, match=r"does not compile\nring\.c:\d+:14: error:"):
        build.build_module(kernel, LAB_FILES)


def test_the_labs_files_are_known_from_kbuild() -> None:
    assert set(LAB_FILES) == {"mp_batch.c", "mp_partition.c", "mp_lwsocket.c"}


def test_a_mistake_in_a_lab_file_is_the_compilers_words(
    kernel: build.Kernel, tmp_path: Path
) -> None:
    path = tmp_path / "mp_batch.c"
    path.write_text("int nothing;\nint broken = ;\n")
    with pytest.raises(build.ModuleError) as caught:
        build.build_module(kernel, {**LAB_FILES, "mp_batch.c": path})
    assert caught.value.text.startswith("mp_batch.c:2:14: error:")
