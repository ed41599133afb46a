"""What pictures are made of: published numbers, and result files of bench, grade and grade-all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grader import compare, contributions, model, recorded, report, samples, scaling
from grader import latency as latencies
from grader.checks import Interval, interval
from grader.compare import Comparison, Measure
from grader.contributions import Contribution
from grader.errors import UserError
from grader.scaling import Growth
from grader.sharing import read_transfers

BENCH = recorded.BENCH.resolve()
RECORDED = BENCH.parent
SHARING = RECORDED / "sharing.json"
EXACT = RECORDED / "exact.json"
SIZES = RECORDED / "sizes.json"
LATENCY = RECORDED / "latency.json"
CLASS_LAB = "1-batching"
CLASS = RECORDED / f"class-{CLASS_LAB}.csv"
# Where servers are laid side by side; a bench may hold other cells, too.
SIZE, VCPUS = 64, 4


class Missing(UserError):
    """A result does not hold what a picture shows."""


@dataclass(frozen=True)
class Bench:
    """A bench's result, for the pictures: messages of 64 bytes, 4 vCPUs."""

    path: Path
    document: Mapping[str, Any]
    lives: Mapping[int, Comparison]
    """By transactions per connection; 0, a connection that stays open, is the last."""
    transfers: Mapping[int, Mapping[str, Interval]]
    """Cache lines that each server moves per transaction, for the lives where they were counted."""

    def at(self, n: int, *servers: str) -> Comparison:
        """Return the servers side by side at n transactions per connection.

        Raises `Missing` if that was not measured, or not of all of these servers.
        """
        there = self.lives.get(n)
        lacking = [one for one in servers if there is None or one not in there.samples]
        if there is None or lacking:
            what = ", ".join(lacking) or "nothing"
            raise Missing(
                f"{self.path} has not {what} {at_life(n)}, {SIZE} B, {VCPUS} vCPUs",
                f"invoke bench --servers {','.join(lacking) or 'all'} --per-connection {n}, "
                "or name another result",
            )
        return there

    def spread(self, n: int, server: str, measure: Measure = compare.instructions) -> Interval:
        """Return a server's mean per transaction with its 95 % interval. Raises `Missing`."""
        return self.at(n, server).spread(server, measure)

    def gain(self, n: int, server: str, base: str) -> Interval:
        """Return how many times as many instructions `base` executes as `server`, round by round.

        That is how many times as many transactions it would do if nothing but its instructions took
        time. Raises `Missing`.
        """
        found = self.at(n, server, base).ratio(base, compare.instructions, server)
        assert found is not None
        return found

    def model_gain(self, n: int, server: str, base: str) -> float | None:
        """Return the same in the model's cycles, transfers included; None if those are absent."""
        counts = self.counts(n)
        if n not in self.transfers or not {server, base} <= set(counts):
            return None
        return model.cycles(counts[base]) / model.cycles(counts[server])

    def counts(self, n: int) -> dict[str, dict[str, float]]:
        """Return what the model takes, of each server; with transfers only where counted."""
        return contributions.counts(self.at(n), self._moved(n))

    def _moved(self, n: int) -> dict[str, float] | None:
        there = self.transfers.get(n)
        return None if there is None else {server: one.mean for server, one in there.items()}

    def contributions(self, n: int, *, with_transfers: bool) -> list[Contribution]:
        """Return what P, B and L take away, in the paper's order. Raises `Missing`."""
        self.at(n, *(server for step in contributions.IN_ORDER for server in step[1:]))
        moved = self._moved(n) if with_transfers else None
        return contributions.contributions(contributions.counts(self.at(n), moved))

    def servers(self, *wanted: str) -> list[str]:
        """Return which of these were measured in every life; without any, all that were."""
        there = list(next(iter(self.lives.values())).samples)
        for comparison in self.lives.values():
            there = [server for server in there if server in comparison.samples]
        return [server for server in wanted or there if server in there]

    @property
    def shortest(self) -> int:
        """The transactions of the shortest life."""
        return next(iter(self.lives))

    @property
    def longest(self) -> int:
        """The transactions of the longest life that ends; 0 if all connections stay open."""
        return max(self.lives)

    def nearest(self, n: int) -> int:
        """Return the life nearest to n transactions, by factors; one that ends, if any does."""
        return nearest(self.lives, n)

    @property
    def about(self) -> str:
        """What it was measured with, in one line."""
        said = self.document["environment"]
        rounds = len(next(iter(next(iter(self.lives.values())).samples.values())))
        return (
            f"{self.path.name}: {said['qemu'].partition(' (')[0]}, {said['host_processor']}, "
            f"{said['host_cpus']} cores, commit {said['commit'] or 'unknown'}, {said['time']}; "
            f"{rounds} rounds"
        )


