"""The load: drives a TCP echo server with `loadgen.c` and says what came back.

`Load` runs one load generator, from the opening of its connections to their end, with any
number of measured windows between, each bounded by points at which the system has drained::

    with Load(spec, spawn, watch) as load:
        load.start()                # connections are open, the warm-up is done
        one = load.go(10_000)       # a window of exactly 10,000 transactions
        two = load.go(20_000)
        result = load.finish()

Wrong bytes and failed connections are data (`PhaseResult.errors`, `PhaseResult.details`); only
what leaves a window without an end is an exception (`LoadError` and its subclasses).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import struct
import subprocess
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from grader import cache

SOURCE = Path(__file__).with_name("loadgen.c")
COMPILER = "gcc"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")
FORMAT_VERSION = 1
EXIT_STATUS = {"complete": 0, "errors": 3, "stalled": 4, "interrupted": 5}
EXIT_ERRORS = 3  # of a complete run that saw errors
WATCH_SECONDS = 0.05
END_SECONDS = 5.0  # from the last line to the end of the process

LONGEST_LATENCY_NS = 3_600_000_000_000
LATENCY_DIGITS = 3  # significant, in the histogram
_EXACT_BITS = 11  # HDR keeps values below 2 ** 11 apart at three digits

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class LoadError(Exception):
    """The load generator could not be built or started, or ended without a result."""


@dataclass(frozen=True)
class LoadSpec:
    """What to do to the server; the options of ``loadgen --help``, which explains them.

    `transactions_per_connection` 0 means unlimited, `seed` None a random one (the result tells
    which), `warm_up` None as many transactions as `connections` connections do. `sources` are
    this end's addresses, or ``address:port`` for each connection.
    """

    address: str
    port: int
    connections: int = 1
    transactions_per_connection: int = 1
    size: int = 64
    mode: Literal["closed", "rounds"] = "closed"
    close: Literal["rst", "fin"] = "rst"
    warm_up: int | None = None
    seed: int | None = None
    burst: int = 128
    ramp: int = 0
    pause_us: int = 0
    quiet_ms: int = 50
    stall_seconds: float = 30.0
    stop_on_error: int = 100
    sources: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return these options as command-line arguments of loadgen."""
        options: dict[str, object] = {
            "address": self.address,
            "port": self.port,
            "connections": self.connections,
            "transactions-per-connection": self.transactions_per_connection,
            "size": self.size,
            "mode": self.mode,
            "close": self.close,
            "warm-up": self.warm_up,
            "seed": self.seed,
            "burst": self.burst,
            "ramp": self.ramp,
            "pause": self.pause_us,
            "quiet": self.quiet_ms,
            "stall": self.stall_seconds,
            "stop-on-error": self.stop_on_error,
            "source": ",".join(self.sources) or None,
        }
        return [f"--{name}={value}" for name, value in options.items() if value is not None]


@dataclass(frozen=True)
class Latency:
    """A distribution of latencies in microseconds; `histogram` is HDR, base64, nanoseconds."""

    count: int
    min: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float
    histogram: str


@dataclass(frozen=True)
class ByteError:
    """One error and where it is: connections, transactions and offsets count from 0.

    `kind` is one of ``wrong`` (`expected` and `got` are the first wrong byte's values, `count`
    the number of wrong bytes in this transaction), ``missing``, ``extra`` (`count` bytes behind
    the reply), ``early`` (`count` bytes before their request) and ``connection`` (`stage` is
    ``connect``, ``transfer`` or ``close``, `errno` its name); `expected` and `got` are None and
    `stage` and `errno` empty where they do not apply.
    """

    kind: str
    connection: int
    transaction: int
    offset: int
    expected: int | None
    got: int | None
    count: int
    stage: str
    errno: str


@dataclass(frozen=True)
class ConnectionErrors:
    """How many connections failed with this errno at this stage."""

    stage: str
    errno: str
    count: int


@dataclass(frozen=True)
class Stuck:
    """A connection on which nothing moved any more: bytes sent and received of `transaction`."""

    connection: int
    transaction: int
    state: str
    sent: int
    received: int
    idle_ms: int


