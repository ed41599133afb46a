"""Experiments: a server in the guest, a load from outside, and what came of it.

A window of N transactions ends when the system has drained, so work that was put off is in it;
what a window costs beside its transactions (the drain, the clock's ticks) is in a window of any
length. A cost per transaction is therefore the slope between a short and a long window, summed
over all vCPUs: neither preparing work before the window nor putting it off beyond it, nor moving
it to another vCPU, makes it smaller.
"""

from __future__ import annotations

import functools
import shlex
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from grader.lab import LoadShape
from grader.load import ByteError, Load, LoadError, LoadSpec, PhaseResult, Stalled, Stopped
from grader.machine import Hung, Machine, MachineError, Panicked
from grader.probe import REPORTERS
from grader.station import Station

PORT = 5000
STALL_SECONDS = 4.0
# Transactions of the short window; the long one has twice as many.
SHORT_WINDOW = 1024
# Connections of a round of `Session.remote`, one after the other.
REMOTE_CONNECTIONS = 24
# Seconds for a server to start, and to be gone after SIGKILL.
START_SECONDS = 10.0
KILL_SECONDS = 5.0
# How long a server that is to be killed has served; and connections that outlast it.
KILL_AFTER_SECONDS = 0.5
OUTLASTING = 100_000
# Twice, for what has changed since the last search does not count as leaked, nor what is younger
# than 5 s; a search takes longer. A cache that outlives the module is there twice afterwards.
LEAVE = (
    "echo scan > /sys/kernel/debug/kmemleak; echo scan > /sys/kernel/debug/kmemleak; "
    "cat /sys/kernel/debug/kmemleak; caches=$(wc -l < /proc/slabinfo); "
    "rmmod megapipe && insmod /megapipe.ko || exit 1; "
    "[ $(wc -l < /proc/slabinfo) -le $caches ] || exit 2"
)
LEAVE_SECONDS = 30.0
# kmemleak does not see a socket that nobody closes: its inode is on a list. (The kernel's count of
# open files is no good: it is rounded to 32 for each processor.)
SOCKETS = "sed -n 's/sockets: used //p' /proc/net/sockstat"
# More or fewer at the end than at the beginning, for whatever else is running.
FEW_SOCKETS = 8
# A module from outside taints the kernel.
EXPECTED_REPORTS = ("taint",)
# Of the reports, those that no load of the host can cause: that a stall is seen can have one.
CONCLUSIVE_REPORTS = (
    "kasan",
    "kfence",
    "slub",
    "ubsan",
    "lockdep",
    "debug_objects",
    "schedule_bug",
    "kmemleak",
)
# What a connection consists of on the server: all of it belongs where its packets arrive.
LOCAL_WORK = ("tcp_accept", "tcp_recvmsg", "tcp_sendmsg", "tcp_close")


@dataclass(frozen=True)
class Costs:
    """What one transaction costs: counts per transaction, over all vCPUs."""

    user_instructions: float
    kernel_instructions: float
    clock_instructions: float
    """Of the kernel's, those in the clock's interrupt; they go with real time."""
    calls: Mapping[str, float]
    """Entries of each function that the probe counts."""

    @property
    def instructions(self) -> float:
        """User and kernel instructions together."""
        return self.user_instructions + self.kernel_instructions

    @property
    def work(self) -> float:
        """The instructions without the clock's."""
        return self.instructions - self.clock_instructions

    def metric(self, name: str) -> float:
        """Return the cost that a lab.toml calls `name`."""
        return self.instructions if name == "instructions" else self.calls[name]


@dataclass(frozen=True)
class Window:
    """What was counted, over all vCPUs, while so many transactions were done."""

    transactions: int
    user: int
    kernel: int
    clock: int
    calls: Mapping[str, int]


def slope(short: Window, long: Window) -> Costs:
    """Return what a transaction costs, from windows of different length."""
    span = long.transactions - short.transactions
    return Costs(
        user_instructions=(long.user - short.user) / span,
        kernel_instructions=(long.kernel - short.kernel) / span,
        clock_instructions=(long.clock - short.clock) / span,
        calls={name: (count - short.calls[name]) / span for name, count in long.calls.items()},
    )


def together(*windows: Window) -> Costs:
    """Return what a transaction costs, all that was counted in these windows included."""
    span = sum(window.transactions for window in windows)
    return Costs(
        user_instructions=sum(window.user for window in windows) / span,
        kernel_instructions=sum(window.kernel for window in windows) / span,
        clock_instructions=sum(window.clock for window in windows) / span,
        calls={
            name: sum(window.calls[name] for window in windows) / span for name in windows[0].calls
        },
    )


