"""lab.toml as data: what a lab asks for, and the points it gives.

Checks are of two kinds. ``serve`` runs a load and wants every byte right. ``reduction`` measures
a count per transaction and gives points for how far it is from the starter's towards the
solution's.

A lab without code has checks of a third kind only: ``answer`` measures what a student was asked
to measure, and gives points for the same result.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from grader.errors import UserError

LABS = Path(__file__).parent.parent / "labs"
METRICS = (
    "syscalls",
    "instructions",
    "wakeups",
    "queue_wakeups",
    "fd_alloc",
    "file_alloc",
    "inode_alloc",
    "dentry_alloc",
    "remote",
)
"""What a ``reduction`` check may count per transaction: instructions, the entries of functions by
their names in `grader.probe.counted`, or ``remote``: see `grader.experiment.Session.remote`."""

ANSWERS = {
    "syscalls": "number",
    "instructions": "number",
    "user": "number",
    "objects": "number",
    "transfers": "number",
    "layer": "name",
    "function": "name",
    "object": "name",
}
"""What an ``answer`` check may ask for, and whether the answer is a number or a name; what each is
says `grader.answers`."""
CONNECTIONS_PER_VCPU = 64
"""Of a bench."""


class LabError(UserError):
    """A lab.toml says something that cannot be."""

    def __init__(self, lab: str, problem: str) -> None:
        super().__init__(f"labs/{lab}/lab.toml: {problem}", "correct the file")


@dataclass(frozen=True)
class LoadShape:
    """The part of a load that a check chooses; see `grader.load.LoadSpec`."""

    connections: int
    transactions_per_connection: int
    size: int = 64
    mode: Literal["closed", "rounds"] = "closed"
    close: Literal["rst", "fin"] = "rst"
    pause_us: int = 0


@dataclass(frozen=True)
class Run:
    """One server at one place of a bench, in the words of `invoke bench`."""

    server: str
    """A name of `grader.bench.SERVERS`."""
    per_connection: int = 1
    size: int = 64
    vcpus: int = 4

    @property
    def load(self) -> LoadShape:
        """The load of such a bench."""
        connections = CONNECTIONS_PER_VCPU * self.vcpus
        return LoadShape(connections, self.per_connection, self.size, mode="rounds")


@dataclass(frozen=True)
class Step:
    """From this share of the way to the solution on, so many points."""

    share: float
    points: float


@dataclass(frozen=True)
class Check:
    """One row of the grade."""

    id: str
    rubric: str
    title: str
    kind: Literal["serve", "reduction", "answer"]
    hint: str
    server: str
    load: LoadShape
    points: float = 0.0
    """Of a ``serve`` or an ``answer`` check."""
    transactions: int = 0
    """How many a ``serve`` check asks for."""
    kills: int = 0
    """How often the server of a ``serve`` check is killed under its load before."""
    debug: bool = False
    """A ``serve`` check on the debug kernel: it must have nothing to report, and no leak."""
    metric: str = ""
    """Of a ``reduction``: one of `METRICS`, per transaction. Of an ``answer``: one of `ANSWERS`."""
    same_run: str = ""
    """The check whose measurement serves this one, too."""
    steps: tuple[Step, ...] = ()
    why: str = ""
    """Why this is asked for, and why its steps are where they are."""
    run: Run | None = None
    """What an ``answer`` is measured on."""
    versus: Run | None = None
    """Of an ``answer``: a number is so many times that of this run, a name first in what is above
    this run."""
    tolerance: float = 0.0
    """Of an ``answer``: a number may be off by this part of what is measured, beside the interval;
    a name is right, too, if it is behind the first by no more than this part."""

    @property
    def max_points(self) -> float:
        """The most this check can give."""
        return self.steps[-1].points if self.kind == "reduction" else self.points

    @property
    def evidence(self) -> str:
        """What the points rest on; see the README."""
        if self.kind == "answer":
            return "probe"
        if self.kind == "serve":
            return "wire, and the debug kernel's reports by probe" if self.debug else "wire"
        return "probe, confirmed by wire"


@dataclass(frozen=True)
class Lab:
    """One lab folder."""

    name: str
    folder: Path
    title: str
    files: tuple[str, ...]
    kernel_files: tuple[str, ...]
    rubrics: Mapping[str, str]
    checks: tuple[Check, ...]
    active_check: str
    """The check that shows whether the optimisation is active; empty where there is none."""
    active_share: float
    partial: bool = False
    """Some of its checks alone, see `only`: what they give is no grade."""

    @property
    def max_score(self) -> float:
        """The sum of all checks' points."""
        return sum(check.max_points for check in self.checks)

    @property
    def has_code(self) -> bool:
        """Whether students write code; else answers, in the only file."""
        return not any(check.kind == "answer" for check in self.checks)

    @property
    def needs_debug_kernel(self) -> bool:
        """Whether a check runs on the debug kernel."""
        return any(check.debug for check in self.checks)

    def only(self, ids: Collection[str]) -> Lab:
        """Return the lab with these checks alone; raises `UserError` for one that is not there.

        A check that is judged from another one's measurement brings that one with it.
        """
        known = {check.id: check for check in self.checks}
        if unknown := [id for id in ids if id not in known]:
            raise UserError(
                f"{self.name} has no check {', '.join(unknown)}",
                f"choose from: {', '.join(known)}",
            )
        wanted = {known[id].same_run for id in ids} | set(ids)
        checks = tuple(check for check in self.checks if check.id in wanted)
        rubrics = {
            id: title
            for id, title in self.rubrics.items()
            if any(check.rubric == id for check in checks)
        }
        return replace(self, checks=checks, rubrics=rubrics, partial=True)


