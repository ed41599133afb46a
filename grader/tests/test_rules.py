"""The rules for students' files: what breaks them, and how people write who do not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from grader import rules
from grader.lab import LABS
from grader.variant import lab_files, starter_text
from images.build import CompileError, build_programs
from kernel.build import UAPI, Kernel, ModuleError, build_module, module_lab_files

OTHER_WAYS = Path(__file__).with_name("rules")
KERNEL_FILE = "mp_batch.c"
LIBRARY_FILE = "mp_flush.c"


def broken(content: str, name: str = KERNEL_FILE) -> list[str]:
    file = rules.of(name)
    assert file is not None
    return [str(violation) for violation in rules.check_source(file, content)]


def test_every_file_of_every_lab_has_rules() -> None:
    files = {name for table in LABS.glob("*/lab.toml") for name in lab_files(table.parent)}
    # What is not compiled needs none: lab 0's answers.
    names = [name for name in files if name.endswith(".c")]
    assert names
    assert [name for name in names if rules.of(name) is None] == []


@pytest.mark.parametrize(
    "path",
    [*sorted(LABS.glob("*/*.c")), *sorted(OTHER_WAYS.glob("*.c"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_the_labs_own_files_and_other_ways_to_write_them_keep_the_rules(path: Path) -> None:
    solved = path.read_text()
    assert broken(solved, path.name) == []
    assert broken(starter_text(solved), path.name) == []


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ('void f(void)\n{\n\tasm("nop");\n}\n', 3, "asm (inline assembly"),
        ('__asm__ volatile("nop");\n', 1, "__asm__ (inline assembly"),
        ('int x;\nregister long r __asm("rax");\n', 2, "__asm (inline assembly"),
        ("__as\\\nm__(\"\");\n", 1, "__asm__ (inline assembly"),
        ("int a;\n/* \\\n*/ a\\ \t\nsm(\"\");\n", 3, "asm (inline assembly"),
        ('#define A(x) __as ## x\nA(m__)("");\n', 1, "## (names put together"),
        ('%:define A(x) as %:%: x\n', 1, "%:%: for ##"),
        ('%:define B 1\n', 1, "%: for #"),
        ("#include <linux/args.h>\nCONCATENATE(as, m)(\"\");\n", 2, "CONCATENATE (names and"),
        ('alternative("nop", "jmp 1f", 0);\n', 1, "alternative (inline assembly"),
        ("__stringify(jmp f);\n", 1, "__stringify (names"),
        # Where the eye, or a simpler reader, would see a comment or a string.
        ("char a[] = \"/*\"; asm(\"\"); char b[] = \"*/\";\n", 1, "asm (inline"),
        ("char a = '\"'; asm(\"\"); char b = '\"';\n", 1, "asm (inline"),
        ("#if 0\nit isn't /*\n#endif\nasm(\"\");\n/* */\n", 4, "asm (inline"),
        ("// a \\\nasm\nasm(\"\");\n", 3, "asm (inline"),
        ('char a[] = R"(")"; asm(""); char b[] = R"(")";\n', 1, "a raw string"),
        ("int \\u0061sm;\n", 1, "a backslash"),
        # Headers.
        ('#include "/dev/stdin"\n', 1, '#include "/dev/stdin": of headers, only batch.h'),
        ("#include </etc/passwd>\n", 1, "#include </etc/passwd>"),
        ('#include "../../../../home/x"\n', 1, '#include "../../../../home/x"'),
        ("#include <linux/../../x.h>\n", 1, "#include <linux/../../x.h>"),
        ('#include "mp_partition.c"\n', 1, '#include "mp_partition.c"'),
        ("#include <stdio.h>\n", 1, "#include <stdio.h>"),
        ("#include __FILE__\n", 1, "an #include that is not plainly one"),
        ("#define X <linux/list.h>\n#include X\n", 2, "an #include that is not plainly one"),
        ("#inc\\\nlude __FILE__\n", 1, "an #include that is not plainly one"),
        ("/* */ # /* */ include __FILE__\n", 1, "an #include that is not plainly one"),
        ("#include_next <linux/list.h>\n", 1, "#include_next: of directives"),
        ('#import "batch.h"\n', 1, "#import: of directives"),
        ("#if __has_include(</home/x>)\n#endif\n", 1, "__has_include (a look at"),
        # Directives.
        ('\n#pragma GCC optimize("O3")\n', 2, "#pragma: of directives"),
        ('_Pragma("weak f")\n', 1, "_Pragma (a pragma"),
        ('#line 7 "other.c"\n', 1, "#line: of directives"),
        ('# 7 "other.c"\n', 1, "#7: of directives"),
        # Attributes.
        ('int x __attribute__((section(".init_array")));\n', 1, "the attribute section"),
        ("int f(void) __attribute__((noinline, __alias__(\"g\")));\n", 1, "attribute __alias__"),
        ("void f(void) __attribute__((constructor));\n", 1, "the attribute constructor"),
        ("void f(void) __attribute__((naked));\n", 1, "the attribute naked"),
        ("void *f(void) __attribute__((ifunc(\"g\")));\n", 1, "the attribute ifunc"),
        ("void f(void) __attribute__((no_instrument_function));\n", 1, "no_instrument_function"),
        ('void f(void) __attribute((visibility("hidden")));\n', 1, "the attribute visibility"),
        ('void f(void) __attribute__((optimize("O3")));\n', 1, "the attribute optimize"),
        ('[[gnu::section(".x")]] int x;\n', 1, "an attribute in [[ ]]"),
        ('int x __section(".init_array");\n', 1, "__section (code or data that is moved"),
        ("static int __init f(void) { return 0; }\n", 1, "__init (code or data"),
        ("module_init(f);\n", 1, "module_init (what the module as a whole"),
        ('MODULE_LICENSE("GPL");\n', 1, "MODULE_LICENSE (what the module"),
        ("EXPORT_SYMBOL(f);\n", 1, "EXPORT_SYMBOL (what the module"),
        ("late_initcall(f);\n", 1, "late_initcall (what the module"),
        ("long f(void) { return (long)__builtin_return_address(0); }\n", 1, "the machine below C"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named_with_its_line(content: str, line: int, what: str) -> None:
    found = broken(content)
    assert found, "nothing was found"
    assert any(text.startswith(f"{KERNEL_FILE}:{line}: error: ") and what in text for text in found)


ORDINARY = """\
// SPDX-License-Identifier: GPL-2.0-only
#include <linux/atomic.h> // it's in here: asm("...") is not needed
#include <linux/percpu.h>   /* a comment that
                 * goes on */