@dataclass(frozen=True)
class PhaseResult:
    """One phase; `transactions` + `failed` = `asked` when it is `complete`.

    Times are `wall_ns` from the first action to the last completion or closing (without the
    quiet time) and `cpu_user_us`/`cpu_system_us` of the load generator. `counters` are the
    differences of the network namespace's TCP counters, `interfaces` those of its interfaces.
    `retransmissions` are those of this end's own connections. `errors` has a count for each
    kind of `ByteError`; `details` are the first ten.
    """

    complete: bool
    asked: int
    transactions: int
    failed: int
    connections_opened: int
    connections_closed: int
    max_established: int
    rounds: int
    bytes_sent: int
    bytes_received: int
    partial_reads: int
    retransmissions: int
    wall_ns: int
    cpu_user_us: int
    cpu_system_us: int
    latency_first: int
    latency_count: int
    connect_latency_first: int
    connect_latency_count: int
    errors: Mapping[str, int]
    wrong_bytes: int
    connection_errors: tuple[ConnectionErrors, ...]
    details: tuple[ByteError, ...]
    counters: Mapping[str, int]
    interfaces: Mapping[str, Mapping[str, int]]
    latency: Latency | None = None
    connect_latency: Latency | None = None

    @property
    def error_count(self) -> int:
        """Errors of all kinds."""
        return sum(self.errors.values())

    @property
    def seen(self) -> Mapping[str, tuple[float, ...]]:
        """What a result keeps, by name; a latency is in seconds of wall time."""
        seen: dict[str, tuple[float, ...]] = {
            "transactions": (float(self.transactions),),
            "errors": (float(self.error_count),),
        }
        if self.latency is not None:
            seen["latency_p50_s"] = (self.latency.p50 / 1e6,)
            seen["latency_p99_s"] = (self.latency.p99 / 1e6,)
        return seen

    @property
    def packets_dropped(self) -> int:
        """Packets that the namespace's interfaces dropped, in both directions."""
        return sum(i["rx_dropped"] + i["tx_dropped"] for i in self.interfaces.values())


@dataclass(frozen=True)
class Config:
    """The configuration that was in force, defaults and the seed included."""

    address: str
    port: int
    connections: int
    ramp: int
    burst: int
    transactions_per_connection: int
    size: int
    warm_up: int
    mode: str
    close: str
    seed: int
    stall_seconds: float
    pause_us: int
    quiet_ms: int
    stop_on_error: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class LoadResult:
    """A whole run.

    `outcome` is ``complete``, ``errors`` (given up after so many), ``stalled`` or
    ``interrupted``. `phases` are the warm-up, the measured ones, and, of a complete run, the
    closing of what was still open.
    """

    version: int
    outcome: str
    config: Config
    max_established: int
    stuck: tuple[Stuck, ...]
    stuck_connections: int
    phases: tuple[PhaseResult, ...]

    @property
    def error_count(self) -> int:
        """Errors of all kinds in all phases."""
        return sum(phase.error_count for phase in self.phases)


class Stalled(LoadError):
    """Nothing moved for the spec's `stall_seconds`; `result` says where each one stands."""

    def __init__(self, result: LoadResult) -> None:
        self.result = result
        where = "; ".join(
            f"connection {s.connection} is {s.state} in transaction {s.transaction}"
            f" ({s.sent} bytes sent, {s.received} received)"
            for s in result.stuck[:3]
        )
        super().__init__(
            f"no byte moved for {result.config.stall_seconds:g} s,"
            f" {result.stuck_connections} connections are stuck: {where or 'none is open'}"
        )


class Stopped(LoadError):
    """The load generator gave up after too many errors, or was interrupted; see `result`."""

    def __init__(self, result: LoadResult) -> None:
        self.result = result
        first = next((d for phase in result.phases for d in phase.details), None)
        super().__init__(
            f"the load ended early ({result.outcome}) after {result.error_count} errors;"
            f" the first: {first}"
        )


