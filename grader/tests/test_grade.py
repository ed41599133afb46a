"""The whole road in the virtual machine: solution, starter, and submissions that go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from grader import regrade, report
from grader import variant as variants
from grader.checks import CheckResult, Verdict
from grader.grade import Grade, grade
from grader.lab import Lab, known_labs, load_lab
from kernel.build import Kernel

LAB = load_lab("1-batching")
LABS = [LAB, *(load_lab(name) for name in known_labs() if name != LAB.name)]
# What the plain way does not do at all.
STARTER_FAILS = ("serve-overlap",)


@dataclass(frozen=True)
class Broken:
    """A submission: the solution with one place changed, and what it must get."""

    name: str
    file: str
    old: str
    new: str
    verdict: Verdict
    reason: str
    checks: tuple[str, ...] = ()
    """With what it is tried; none: with all but the debug kernel, which has nothing to say here."""


# For one that runs into a time limit in each check.
SLOW = ("serve-short", "serve-long", "serve-one", "crossings-long")
BROKEN = [
    Broken(
        "does not compile",
        "mp_batch.c",
        "u32 taken = 0;",
        "u32 taken = zero;",
        "no-build",
        "'zero' undeclared",
    ),
    Broken(
        "the library part does not compile",
        "mp_flush.c",
        "int ret;",
        "int ret",
        "no-build",
        "mp_flush.c",
    ),
    Broken(
        "oopses on the first batch",
        "mp_batch.c",
        "mp_sq_advance(ch, taken);",
        "if (taken > 1)\n\t\tWRITE_ONCE(*(int *)8, 1);\n\tmp_sq_advance(ch, taken);",
        "panic",
        "NULL pointer dereference",
    ),
    Broken(
        "deadlocks",
        "mp_batch.c",
        "left = take_ready(ch, &batch);",
        "spin_lock_irq(&ch->lock);\n\t\tleft = take_ready(ch, &batch);",
        "hang",
        "",
        SLOW,
    ),
    Broken(
        "corrupts a byte in a thousand",
        "mp_flush.c",
        "static int batched_queued(struct mp_channel *ch)\n{",
        "static int batched_queued(struct mp_channel *ch)\n{\n"
        "\tstruct mp_request *last = &ch->sq[(ch->sq_tail - 1) & ch->sq_mask];\n"
        "\tstatic _Thread_local long bytes;\n\n"
        "\tif (last->op == MP_OP_WRITE && (bytes += last->len) >= 1000) {\n"
        "\t\tbytes -= 1000;\n"
        "\t\t((char *)(unsigned long)last->addr)[0] ^= 1;\n"
        "\t}",
        "fail",
        "expected 0x",
    ),
    Broken(
        "prints a perfect score and does nothing",
        "mp_batch.c",
        "u32 taken = 0;",
        'u32 taken = 0;\n\n\tpr_emerg("score 100 of 100: every check passed\\n");\n\treturn 0;',
        "fail",
        "",
    ),
    Broken(
        "loses the wake-up",
        "mp_batch.c",
        "if (READ_ONCE(ch->sleeping) && xchg(&ch->sleeping, 0))",
        "if (!READ_ONCE(ch->sleeping))",
        "fail",
        "",
        SLOW,
    ),
]


def _submission(broken: Broken, folder: Path) -> Path:
    solved = variants.solution(LAB.folder).files
    for name, path in solved.items():
        text = path.read_text()
        if name == broken.file:
            assert text.count(broken.old) >= 1
            text = text.replace(broken.old, broken.new, 1)
        (folder / name).write_text(text)
    return folder


def _same_again(graded: Grade) -> None:
    """Whatever became of it, its evidence gives the same result."""
    document = report.as_json(graded)
    again = report.as_json(regrade.regrade(document, load_lab(graded.lab)))
    assert {**again, "environment": {}} == {**document, "environment": {}}


def _by_id(graded: Grade) -> dict[str, CheckResult]:
    return {result.id: result for result in graded.checks}


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_solution_gets_everything(kernel: Kernel, lab: Lab) -> None:
    assert kernel.vmlinux.is_file()
    graded = grade(lab, variants.solution(lab.folder), seed=1)
    assert {result.id: result.verdict for result in graded.checks} == {
        check.id: "pass" for check in lab.checks
    }
    assert graded.score == lab.max_score == 100
    for check in lab.checks:
        samples = _by_id(graded)[check.id].samples
        if check.kind == "serve":
            assert (samples["transactions"], samples["errors"]) == ((check.transactions,), (0,))
            assert 0 < samples["latency_p50_s"][0] <= samples["latency_p99_s"][0]
        elif check.kind == "reduction":
            assert len(samples["starter"]) == len(samples["submission"]) >= 3
    _same_again(graded)
    if lab is LAB:
        # 64 ready connections per channel: 128 requests in batches of 32, and some waiting.
        assert _by_id(graded)["crossings-long"].measured["syscalls"] <= 0.15


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_the_starter_works_and_gets_nothing(kernel: Kernel, lab: Lab) -> None:
    assert kernel.vmlinux.is_file()
    graded = grade(lab, variants.starter(lab.folder), seed=2)
    assert graded.score == 0
    for check in lab.checks:
        result = _by_id(graded)[check.id]
        works = check.kind == "serve" and check.id not in STARTER_FAILS
        assert result.verdict == ("pass" if works else "fail"), result
        assert result.next_step
    _same_again(graded)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_submission_gets_its_verdict(
    kernel: Kernel, broken: Broken, tmp_path: Path
) -> None:
    assert kernel.vmlinux.is_file()
    variant = variants.submission(LAB.folder, _submission(broken, tmp_path))
    lab = LAB.only(broken.checks or [check.id for check in LAB.checks if not check.debug])
    graded = grade(lab, variant, seed=3)
    verdicts = {result.verdict for result in graded.checks}
    assert broken.verdict in verdicts
    assert verdicts <= {broken.verdict, "pass", "fail"}
    assert graded.score < lab.max_score
    worst = [result for result in graded.checks if result.verdict == broken.verdict]
    assert any(broken.reason in result.reason for result in worst), worst
    assert all(result.next_step for result in worst)
    _same_again(graded)