def known_labs() -> list[str]:
    """Return the names of the labs in this tree."""
    return sorted(path.parent.name for path in LABS.glob("*/lab.toml"))


def load_lab(name: str, labs: Path = LABS) -> Lab:
    """Read labs/<name>/lab.toml; raises `LabError` with what is wrong and where."""
    folder = labs / name
    try:
        table = tomllib.loads((folder / "lab.toml").read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"there is no lab called {name}", f"choose one of: {', '.join(known_labs())}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise LabError(name, str(error)) from error
    try:
        return _lab(name, folder, table)
    except (KeyError, TypeError) as error:
        raise LabError(name, f"missing or unknown key: {error}") from error


def _lab(name: str, folder: Path, table: Mapping[str, Any]) -> Lab:
    rubrics = {entry["id"]: entry["title"] for entry in table["rubric"]}
    checks: dict[str, Check] = {}
    for entry in table["check"]:
        check = _check(name, entry, table["server"], checks)
        if check.id in checks:
            raise LabError(name, f"two checks are called {check.id}")
        if check.rubric not in rubrics:
            raise LabError(name, f"check {check.id}: there is no rubric {check.rubric}")
        checks[check.id] = check
    if unused := set(rubrics) - {check.rubric for check in checks.values()}:
        raise LabError(name, f"no check counts towards: {', '.join(sorted(unused))}")
    files, kernel_files = tuple(table["files"]), tuple(table["kernel"])
    if not set(kernel_files) <= set(files):
        raise LabError(name, "kernel lists a file that files does not")
    lab = Lab(
        name=name,
        folder=folder,
        title=table["title"],
        files=files,
        kernel_files=kernel_files,
        rubrics=rubrics,
        checks=tuple(checks.values()),
        active_check="",
        active_share=0.0,
    )
    if lab.has_code:
        active = table["active"]
        if active["check"] not in checks or checks[active["check"]].kind != "reduction":
            raise LabError(name, f"active.check: {active['check']} is no reduction check")
        return replace(lab, active_check=active["check"], active_share=active["share"])
    if "active" in table or len(files) > 1 or any(c.kind != "answer" for c in lab.checks):
        raise LabError(name, "a lab of answers has one file, no other checks, no active")
    return lab


def _check(lab: str, entry: Mapping[str, Any], server: str, earlier: Mapping[str, Check]) -> Check:
    values = dict(entry)
    where = f"check {values['id']}"
    if values["kind"] == "answer":
        run = Run(**({"server": server} | values.pop("run")))
        if other := values.pop("versus", None):
            values["versus"] = replace(run, **other)
        values["run"], load, server = run, run.load, run.server
    elif source := values.get("same_run"):
        if source not in earlier or earlier[source].metric == "remote":
            raise LabError(lab, f"{where}: same_run names no earlier check of whole transactions")
        load, server = earlier[source].load, earlier[source].server
    else:
        load = LoadShape(**values.pop("load"))
    values.setdefault("server", server)
    steps = tuple(Step(**step) for step in values.pop("steps", ()))
    if unknown := set(values) - {field.name for field in fields(Check)}:
        raise LabError(lab, f"{where}: unknown keys {', '.join(sorted(unknown))}")
    check = Check(**values, load=load, steps=steps)
    if problem := _problem(check):
        raise LabError(lab, f"{where}: {problem}")
    return check


def _problem(check: Check) -> str:
    """Return what a check says that cannot be, or nothing."""
    if check.kind != "answer" and (check.run or check.versus or check.tolerance):
        return "run, versus and tolerance are an answer's"
    if check.kind == "serve":
        if check.points <= 0 or check.transactions <= 0 or check.steps or check.metric:
            return "a serve check has points and transactions, no steps"
        return ""
    if check.kind == "reduction":
        return _problem_of_reduction(check)
    if check.kind == "answer":
        return _problem_of_answer(check)
    return "kind is none of serve, reduction and answer"


def _problem_of_reduction(check: Check) -> str:
    steps = check.steps
    increasing = all(
        a.share < b.share and a.points < b.points for a, b in itertools.pairwise(steps)
    )
    problems = {
        f"metric is none of {', '.join(METRICS)}": check.metric not in METRICS,
        "remote is measured with one connection at a time": check.metric == "remote"
        and check.load.connections != 1,
        "a reduction check has steps; no other points, debug or kills": not steps
        or check.points
        or check.debug
        or check.kills,
        "steps must increase, between 0 and 1": steps
        and not (increasing and 0 < steps[0].share <= steps[-1].share < 1),
    }
    return next((problem for problem, there in problems.items() if there), "")


def _problem_of_answer(check: Check) -> str:
    others = (check.steps, check.transactions, check.kills, check.debug, check.same_run)
    if check.metric not in ANSWERS:
        return f"metric is none of {', '.join(ANSWERS)}"
    if check.points <= 0 or not 0 < check.tolerance < 1:
        return "an answer has points, and a tolerance between 0 and 1"
    return "an answer has no key of another kind of check" if any(others) else ""
