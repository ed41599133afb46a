"""Grade -> reports: a table for people, JSON for machines. Only this file knows the formats."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grader import results
from grader.checks import CheckResult
from grader.errors import UserError
from grader.grade import Grade
from grader.lab import METRICS, Lab

SCHEMA = Path(__file__).with_name("result.schema.json")
VERSION = 2
_COLOURS = {"pass": "green", "infra": "yellow"}


def as_json(grade: Grade) -> dict[str, Any]:
    """Return the grade as the schema describes it; raises ValidationError if it does not fit."""
    document: dict[str, Any] = {"version": VERSION, **asdict(grade)}
    del document["machines"]
    document["checks"] = [asdict(result) for result in grade.checks]
    document["ignored"] = list(grade.ignored)
    return results.checked(document, SCHEMA)


def write_json(grade: Grade, path: Path) -> None:
    """Write the result file: whole or not at all."""
    results.write(path, json.dumps(as_json(grade), indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Return the document of a result file. Raises `UserError` if it is none of this version."""
    grade_again = "name a file that `invoke grade --json` wrote, or grade again"
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", grade_again) from None
    version = document.get("version") if isinstance(document, dict) else None
    if version is not None and version != VERSION:
        raise UserError(f"{path} is a result of format {version}, not {VERSION}", "grade again")
    try:
        return results.checked(document, SCHEMA)
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the file"
        raise UserError(f"{path} is no result of a grade: {where} is wrong", grade_again) from None


def write_bundle(grade: Grade, again: str, parent: Path) -> Path | None:
    """Keep what tells why a check failed; return the folder, or None if nothing needs telling.

    That is: the result, each machine's console and counters, and `again`, the command that
    repeats the run. Only a check whose work went wrong counts, not one that costs too much, nor a
    wrong answer; or a reference that was lost on the way.
    """
    failed = [r for r in grade.checks if r.verdict not in ("pass", "no-build") and not r.measured]
    wrong = [r for r in failed if r.evidence != "probe"]
    if not wrong and all(end.name == "submission" for end in grade.machines):
        return None
    results.make_folder(parent)
    try:
        name = f"{grade.lab}-{grade.variant}-{time.strftime('%Y%m%d-%H%M%S')}-"
        folder = Path(tempfile.mkdtemp(prefix=name, dir=parent))
    except OSError as error:
        raise UserError(f"{parent}: {error.strerror}", "free space, or make it writable") from error
    folder.chmod(0o755)
    write_json(grade, folder / "result.json")
    results.write(folder / "again.txt", again + "\n")
    for number, end in enumerate(grade.machines, 1):
        counters = json.dumps(end.counters, indent=2) + "\n"
        results.write(folder / f"console-{number}-{end.name}.txt", end.console)
        results.write(folder / f"counters-{number}-{end.name}.json", counters)
    return folder


def table(grade: Grade, lab: Lab, console: Console) -> None:
    """Print the grade for people."""
    rows = Table(box=box.SIMPLE_HEAD, expand=False)
    rows.add_column("check")
    rows.add_column("verdict", no_wrap=True)
    rows.add_column("points", justify="right", no_wrap=True)
    rows.add_column("per transaction" if lab.has_code else "answer", no_wrap=True)
    for rubric, title in lab.rubrics.items():
        mine = [result for result in grade.checks if result.rubric == rubric]
        got, most = sum(r.points for r in mine), sum(r.max_points for r in mine)
        rows.add_row(Text(title, "bold"), "", Text(f"{got:g}/{most:g}", "bold"), "")
        for result in mine:
            rows.add_row(
                Text(f"  {result.title}"),
                Text(result.verdict, _COLOURS.get(result.verdict, "red")),
                f"{result.points:g}/{result.max_points:g}",
                _counts(result),
            )
    console.print(rows)
    if lab.has_code:
        console.print(Text("per transaction: this one (starter .. solution)"))
    else:
        console.print(Text("answer: yours (accepted from .. to)"))
    # What is wrong with all of them (it does not compile) is said once.
    said: dict[tuple[str, str, str], list[str]] = {}
    for result in grade.checks:
        said.setdefault((result.verdict, result.reason, result.next_step), []).append(result.id)
    for (verdict, reason, next_step), ids in said.items():
        if next_step:
            console.print(Text(f"{', '.join(ids)} ({verdict}): {reason}", "bold"))
            console.print(Text(f"  -> {next_step}"))
    if grade.ignored:
        console.print(Text(f"ignored in the submission: {', '.join(grade.ignored)}"))
    if not grade.judged:
        console.print(Text("Some checks could not be judged on this machine: this is not a score."))
    else:
        what = "these checks alone, which is no grade:" if lab.partial else "score"
        console.print(Text(f"{what} {grade.score:g} of {grade.max_score:g}", "bold"))


def _counts(result: CheckResult) -> str:
    """Return the count that the check compares, with the starter's and the solution's.

    Of an answer that is a number: the number, with the least and the most that are accepted.
    """
    if "answer" in result.measured:
        low, high = result.compared_with["low"], result.compared_with["high"]
        digits = 0 if high >= 100 else 2
        return f"{result.measured['answer']:,.10g} ({low:,.{digits}f} .. {high:,.{digits}f})"
    names = [name for name in METRICS if name in result.measured]
    if not names:
        return ""
    digits = 0 if names[0] == "instructions" else 2
    starter, solution = (result.compared_with[name] for name in ("starter", "solution"))
    return (
        f"{result.measured[names[0]]:,.{digits}f} ({starter:,.{digits}f} .. {solution:,.{digits}f})"
    )