@dataclass(frozen=True)
class Failure:
    """Why an experiment has no result."""

    verdict: Literal["fail", "panic", "hang", "infra"]
    reason: str
    trace: str = ""
    """Of a panic or a hang: what the kernel printed, decoded."""
    phase: PhaseResult | None = None
    """What the load has seen of it, if it came to its end."""
    conclusive: bool = False
    """No fault of the host's can be the reason, so there is nothing to compare it with."""


class ExperimentFailed(Exception):
    """The variant did not get through the experiment; `failure` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def machine_failure(error: MachineError) -> Failure:
    """Return the verdict for a guest that is gone: ``hang`` if it is silent, else ``panic``."""
    if isinstance(error, Hung):
        return Failure("hang", error.problem, error.trace)
    if isinstance(error, Panicked):
        return Failure("panic", error.problem, error.trace)
    return Failure("panic", error.problem, error.console)


class Session:
    """A server that runs in a station, with a load attached to it; a context manager.

    `sources` are the load's own addresses and ports, see `LoadSpec`.
    Whatever goes wrong is raised as `ExperimentFailed`, with load and server ended.
    """

    def __init__(
        self,
        station: Station,
        server: str,
        shape: LoadShape,
        seed: int,
        sources: Sequence[str] = (),
    ) -> None:
        self._station = station
        self._program = shlex.split(server)[0]
        # As the kernel knows it.
        self._name = shlex.quote(self._program[:15])
        buffer = max(4096, min(shape.size, 65536))
        self._command = f"{server} --buffer {buffer} --daemon --port {PORT}"
        machine = station.machine
        spec = LoadSpec(
            address=machine.address,
            port=PORT,
            connections=shape.connections,
            transactions_per_connection=shape.transactions_per_connection,
            size=shape.size,
            mode=shape.mode,
            close=shape.close,
            pause_us=shape.pause_us,
            seed=seed,
            sources=tuple(sources),
            stall_seconds=machine.scaled(STALL_SECONDS),
        )
        pipe = subprocess.PIPE
        spawn = functools.partial(machine.host, stdin=pipe, stdout=pipe, stderr=pipe)
        self._load = Load(spec, spawn, machine.watch)
        self._unit = max(1, shape.transactions_per_connection)
        self._ended = False

    def __enter__(self) -> Self:
        """Start the server, open the connections and warm up."""
        with self._judged():
            started = self._station.machine.run(self._command, timeout=START_SECONDS)
            if started.status:
                text = started.output.decode(errors="replace").strip()[-500:]
                raise ExperimentFailed(
                    Failure("fail", f"{self._program} ended with status {started.status}: {text}")
                )
            self._load.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections and end the server."""
        if self._ended:
            return
        if kind is not None:
            self._load.close()
            return
        with self._judged():
            self._load.finish()
            self._load.close()
            if not self._kill():
                raise ExperimentFailed(Failure("hang", f"{self._program} cannot be killed"))
            self._ended = True

    def run(self, transactions: int) -> PhaseResult:
        """Do so many transactions, every byte right."""
        with self._judged():
            phase = self._load.go(transactions)
            if phase.error_count or not phase.complete:
                raise ExperimentFailed(Failure("fail", _describe_errors(phase), phase=phase))
        return phase

    def costs(self, short: int, long: int) -> Costs:
        """Measure the cost of a transaction as the slope between two windows."""
        return slope(*self.windows(short, long))

    def windows(self, *lengths: int) -> list[Window]:
        """Count during so many transactions each, one window after the other."""
        before = self._station.probe.read()
        windows = []
        for transactions in lengths:
            self.run(transactions)
            after = self._station.probe.read()
            total = (after - before).total
            windows.append(
                Window(transactions, total.user, total.kernel, total.clock, total.functions)
            )
            before = after
        return windows

    def remote(self, transactions: int) -> Costs:
        """Return the costs, with ``remote``: work on another vCPU than the packets arrive on.

        For a load of one connection at a time, and counted for one at a time: the vCPU on which
        most of its packets arrived is its home. Of `LOCAL_WORK`, 0 when all of it is done there,
        1 when none is. The rest is a mean, in which the pauses between the transactions are, too.
        """
        away = 0
        first = before = self._station.probe.read()
        for _ in range(transactions):
            self.run(1)
            after = self._station.probe.read()
            moved = (after - before).functions
            home = int(moved["tcp_rcv"].argmax())
            away += sum(int(moved[name].sum() - moved[name][home]) for name in LOCAL_WORK)
            before = after
        total = (before - first).total
        calls = {name: count / transactions for name, count in total.functions.items()}
        return Costs(
            user_instructions=total.user / transactions,
            kernel_instructions=total.kernel / transactions,
            clock_instructions=total.clock / transactions,
            calls={**calls, "remote": away / len(LOCAL_WORK) / transactions},
        )

    def kill_under_load(self) -> None:
        """Kill the server while its clients work, whose errors are none; it must go."""
        later = (
            f"(sleep {KILL_AFTER_SECONDS}; killall -9 {self._name}) </dev/null >/dev/null 2>&1 &"
        )
        with self._judged():
            self._station.machine.run(later)
            with suppress(Stalled, Stopped):
                self._load.go(OUTLASTING * self._unit)
            self._load.close()
            if not self._kill():
                raise ExperimentFailed(Failure("hang", f"{self._program} cannot be killed"))
        self._ended = True

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Turn what went wrong into a verdict, and leave nothing running."""
        try:
            yield
        except MachineError as error:
            failure = machine_failure(error)
        except Stalled as error:
            failure = self._after_stall(str(error))
        except Stopped as error:
            failure = self._unless_stuck(Failure("fail", str(error)))
        except LoadError as error:
            failure = Failure("infra", f"the load generator failed: {error}")
        except ExperimentFailed as error:
            failure = self._unless_stuck(error.failure)
        else:
            return
        self._ended = True
        self._load.close()
        raise ExperimentFailed(failure)

    def _kill(self) -> bool:
        """End the server; False if its threads do not go: one of them hangs in the kernel."""
        command = (
            f"killall -9 {self._name} 2>/dev/null; "
            f"for i in $(seq 20); do pidof {self._name} >/dev/null || exit 0; sleep 0.1; done; "
            "exit 1"
        )
        return self._station.machine.run(command, timeout=KILL_SECONDS).status == 0

    def _unless_stuck(self, failure: Failure) -> Failure:
        """Return `failure`, or one that says that the server cannot even be killed."""
        if failure.verdict != "fail":
            return failure
        try:
            if self._kill():
                return failure
        except MachineError as error:
            after = machine_failure(error)
            return Failure(after.verdict, f"{failure.reason}; and then {after.reason}", after.trace)
        return Failure("hang", f"{failure.reason}; and then {self._program} could not be killed")

    def _after_stall(self, what: str) -> Failure:
        """Tell a server that merely does not answer from one that hangs in the kernel.

        The first can be killed; the second, or a machine that does not answer, hangs.
        """
        return self._unless_stuck(
            Failure(
                "fail",
                f"{what}. The server sleeps and can be killed: a wake-up was lost, "
                "or a request was never executed",
            )
        )


def _sockets_in_use(machine: Machine) -> int:
    """Return how many sockets the guest says are open; a guest that cannot say has failed."""
    done = machine.run(SOCKETS)
    try:
        return int(done.text)
    except ValueError:
        said = done.text.strip()[-300:] or "nothing"
        reason = f"asked for its number of open sockets, the guest says {said!r}"
        raise ExperimentFailed(Failure("fail", reason)) from None


@contextmanager
def nothing_to_report(station: Station) -> Iterator[None]:
    """Let a station with the debug kernel do something; it must leave no report and no leak.

    What counts is what the probe has seen the kernel call to report a bug. At the end memory is
    searched for what nobody points to any more, the module is unloaded (at which its caches must
    be empty, and go) and loaded again, and no more sockets may be open than at the beginning.
    Raises `ExperimentFailed`, with what the kernel printed.
    """
    machine = station.machine
    before = station.probe.read()
    reports = len(machine.console.transcript.reports())
    try:
        sockets = _sockets_in_use(machine)
    except MachineError as error:
        raise ExperimentFailed(machine_failure(error)) from None
    yield
    try:
        leaving = machine.run(LEAVE, timeout=LEAVE_SECONDS)
        # Only now: a process that is gone may still be closing its sockets.
        left = _sockets_in_use(machine) - sockets
    except MachineError as error:
        raise ExperimentFailed(machine_failure(error)) from None
    moved = (station.probe.read() - before).total.functions
    found = {
        counted.name: f"{counted.meaning} ({moved[counted.name]})"
        for counted in REPORTERS
        if counted.name not in EXPECTED_REPORTS and moved.get(counted.name)
    }
    trace = "\n".join(report.trace for report in machine.console.transcript.reports()[reports:])
    if found:
        reason = f"the debug kernel reports: {', '.join(found.values())}"
        conclusive = not found.keys().isdisjoint(CONCLUSIVE_REPORTS)
        raise ExperimentFailed(
            Failure("fail", reason, trace or leaving.text[-2000:], conclusive=conclusive)
        )
    if left > FEW_SOCKETS:
        reason = f"{left} sockets are still there, though the server that had them is gone"
        raise ExperimentFailed(Failure("fail", reason, conclusive=True))
    if leaving.status == 2:
        reason = "the module is unloaded, and a slab cache of its is still there"
        raise ExperimentFailed(Failure("fail", reason, conclusive=True))
    if leaving.status:
        raise ExperimentFailed(
            Failure("fail", f"the module cannot be unloaded: {leaving.text.strip()[-300:]}")
        )


def _describe_errors(phase: PhaseResult) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in phase.errors.items() if count)
    text = f"of {phase.asked} transactions {phase.transactions} were completed; errors: {kinds}"
    if phase.details:
        text += f". First: {_describe(phase.details[0])}"
    return text


def _describe(error: ByteError) -> str:
    where = f"connection {error.connection}, transaction {error.transaction}, byte {error.offset}"
    if error.expected is not None and error.got is not None:
        return f"{where}: expected 0x{error.expected:02x}, got 0x{error.got:02x}"
    return f"{where}: {error.kind} {error.errno}".rstrip()


@dataclass
class Compared:
    """The measurements of several stations, taken in turn: index r is the r-th round of each."""

    costs: dict[str, list[Costs]]
    failures: dict[str, Failure]

    def samples(self, metric: str) -> tuple[list[float], list[float], list[float]]:
        """Return this cost per transaction, round by round: starter's, solution's, submission's."""
        starter, solution, submission = (
            [costs.metric(metric) for costs in self.costs[name]]
            for name in ("starter", "solution", "submission")
        )
        return starter, solution, submission

    def means(self) -> dict[str, dict[str, float]]:
        """Return all that was counted per transaction, the mean of the rounds of each station."""
        return {name: mean_costs(costs) for name, costs in self.costs.items()}


