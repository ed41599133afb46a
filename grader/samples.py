"""What a bench has measured: raw counts, kept as they come, and the result file made of them.

A bench takes minutes to hours. Each sample goes at once, as a line, into a journal beside the
result (``NAME.journal``); whatever ends the bench, the same command goes on from there. The
result appears under its name when it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grader import results
from grader.cache import write_whole
from grader.errors import UserError
from grader.experiment import Costs, Window, slope, together

SCHEMA = Path(__file__).with_name("bench.schema.json")
VERSION = 1


class BadResult(UserError):
    """A file is not the result of a bench, or of another bench than this one."""


@dataclass(frozen=True, order=True)
class Cell:
    """One place of the grid, where all servers meet the same load."""

    vcpus: int
    size: int
    """Bytes of a message."""
    per_connection: int
    """Transactions of a connection; 0: it stays open."""

    @property
    def life(self) -> str:
        """How long connections live, for people."""
        return f"n = {self.per_connection}" if self.per_connection else "connections stay open"


@dataclass(frozen=True)
class LockUse:
    """What was done with the locks of one name, in both windows together."""

    name: str
    """What they are a part of."""
    locks: int
    """How many they are."""
    visits: int
    """How often one of them was taken."""
    held: int
    """Instructions of whoever held it."""
    handovers: int
    """How often another CPU had it before."""


@dataclass(frozen=True)
class Sample:
    """One server, measured once: a short and a long window."""

    cell: Cell
    server: str
    round: int
    seed: int
    seconds: float
    """Wall time of the measurement, server start and warm-up included."""
    short: Window
    long: Window
    locks: tuple[LockUse, ...] = ()
    """Where locks were followed (in exact mode), the busiest first."""
    exact: bool = False
    """Whether it was measured in exact mode: there a cost is all that was counted."""

    @property
    def costs(self) -> Costs:
        """What one transaction cost.

        The slope between the windows; in exact mode, where nothing but the load happens in them
        and vCPUs fall into another rhythm in each, both together.
        """
        return (together if self.exact else slope)(self.short, self.long)

    def as_json(self) -> dict[str, Any]:
        """Return the sample as plain data."""
        data = {key: value for key, value in asdict(self).items() if key not in ("cell", "exact")}
        if not self.locks:
            del data["locks"]
        return {**asdict(self.cell), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], identity: Mapping[str, Any]) -> Sample:
        """Return the sample that `as_json` gave, of a bench with this identity."""
        return cls(
            Cell(data["vcpus"], data["size"], data["per_connection"]),
            data["server"],
            data["round"],
            data["seed"],
            data["seconds"],
            Window(**data["short"]),
            Window(**data["long"]),
            tuple(LockUse(**use) for use in data.get("locks", ())),
            bool(identity.get("exact")),
        )


class Journal:
    """The samples of a bench that is under way.

    `identity` says what is measured with what; a journal of something else is not gone on with.
    """

    def __init__(self, result: Path, identity: Mapping[str, Any]) -> None:
        self.result = result
        self.path = result.with_name(f"{result.name}.journal")
        self._identity = json.loads(json.dumps(identity))
        self.samples: list[Sample] = []

    @contextmanager
    def open(self, *, fresh: bool = False) -> Iterator[None]:
        """Read what is there, unless `fresh`; lock it for as long as the block lasts."""
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another bench is writing {self.result}", "wait, or name another file with --out"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if fresh:
                self.path.unlink(missing_ok=True)
            self._read()
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def _read(self) -> None:
        self.samples = []
        if not self.path.exists():
            self._append({"version": VERSION, "identity": self._identity})
            return
        try:
            lines = [json.loads(line) for line in _whole_lines(self.path)]
            head, *samples = lines
            if head["version"] != VERSION:
                raise ValueError("of another version")
            self.samples = [Sample.from_json(sample, self._identity) for sample in samples]
            different = [key for key, value in self._identity.items()
                         if head["identity"].get(key) != value]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadResult(
                f"{self.path} is no journal of a bench ({error})", "--fresh starts anew"
            ) from None
        if different:
            raise BadResult(
                f"{self.path} is of a bench with another {', '.join(different)}",
                "--fresh discards it; --out names another file",
            )

    def add(self, sample: Sample) -> None:
        """Keep a sample, whatever happens from now on."""
        self._append(sample.as_json())
        self.samples.append(sample)

    def finish(self, document: Mapping[str, Any]) -> None:
        """Write the result, whole, and remove the journal."""
        results.write(self.result, json.dumps(document, indent=1) + "\n")
        self.path.unlink()

    def _append(self, data: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(data) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written: {error.strerror}",
            "free space, or name another file with --out; the same command goes on from there",
        )


def _whole_lines(path: Path) -> list[str]:
    """Return the lines; one that was cut off by a full disk or a crash is taken away."""
    data = path.read_text()
    whole, newline, rest = data.rpartition("\n")
    if rest:
        write_whole(path, whole + newline)
    return whole.splitlines()


def document(
    identity: Mapping[str, Any], environment: Mapping[str, Any], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Return the result as the schema describes it."""
    made = {
        "version": VERSION,
        "identity": dict(identity),
        "environment": dict(environment),
        "samples": [sample.as_json() for sample in samples],
    }
    return results.checked(made, SCHEMA)


def read(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Return a result file's content and its samples. Raises `BadResult`."""
    found = results.read(path, SCHEMA, "a bench", BadResult)
    return found, [Sample.from_json(sample, found["identity"]) for sample in found["samples"]]