#include "batch.h"

#ifdef DEBUG
#define say(format, ...) pr_info("mp: " format, __VA_ARGS__)
#else
#define say(format, ...) no_printk(format, __VA_ARGS__)
#endif
#define SHOW(x) say(#x " is %d, \\"quoted\\" '\\\\' and /* no comment */\\n", x)
#define LONG(a, b) \\
    ((a) + \\
     (b))

static DEFINE_PER_CPU(int, crossings);
static const char quote = '"', other = '\\'', back = '\\\\';
static int __read_mostly table[2][2] = {[0][1] = 1};

static __always_inline int __maybe_unused first(int a[], int b[])
{
    return a[b[0]] % 3 ?: table[0][1];
}

static int __attribute__((noinline, __unused__)) second(int alternatives, int section)
{
    module_put(NULL);
    return LONG(alternatives, section) + 0x1.8p3 > 1e+5;
}
"""


def test_ordinary_c_is_left_alone() -> None:
    assert broken(ORDINARY) == []
    assert broken(ORDINARY.replace("\n", "\r\n")) == []


def test_each_kind_has_headers_of_its_own() -> None:
    assert broken("#include <stdio.h>\n", LIBRARY_FILE) == []
    assert broken("#include <linux/list.h>\n", LIBRARY_FILE) != []


# ---- objects: made by the compiler at hand, for what decides does not need a kernel -------------


def made(content: str, folder: Path, name: str = KERNEL_FILE, *options: str) -> bytes:
    (folder / name).write_text(content)
    command = ["gcc", "-O2", "-fno-pie", "-fno-stack-protector", "-fcf-protection=none", *options]
    subprocess.run([*command, "-c", name, "-o", "out.o"], cwd=folder, check=True)
    return (folder / "out.o").read_bytes()


def broken_object(
    content: str, folder: Path, name: str = KERNEL_FILE, functions: tuple[str, ...] = ()
) -> list[str]:
    file = rules.of(name)
    assert file is not None
    found = rules.check_object(file, made(content, folder, name), content, functions)
    return [str(violation) for violation in found]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("long commit_creds(long);\nint x;", 2, "x can be seen by other files: make it static"),
        (
            "void *kallsyms(const char *) __asm__(\"kallsyms_lookup_name\");\n"
            "static void *p;\nvoid *const mp_batched_ops = &p;\n"
            "__attribute__((used)) static void f(void) { p = kallsyms(\"a\"); }",
            0,
            "kallsyms_lookup_name: it is not among",
        ),
        (
            "int printk_x;\nint kernel_write(int);\n"
            "__attribute__((used)) static int f(void) { return kernel_write(1); }",
            2,
            "kernel_write: it is not among",
        ),
        (
            "static volatile int x;\n__attribute__((constructor)) static void f(void) { x = 1; }",
            0,
            "the section .init_array",
        ),
        ('__attribute__((section(".modinfo"), used)) static char x = 1;', 0, "section .modinfo"),
        ('__attribute__((section("__ksymtab_strings"), used)) static char x;', 0, "__ksymtab"),
        ('__attribute__((section(".initcall6.init"), used)) static char x;', 0, ".initcall6"),
        (
            '__attribute__((section(".gnu.linkonce.this_module"), used)) static char x;',
            0,
            "this_module",
        ),
        ("__attribute__((weak)) void schedule(void) { }", 1, "schedule can be seen"),
        ("void mp_execute(void) { }", 1, "mp_execute can be seen"),
        ("int mp_other_ops __attribute__((common));", 1, "mp_other_ops can be seen"),
        (
            "static void *g(void) { return 0; }\n"
            "static void h(void) __attribute__((ifunc(\"g\")));\n"
            "__attribute__((used)) static void f(void) { h(); }",
            2,
            "h (a function that is chosen at start)",
        ),
    ],
)  # fmt: skip
def test_what_an_object_must_not_have(content: str, line: int, what: str, tmp_path: Path) -> None:
    place = f"{KERNEL_FILE}:{line}" if line else KERNEL_FILE
    found = broken_object(content, tmp_path)
    assert any(text.startswith(f"{place}: error: ") and what in text for text in found), found


@pytest.mark.parametrize(
    "expression",
    [
        "((int (*)(void))((char *)wake_up_process + 9))()",
        "(int)(long)((char *)wake_up_process + 4)",
    ],
    ids=["a call", "an address"],
)
def test_functions_of_the_kernel_are_entered_where_they_begin(
    expression: str, tmp_path: Path
) -> None:
    content = f"""