@dataclass(frozen=True)
class Cores:
    """A bench in exact mode, for the pictures: messages of 64 bytes, as the vCPUs grow."""

    path: Path
    document: Mapping[str, Any]
    lives: Mapping[int, Mapping[str, Growth]]
    """By transactions per connection, and server."""

    def of(self, n: int, server: str) -> Growth:
        """Return a server's samples by its vCPUs. Raises `Missing`."""
        found = self.lives.get(n, {}).get(server)
        if not found:
            raise Missing(
                f"{self.path} has not {server} {at_life(n)}, {SIZE} B",
                f"invoke bench --exact --sharing --servers {server} --per-connection {n} "
                "--smp 1,2,4,8,16, or name another result",
            )
        return found

    def counts(self, n: int, server: str, name: str) -> list[tuple[float, float]]:
        """Return (vCPUs, so many per transaction) of something that was counted."""
        return [(vcpus, one.costs.calls[name]) for vcpus, one in self.of(n, server).items()]

    def instructions(self, n: int, server: str) -> list[tuple[float, float]]:
        """Return (vCPUs, instructions per transaction), without the clock's interrupt."""
        return [(vcpus, one.costs.work) for vcpus, one in self.of(n, server).items()]

    def speed(self, n: int, server: str) -> list[tuple[float, float]]:
        """Return (vCPUs, times the throughput of one), by the model's cycles."""
        return list(scaling.speed(self.of(n, server)))

    def gain(self, n: int, server: str, base: str) -> list[tuple[float, float]]:
        """Return (vCPUs, times the throughput of `base`), by the model's cycles."""
        return list(scaling.gain(self.of(n, server), self.of(n, base)))

    def waited(self, n: int, server: str) -> list[tuple[float, float]]:
        """Return (vCPUs, the part of a transaction's cycles that waits for locks), by the model."""
        return list(scaling.waited(self.of(n, server)))

    def servers(self, n: int, *wanted: str) -> list[str]:
        """Return which of these were measured on as many vCPUs as any."""
        there = self.lives.get(n, {})
        most = max(map(len, there.values()), default=0)
        return [one for one in wanted if len(there.get(one, ())) == most]

    @property
    def followed_locks(self) -> bool:
        """Whether it was counted what the kernel's locks do."""
        growths = (growth for life in self.lives.values() for growth in life.values())
        return any(sample.locks for growth in growths for sample in growth.values())

    @property
    def vcpus(self) -> list[int]:
        """The numbers of vCPUs, ascending."""
        return sorted({v for life in self.lives.values() for one in life.values() for v in one})

    @property
    def about(self) -> str:
        """What it was measured with, in one line."""
        return _about_exact(self.path, self.document)


def _about_exact(path: Path, document: Mapping[str, Any]) -> str:
    said, turn = document["environment"], document["identity"]["exact"]["turn"]
    return (
        f"{path.name}: {said['qemu'].partition(' (')[0]}, virtual time, turns of {turn} "
        f"ticks, commit {said['commit'] or 'unknown'}, {said['time']}"
    )


def cores(result: Path | str = EXACT) -> Cores:
    """Read a result of ``invoke bench --exact --sharing``. Raises `UserError`."""
    path = Path(result)
    document, found = samples.read(path)
    exact = document["identity"].get("exact")
    if not exact or not exact["sharing"]:
        raise Missing(
            f"{path} was not measured in exact mode, with the lines that move",
            "invoke bench --exact --sharing --smp 1,2,4,8,16",
        )
    lives = {n: servers for (n, size), servers in scaling.grown(found).items() if size == SIZE}
    if not lives:
        raise Missing(f"{path} has nothing of {SIZE} B", "name another result")
    return Cores(path, document, lives)


@dataclass(frozen=True)
class Sizes:
    """A bench in exact mode, for the pictures: over messages' sizes and the server's vCPUs."""

    path: Path
    document: Mapping[str, Any]
    life: int
    """The transactions of each connection."""
    grown: Mapping[int, Mapping[str, Growth]]
    """By bytes of a message, and server."""

    def gain(self, size: int, server: str, base: str) -> dict[int, float]:
        """Return how many times as many instructions `base` executes as `server`, by vCPUs.

        Where both were measured; raises `Missing` if that is nowhere.
        """
        servers = self.grown.get(size, {})
        mine, other = servers.get(server, {}), servers.get(base, {})
        found = {v: other[v].costs.work / one.costs.work for v, one in mine.items() if v in other}
        if not found:
            raise Missing(
                f"{self.path} has not {server} beside {base} {at_life(self.life)}, {size} B",
                f"invoke bench --exact --servers {base},{server} --per-connection {self.life} "
                f"--sizes {size} --smp 1,2,4,8, or name another result",
            )
        return found

    @property
    def sizes(self) -> list[int]:
        """The bytes of a message, ascending."""
        return sorted(self.grown)

    @property
    def about(self) -> str:
        """What it was measured with, in one line."""
        return _about_exact(self.path, self.document)


def sizes(result: Path | str = SIZES) -> Sizes:
    """Read a result of ``invoke bench --exact --sizes ...``. Raises `UserError`.

    Of several lives the one nearest to ten transactions, which is the paper's.
    """
    path = Path(result)
    document, found = samples.read(path)
    if not document["identity"].get("exact"):
        raise Missing(
            f"{path} was not measured in exact mode",
            "invoke bench --exact --servers epoll,BPL --per-connection 10 "
            "--sizes 64,1024,16384 --smp 1,2,4,8",
        )
    grown = scaling.grown(found)
    life = nearest({n for n, _ in grown}, 10)
    mine = {size: one for (n, size), one in grown.items() if n == life}
    servers = mine.get(SIZE, {})
    if not servers or any(1 not in growth for growth in servers.values()):
        raise Missing(
            f"{path} has not {SIZE} B on one vCPU, with which all is compared",
            f"invoke bench --exact with {SIZE} among --sizes and 1 among --smp",
        )
    return Sizes(path, document, life, mine)