def build_loadgen(static: bool = False) -> Path:
    """Return the compiled load generator, from the cache if it is there.

    `static`: for the guest, which has no libraries. Raises `LoadError` with the compiler's output
    if it cannot be compiled.
    """

    flags = (*FLAGS, "-static") if static else FLAGS

    def make(folder: Path) -> None:
        command = [COMPILER, *flags, "-o", str(folder / "loadgen"), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise LoadError(f"{COMPILER} is not installed: install it to build loadgen") from error
        if done.returncode != 0:
            raise LoadError(f"cannot compile {SOURCE.name}:\n{done.stderr}")

    key = cache.digest(SOURCE, COMPILER, *flags)
    return cache.entry("loadgen", key, make) / "loadgen"


def payload(seed: int, connection: int, transaction: int, size: int) -> bytes:
    """Return the message that loadgen sent there, to look into a failure."""
    a = _mix(seed + _GOLDEN)
    k = _mix(_mix(a + _GOLDEN * (connection + 1)) + _GOLDEN * (transaction + 1))
    last = _mix(k ^ a)
    words = [_mix(k + _GOLDEN * (i + 1)) ^ last for i in range((size + 7) // 8)]
    return struct.pack(f"<{len(words)}Q", *words)[:size]


def _mix(value: int) -> int:
    z = value & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def summarize(nanoseconds: npt.NDArray[np.uint64]) -> Latency | None:
    """Return the distribution of these samples, None if there are none."""
    if nanoseconds.size == 0:
        return None
    clipped = np.clip(nanoseconds, 1, LONGEST_LATENCY_NS).astype(np.int64)
    # HDR's own buckets, so that each is recorded once with its count: a value of b bits above
    # _EXACT_BITS loses as many low bits as it has too many.
    bits = np.frexp(clipped.astype(np.float64))[1]
    shift = np.maximum(bits - _EXACT_BITS, 0).astype(np.int64)
    values, counts = np.unique((clipped >> shift) << shift, return_counts=True)
    histogram = HdrHistogram(1, LONGEST_LATENCY_NS, LATENCY_DIGITS)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)

    longest = float(clipped.max()) / 1000

    def percentile(percent: float) -> float:
        # A bucket answers with its upper end, beyond which nothing may have been.
        return min(longest, float(histogram.get_value_at_percentile(percent)) / 1000)

    encoded = histogram.encode()
    return Latency(
        count=int(nanoseconds.size),
        min=float(clipped.min()) / 1000,
        p50=percentile(50),
        p90=percentile(90),
        p99=percentile(99),
        p99_9=percentile(99.9),
        max=longest,
        histogram=encoded.decode("ascii") if isinstance(encoded, bytes) else str(encoded),
    )


def parse_phase(text: str | bytes) -> PhaseResult:
    """Return the phase of a ``done`` line's JSON; raise `LoadError` unless all is as expected."""
    return typing.cast(PhaseResult, _convert(_json(text), PhaseResult, "phase"))


def parse_result(text: str | bytes) -> LoadResult:
    """Return the run of a ``result`` line's JSON; raise `LoadError` unless all is as expected."""
    document = _json(text)
    version = document.get("version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise LoadError(f"loadgen's result has version {version}, not {FORMAT_VERSION}")
    return typing.cast(LoadResult, _convert(document, LoadResult, "result"))


def _json(text: str | bytes) -> object:
    try:
        return typing.cast(object, json.loads(text))
    except ValueError as error:
        raise LoadError(f"loadgen printed no JSON but {text[:200]!r}") from error


def _convert(value: object, wanted: Any, where: str) -> Any:
    """Return `value`, of JSON's types, as `wanted`, which may be a dataclass."""
    origin, parameters = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:  # only `something | None` occurs
        [wanted] = [p for p in parameters if p is not types.NoneType]
        return None if value is None else _convert(value, wanted, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(v, parameters[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {n: _convert(v, parameters[1], f"{where}.{n}") for n, v in value.items()}
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return _fill(value, wanted, where)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise LoadError(f"{where}: {value!r} is not of type {wanted}")
    return value


def _fill(value: dict[str, object], wanted: Any, where: str) -> Any:
    hints = typing.get_type_hints(wanted)
    # Fields with a default are not part of the format; `Load` fills them in.
    names = {f.name for f in dataclasses.fields(wanted) if f.default is dataclasses.MISSING}
    if names != value.keys():
        raise LoadError(f"{where}: unexpected or missing fields {names ^ value.keys()}")
    return wanted(**{n: _convert(value[n], hints[n], f"{where}.{n}") for n in names})


class Load:
    """One run of the load generator, in the order `start`, `go` any number of times, `finish`.

    `spawn` starts a command where the server can be reached, with pipes as its standard input,
    output and error; `watch` is called every 50 ms or so of waiting and may raise, for instance
    because the guest has panicked. Whatever is raised, `close` (or leaving the ``with`` block)
    ends and reaps the process and removes its files.
    """

    def __init__(
        self,
        spec: LoadSpec,
        spawn: Callable[[list[str]], subprocess.Popen[bytes]],
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self._spawn = spawn
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lines: list[bytes] = []
        self._partial = b""
        self._complaints = b""
        self._result: LoadResult | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Open the connections and do the warm-up; return when the system has drained.

        Raises `Stalled`, `Stopped` (too many errors) or another `LoadError`.
        """
        if self._process is not None:
            raise LoadError("this load has been started already")
        self._folder = tempfile.TemporaryDirectory(prefix="load-")
        command = [
            str(build_loadgen()),
            *self.spec.arguments(),
            "--control",
            f"--latency-file={self._samples('latency')}",
            f"--connect-latency-file={self._samples('connect')}",
        ]
        self._process = self._spawn(command)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is None:
                raise LoadError("spawn has to give the load generator three pipes")
            os.set_blocking(stream.fileno(), False)
        word, _, _ = self._line().partition(b" ")
        if word == b"result":
            assert self._result is not None
            raise Stopped(self._result)
        if word != b"ready":
            raise LoadError(f"loadgen said {word!r}, not `ready'")

    def go(self, transactions: int) -> PhaseResult:
        """Do exactly so many transactions; return when all are complete and drained.

        With a limited number of transactions per connection, `transactions` has to be a
        multiple of it. After too many errors the phase returned is not `complete`, and the next
        `go` raises `Stopped`. Raises `Stalled` and other `LoadError`.
        """
        per_connection = self.spec.transactions_per_connection
        if transactions < 1 or (per_connection and transactions % per_connection):
            raise ValueError(
                f"{transactions} transactions are not a whole number of connections"
                f" of {per_connection} each"
            )
        if self._result is not None:
            raise Stopped(self._result)
        self._command(f"go {transactions}")
        word, _, rest = self._line().partition(b" ")
        if word == b"done":
            return self._with_latency(parse_phase(rest))
        if word == b"result" and self._result is not None:
            return self._result.phases[-1]
        raise LoadError(f"loadgen said {word!r}, not `done'")

    def finish(self) -> LoadResult:
        """Close all connections, end the process, and return the whole run.

        If the run was given up after too many errors the result says so (`outcome`). Raises
        `Stalled` and other `LoadError`.
        """
        if self._result is None:
            self._command("finish")
            word, _, _ = self._line().partition(b" ")
            if self._result is None:
                raise LoadError(f"loadgen said {word!r}, not `result'")
        return self._result

    def close(self) -> None:
        """End and reap the process, whatever it is doing, and remove its files."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            process.wait()
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    def _samples(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / name

    def _command(self, text: str) -> None:
        if self._process is None or self._process.stdin is None:
            raise LoadError("this load is not running: call start() first")
        # If it has ended, the next line, or its absence, says why.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), text.encode() + b"\n")

    def _line(self) -> bytes:
        """Return loadgen's next line; a ``result`` is parsed and kept, and a stall raised."""
        while not self._lines:
            if not self._read():
                raise LoadError(self._end_message())
        line = self._lines.pop(0)
        if line.startswith(b"result "):
            result = parse_result(line.removeprefix(b"result "))
            phases = tuple(self._with_latency(phase) for phase in result.phases)
            self._result = dataclasses.replace(result, phases=phases)
            status = self._wait()
            wanted = EXIT_STATUS.get(result.outcome)
            if result.outcome == "complete" and result.error_count:
                wanted = EXIT_ERRORS
            if status != wanted:
                raise LoadError(f"loadgen ended with status {status} but {result.outcome!r}")
            if result.outcome == "stalled":
                raise Stalled(self._result)
            if result.outcome == "interrupted":
                raise Stopped(self._result)
        return line

    def _read(self) -> bool:
        """Take in what the process has to say, waiting for it; False when it has ended."""
        assert self._process is not None
        out, err = self._process.stdout, self._process.stderr
        assert out is not None
        assert err is not None
        streams = [out, err]
        while True:
            self._watch()
            ready, _, _ = select.select(streams, [], [], WATCH_SECONDS)
            if err in ready:
                chunk = os.read(err.fileno(), 1 << 16)
                self._complaints += chunk
                if not chunk:
                    streams.remove(err)
            if out in ready:
                chunk = os.read(out.fileno(), 1 << 16)
                *lines, self._partial = (self._partial + chunk).split(b"\n")
                self._lines += lines
                if lines or not chunk:
                    return bool(chunk)

    def _wait(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise LoadError("loadgen does not end after its last line") from error

    def _end_message(self) -> str:
        status = self._wait()
        assert self._process is not None
        if self._process.stderr is not None:
            self._complaints += self._process.stderr.read() or b""
        text = self._complaints.decode(errors="replace").strip()
        return f"loadgen ended with status {status}: {text or 'it said nothing'}"

    def _with_latency(self, phase: PhaseResult) -> PhaseResult:
        latency = self._read_samples("latency", phase.latency_first, phase.latency_count)
        connect = self._read_samples(
            "connect", phase.connect_latency_first, phase.connect_latency_count
        )
        return dataclasses.replace(
            phase, latency=summarize(latency), connect_latency=summarize(connect)
        )

    def _read_samples(self, name: str, first: int, count: int) -> npt.NDArray[np.uint64]:
        if count == 0:
            return np.empty(0, dtype=np.uint64)
        samples = np.fromfile(self._samples(name), dtype="<u8", offset=first * 8, count=count)
        if samples.size != count:
            raise LoadError(f"loadgen left {samples.size} of {count} latencies in its {name} file")
        return samples.astype(np.uint64)