def mean_costs(costs: Sequence[Costs]) -> dict[str, float]:
    """Return user, kernel (without the clock) and clock instructions, and calls, by name."""
    flat = [
        {
            "user": each.user_instructions,
            "kernel": each.kernel_instructions - each.clock_instructions,
            "clock": each.clock_instructions,
            **each.calls,
        }
        for each in costs
    ]
    return {name: statistics.fmean(row[name] for row in flat) for name in flat[0]}


class Comparison:
    """Measures several stations in turn, under the same load and on the same host just then."""

    def __init__(
        self, stations: Mapping[str, Station], server: str, shape: LoadShape, seed: int
    ) -> None:
        self._stations = stations
        self._server = server
        self._shape = shape
        self._seed = seed
        self._compared = Compared({name: [] for name in stations}, {})

    def measure_remote(self, rounds: int) -> Compared:
        """Add so many rounds of `Session.remote`, and return all."""
        for _ in range(rounds):
            for name, station in self._stations.items():
                if name in self._compared.failures:
                    continue
                session = Session(station, self._server, self._shape, self._seed)
                with self._recording(name), session:
                    self._compared.costs[name].append(session.remote(REMOTE_CONNECTIONS))
        return self._compared

    def measure(self, rounds: int) -> Compared:
        """Add so many rounds and return all. A station that fails is left out from then on."""
        unit = self._shape.connections * max(1, self._shape.transactions_per_connection)
        # About a second's work, in whole rounds of all connections.
        short = max(1, SHORT_WINDOW // unit) * unit
        with ExitStack() as stack:
            sessions: dict[str, Session] = {}
            for name, station in self._stations.items():
                with self._recording(name):
                    session = Session(station, self._server, self._shape, self._seed)
                    stack.callback(self._end, name, session)
                    sessions[name] = session.__enter__()
            for _ in range(rounds):
                for name, session in sessions.items():
                    if name not in self._compared.failures:
                        with self._recording(name):
                            costs = session.costs(short, 2 * short)
                            self._compared.costs[name].append(costs)
        return self._compared

    def _end(self, name: str, session: Session) -> None:
        with self._recording(name):
            session.__exit__(None, None, None)

    @contextmanager
    def _recording(self, name: str) -> Iterator[None]:
        try:
            yield
        except ExperimentFailed as error:
            self._compared.failures.setdefault(name, error.failure)