int wake_up_process(void);
__attribute__((used)) static int f(void) {{ return {expression}; }}
"""
    assert "an address inside wake_up_process()" in str(
        broken_object(content, tmp_path, functions=("wake_up_process",))
    )
    plain = content.replace(expression, "wake_up_process() + (wake_up_process == f)")
    assert broken_object(plain, tmp_path, functions=("wake_up_process",)) == []


def test_data_of_the_kernel_may_be_read_anywhere(tmp_path: Path) -> None:
    content = """
extern struct { int a, b; } init_net;
__attribute__((used)) static int f(void) { return init_net.b; }
"""
    assert broken_object(content, tmp_path, functions=("wake_up_process",)) == []


def test_the_library_may_use_c_and_not_the_system(tmp_path: Path) -> None:
    content = """
#include <stdio.h>
#include <string.h>
#include <stdlib.h>
#include <unistd.h>
static _Thread_local long bytes;
__attribute__((used)) static void f(void *p) { bytes += strlen(p); printf("%ld", bytes); free(p); }
"""
    assert broken_object(content, tmp_path, LIBRARY_FILE) == []
    for call in ('execl("a", "b", NULL)', "fork()", "syscall(1)", 'system("true")', "_exit(0)"):
        more = f"{content}__attribute__((used)) static void g(void) {{ {call}; }}\n"
        name = call.partition("(")[0]
        found = "".join(broken_object(more, tmp_path, LIBRARY_FILE))
        assert f"{LIBRARY_FILE}:8: error: not allowed here: {name}: it is not among" in found


def test_what_the_checkers_add_is_allowed_where_they_are(tmp_path: Path) -> None:
    file = rules.of(KERNEL_FILE)
    assert file is not None
    content = "static int x[4];\n__attribute__((used)) static int f(int i) { return x[i]++; }\n"
    checked = made(content, tmp_path, KERNEL_FILE, "-fsanitize=kernel-address",
                   "--param=asan-instrumentation-with-call-threshold=0")  # fmt: skip
    assert rules.check_object(file, checked, content) != []
    assert rules.check_object(file, checked, content, debug=True) == []


def test_what_is_no_object_is_refused() -> None:
    file = rules.of(KERNEL_FILE)
    assert file is not None
    (violation,) = rules.check_object(file, b"no object", "")
    assert "cannot be read" in str(violation)


def test_a_table_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(rules.RulesError, match="kind is none of"):
        rules.read({"files": {"a.c": {"kind": "other", "defines": []}}})
    with pytest.raises(rules.RulesError, match="missing or unknown key"):
        rules.read({"files": {}})


# ---- whole files, built as they are for the guest -----------------------------------------------


def test_other_ways_to_write_the_kernels_files_pass(kernel: Kernel, debug_kernel: Kernel) -> None:
    files = {path.name: path for path in OTHER_WAYS.glob("mp_*.c") if path.name != LIBRARY_FILE}
    assert set(files) == set(module_lab_files())
    for each in (kernel, debug_kernel):
        assert build_module(each, files).ko.is_file()


def test_other_ways_to_write_the_librarys_file_pass(kernel: Kernel) -> None:
    uapi = kernel.source / "include/uapi"
    assert (build_programs([OTHER_WAYS / LIBRARY_FILE], UAPI, uapi) / "bin").is_dir()


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        (
            "mp_lwsocket.c",
            "struct socket *full = sock_alloc();",
            "struct socket *full = ((struct socket *(*)(void))((char *)sock_alloc + 9))();",
            "mp_lwsocket.c:109: error: not allowed here: an address inside sock_alloc()",
        ),
        (
            "mp_partition.c",
            "static struct listener *find(",
            "struct listener *find(",
            "mp_partition.c:30: error: not allowed here: find can be seen by other files",
        ),
    ],
)
def test_what_the_object_tells_is_an_error_of_the_build(
    kernel: Kernel, tmp_path: Path, name: str, old: str, new: str, what: str
) -> None:
    files = {path.name: path for path in OTHER_WAYS.glob("mp_*.c") if path.name != LIBRARY_FILE}
    text = files[name].read_text()
    assert text.count(old) == 1
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(ModuleError) as caught:
        build_module(kernel, {**files, name: tmp_path / name})
    assert what in caught.value.text


def test_a_library_file_that_breaks_a_rule_is_a_compile_error(
    kernel: Kernel, tmp_path: Path
) -> None:
    path = tmp_path / LIBRARY_FILE
    uapi = kernel.source / "include/uapi"
    path.write_text('#include "flush.h"\n#include <sys/socket.h>\n')
    with pytest.raises(CompileError, match=r"mp_flush.c:2: error: not allowed here: #include"):
        build_programs([path], UAPI, uapi)
    helper = "int helper(void) { return 1; }\nconst struct mp_flush_ops mp_batched_flush;\n"
    path.write_text(f'#include "flush.h"\n{helper}')
    with pytest.raises(CompileError, match=r"mp_flush.c:2: error: .* make it static"):
        build_programs([path], UAPI, uapi)