@dataclass(frozen=True)
class Latencies:
    """What `invoke latency` has measured, for the pictures."""

    path: Path
    document: Mapping[str, Any]
    rows: Sequence[latencies.Row]

    @property
    def loads(self) -> list[int]:
        """The numbers of connections, ascending."""
        return sorted({row.connections for row in self.rows})

    def of(self, connections: int) -> list[latencies.Row]:
        """Return what was measured with so many connections, by threshold."""
        found = [row for row in self.rows if row.connections == connections]
        return sorted(found, key=lambda row: row.threshold)


def latency(result: Path | str = LATENCY) -> Latencies:
    """Read a result of ``invoke latency``. Raises `UserError`."""
    path = Path(result)
    return Latencies(path, *latencies.read(path))


def nearest(lives: Iterable[int], n: int) -> int:
    """Return the life nearest to n transactions, by factors; one that ends, if any does."""
    return min(filter(None, lives), key=lambda one: abs(math.log(one / n)), default=0)


def life(n: float) -> str:
    """Return for people how long a connection lives: n transactions; 0 or infinite: it stays."""
    return f"n = {n:g}" if n and not math.isinf(n) else "connections that stay open"


def at_life(n: float) -> str:
    """Return the same after a number: at n transactions, or on connections that stay open."""
    return f"{'at' if n and not math.isinf(n) else 'on'} {life(n)}"


def bench(result: Path | str = BENCH, sharing: Path | str = "") -> Bench:
    """Read a bench's result, and the transfers that `invoke bench --sharing` has counted.

    Without `sharing`: those in ``sharing.json`` beside it, if that is there. Raises `UserError`.
    """
    path = Path(result)
    document, found = samples.read(path)
    lives = {
        comparison.cell.per_connection: comparison
        for comparison in compare.compare(found)
        if (comparison.cell.size, comparison.cell.vcpus) == (SIZE, VCPUS)
    }
    if not lives:
        raise Missing(
            f"{path} has no two whole rounds of {SIZE} B on {VCPUS} vCPUs",
            f"invoke bench --sizes {SIZE} --smp {VCPUS}, or name another result",
        )
    beside = Path(sharing or path.with_name(SHARING.name))
    there = bool(sharing) or beside.is_file()
    return Bench(
        path,
        document,
        dict(sorted(lives.items(), key=lambda item: item[0] or math.inf)),
        _transfers(beside, document["identity"]) if there else {},
    )


def _transfers(path: Path, identity: Mapping[str, Any]) -> dict[int, dict[str, Interval]]:
    # It knows what such a file is, and refuses one of another kernel or module.
    read_transfers(path, identity)
    return {
        cell["per_connection"]: {
            server: interval([one["moved"]["loads"] + one["moved"]["stores"] for one in rounds])
            for server, rounds in cell["servers"].items()
        }
        for cell in json.loads(path.read_text())["cells"]
        if (cell["size"], cell["vcpus"]) == (SIZE, VCPUS)
    }


def grade(path: Path | str, lab: str = "") -> dict[str, Any]:
    """Read what ``invoke grade --json`` has written, of any lab if none is named.

    Raises `UserError`, also for another lab than that.
    """
    document = report.read(Path(path))
    if lab and document["lab"] != lab:
        raise UserError(
            f"{path} is a grade of {document['lab']}, not of {lab}",
            f"invoke grade --lab {lab} --json FILE, and name that",
        )
    return document


def recorded_grade(lab: str, variant: str) -> Path:
    """Return where the grade of a variant of this tree is kept, if it was recorded."""
    return RECORDED / f"{lab}-{variant}.json"


@dataclass(frozen=True)
class Student:
    """A row of a class's summary."""

    name: str
    status: str
    score: float | None
    """None: no grade, which is not 0."""
    checks: Mapping[str, float]
    """Points of each check; empty without a grade."""
    verdicts: str


def graded_class(path: Path | str) -> list[Student]:
    """Read the ``summary.csv`` of ``invoke grade-all``. Raises `UserError`."""
    todo = "name the summary.csv that invoke grade-all has written"
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        students = [
            Student(
                row["student"],
                row["status"],
                float(row["score"]) if row["score"] else None,
                {
                    name.removeprefix("check:"): float(value)
                    for name, value in row.items()
                    if name.startswith("check:") and value
                },
                row["verdicts"],
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is no summary of a class: {error}", todo) from None
    if not students:
        raise UserError(f"{path} is no summary of a class: it has no student", todo)
    return students


def scores(students: Sequence[Student]) -> list[float]:
    """Return the scores of those who have one."""
    return [student.score for student in students if student.score is not None]
