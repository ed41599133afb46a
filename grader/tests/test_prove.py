"""Mutants: their files, and how an expected loss is compared with an actual one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from grader import prove
from grader import variant as variants
from grader.checks import Verdict, failed, served
from grader.grade import Grade, grade
from grader.lab import Lab, known_labs, load_lab
from grader.prove import Case, MutantError
from grader.results import commit
from kernel.build import Kernel

# An answer is right or wrong: there is no mutant of one.
LABS = [lab for lab in map(load_lab, known_labs()) if lab.has_code]
LAB = load_lab("2-partitioning")
SAMPLE = 1


def _graded(lab: Lab, verdicts: dict[str, Verdict]) -> Grade:
    results = [
        replace(
            served(check, 1) if check.kind == "serve" else failed(check, "fail", ""),
            verdict=verdicts.get(check.id, "pass"),
        )
        for check in lab.checks
    ]
    return Grade(lab.name, "submission", 1, lab.max_score, tuple(results), {}, {}, {})


def _case(loses: set[str], may_lose: set[str] | None = None, points: float | None = None) -> Case:
    variant = variants.solution(LAB.folder)
    return Case("m", "", variant, frozenset(loses), frozenset(may_lose or ()), points)


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_every_mutant_applies_and_every_check_is_lost_by_one(lab: Lab) -> None:
    names = {check.id for check in lab.checks}
    found = prove.mutants(lab)
    assert sum(mutant.race for mutant in found) * 2 >= len(found)
    solved = variants.solution(lab.folder)
    keys = {prove.variant_of(lab, mutant).key for mutant in found}
    assert len(keys | {solved.key}) == len(found) + 1
    assert frozenset[str]().union(*(mutant.loses for mutant in found)) == names
    assert prove.never_lost(lab) == []


def test_exactly_the_named_checks_must_be_lost() -> None:
    lost = _graded(LAB, {"local": "fail", "debug": "panic"})
    assert prove.judged(lost, _case({"local", "debug"})).holds
    assert prove.judged(lost, _case({"local"}, {"debug"})).holds
    assert not prove.judged(lost, _case({"local"})).holds
    assert not prove.judged(lost, _case({"local", "debug", "serve-short"})).holds


def test_what_could_not_be_judged_or_built_proves_nothing() -> None:
    unjudged: tuple[Verdict, ...] = ("infra", "no-build")
    for verdict in unjudged:
        row = prove.judged(_graded(LAB, {"local": verdict}), _case(set(), {"local"}))
        assert not row.holds


def test_points_are_compared_where_they_are_known() -> None:
    graded = _graded(LAB, {})
    assert prove.judged(graded, _case(set(), points=1)).holds
    assert not prove.judged(graded, _case(set(), points=100)).holds


def test_a_mutant_must_say_what_it_loses(tmp_path: Path) -> None:
    folder = tmp_path / "mutants"
    folder.mkdir()
    lab = replace(LAB, folder=tmp_path)
    file = folder / "one.patch"
    patch = "\n--- a/mp_partition.c\n+++ b/mp_partition.c\n"
    for text, problem in [
        ("What: it\nLoses: local\n", "no patch"),
        (f"What: it\n{patch}", "Loses"),
        (f"What: it\nLoses: nobody\n{patch}", "no check nobody"),
    ]:
        file.write_text(text)
        with pytest.raises(MutantError, match=problem):
            prove.mutants(lab)


def test_successive_samples_take_every_mutant() -> None:
    taken = {mutant.name for seed in range(200) for mutant in prove.sample(LAB, 2, seed)}
    assert taken == {mutant.name for mutant in prove.mutants(LAB)}


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_sample_of_the_mutants_loses_what_it_must(kernel: Kernel, lab: Lab) -> None:
    """Their own checks alone; another sample with each commit, ``invoke prove`` for all."""
    assert kernel.vmlinux.is_file()
    seed = os.environ.get("MEGAPIPE_SAMPLE") or commit()
    for mutant in prove.sample(lab, SAMPLE, seed):
        print(f"{lab.name} {mutant.name}, MEGAPIPE_SAMPLE={seed}")
        graded = grade(lab.only(mutant.loses), prove.variant_of(lab, mutant), seed=4)
        named = [result for result in graded.checks if result.id in mutant.loses]
        assert [result for result in named if result.verdict in ("pass", "no-build")] == []
