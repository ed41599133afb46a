"""The load generator against a real echo server on loopback, honest and faulty."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from grader.load import (
    ByteError,
    Load,
    LoadError,
    LoadSpec,
    PhaseResult,
    Stalled,
    Stopped,
    build_loadgen,
    parse_phase,
    parse_result,
    payload,
    summarize,
)

SERVER = Path(__file__).with_name("echo_server.py")
SEED = 0x0123456789ABCDEF
Serve = Callable[..., int]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Start another echo server, its options given; return its port."""
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def start(*options: str) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            print(*options, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield start
        process.kill()


@pytest.fixture(scope="module")
def honest(serve: Serve) -> int:
    """The port of an echo server without faults, one for all tests."""
    return serve()


def spawn(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def spec(port: int, **options: Any) -> LoadSpec:
    defaults: dict[str, Any] = {"seed": SEED, "quiet_ms": 5, "stall_seconds": 20.0}
    return LoadSpec("127.0.0.1", port, **(defaults | options))


def one_fault(port: int, transactions: int = 40, **options: Any) -> tuple[PhaseResult, int]:
    """One connection, no warm-up, one window: the window, and all errors of the run."""
    options = {"size": 64, "transactions_per_connection": 0, "warm_up": 0} | options
    with Load(spec(port, **options), spawn) as load:
        load.start()
        phase = load.go(transactions)
        return phase, load.finish().error_count


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(build_loadgen()), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


# ---- An honest server ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "close", "size", "per_connection"),
    list(itertools.product(["closed", "rounds"], ["rst", "fin"], [1, 64, 65536], [1, 10, 0])),
)
def test_windows_are_exact(
    honest: int, mode: Any, close: Any, size: int, per_connection: int
) -> None:
    connections = 7
    wanted = spec(
        honest,
        connections=connections,
        transactions_per_connection=per_connection,
        size=size,
        mode=mode,
        close=close,
    )
    with Load(wanted, spawn) as load:
        load.start()
        phases = [load.go(n) for n in (40, 80)]
        result = load.finish()
    assert result.outcome == "complete"
    assert result.config.seed == SEED
    assert result.phases[1:-1] == tuple(phases)
    for phase, n in zip(phases, (40, 80), strict=True):
        assert phase.complete
        assert (phase.asked, phase.transactions, phase.failed) == (n, n, 0)
        assert phase.bytes_sent == phase.bytes_received == n * size
        assert phase.error_count == 0
        opened = n // per_connection if per_connection else 0
        assert phase.connections_opened == phase.connections_closed == opened
        assert phase.latency is not None
        assert phase.latency.count == n
        if per_connection:
            assert phase.connect_latency is not None
            assert phase.connect_latency.count == opened
            assert phase.max_established <= connections
        else:
            assert phase.max_established == connections
        if mode == "rounds":
            batch = min(connections, opened) if per_connection else connections
            groups = -(-opened // batch) if per_connection else 0
            assert phase.rounds == (groups * per_connection if per_connection else -(-n // batch))
    warm_up = result.phases[0]
    assert warm_up.transactions == connections * (per_connection or 1)
    assert warm_up.latency is None
    assert sum(p.connections_opened for p in result.phases) == sum(
        p.connections_closed for p in result.phases
    )


def test_first_transactions_are_spread_over_all_connections(honest: int) -> None:
    """A window of C transactions gives each of C connections one, however fast some are."""
    wanted = spec(honest, connections=50, transactions_per_connection=0, burst=8)
    with Load(wanted, spawn) as load:
        load.start()
        assert load.go(50).transactions == 50
        assert load.finish().phases[0].transactions == 50


def test_many_connections(honest: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2100:
        pytest.skip(f"the server needs 2100 descriptors, the limit is {soft}")
    with Load(spec(honest, connections=2000, transactions_per_connection=0), spawn) as load:
        load.start()
        phase = load.go(4000)
        result = load.finish()
    assert (phase.transactions, phase.error_count) == (4000, 0)
    assert result.max_established == 2000


def test_pause_ramp_and_sources(honest: int) -> None:
    wanted = spec(
        honest,
        connections=4,
        transactions_per_connection=2,
        pause_us=300,
        ramp=2000,
        sources=("127.0.0.1", "127.0.0.2"),
    )
    with Load(wanted, spawn) as load:
        load.start()
        phase = load.go(40)
        result = load.finish()
    assert (phase.transactions, phase.error_count) == (40, 0)
    assert result.config.sources == ("127.0.0.1", "127.0.0.2")
    # Ten groups of a connection with one pause each on four at a time: at least 2 pauses long.
    assert phase.wall_ns > 2 * 300_000


def test_each_connection_keeps_its_port(honest: int) -> None:
    sources = ("127.0.0.1:21001", "127.0.0.1:21002", "127.0.0.1:21003")
    wanted = spec(honest, connections=3, transactions_per_connection=1, sources=sources)
    with Load(wanted, spawn) as load:
        load.start()
        phase = load.go(60)
        result = load.finish()
    assert (phase.transactions, phase.error_count) == (60, 0)
    assert result.config.sources == sources


def test_network_counters(honest: int) -> None:
    with Load(spec(honest, connections=2), spawn) as load:
        load.start()
        phase = load.go(20)
        load.finish()
    assert phase.counters["ActiveOpens"] >= 20
    assert phase.interfaces["lo"]["tx_packets"] >= 20 * 5
    assert phase.packets_dropped >= 0
    assert phase.cpu_user_us + phase.cpu_system_us > 0


# ---- Faulty servers --------------------------------------------------------------------------


def test_flipped_bytes_are_named_exactly(serve: Serve) -> None:
    """Byte 1000 k - 1 of the stream is in transaction (1000 k - 1) / 64."""
    phase, total = one_fault(serve("--fault", "flip-every", "--at", "1000"))
    assert phase.complete
    assert phase.transactions == 40
    assert total == phase.errors["wrong"] == phase.wrong_bytes == 2
    for error, place in zip(phase.details, (999, 1999), strict=True):
        transaction, offset = divmod(place, 64)
        expected = payload(SEED, 0, transaction, 64)[offset]
        assert error == ByteError(
            "wrong", 0, transaction, offset, expected, expected ^ 0xFF, 1, "", ""
        )


def test_flipped_byte_of_a_big_message_on_one_of_many_connections(serve: Serve) -> None:
    """Connections are opened one at a time here, so that both ends number them alike."""
    port = serve("--fault", "flip", "--at", str(65536 + 40001), "--connections", "3")
    phase, _ = one_fault(
        port, 30, size=65536, connections=5, burst=1, transactions_per_connection=3
    )
    expected = payload(SEED, 3, 1, 65536)[40001]
    [error] = phase.details
    assert error == ByteError("wrong", 3, 1, 40001, expected, expected ^ 0xFF, 1, "", "")
    assert (phase.transactions, phase.failed) == (30, 0)


def test_wrong_bytes_of_one_transaction_are_one_error(serve: Serve) -> None:
    phase, _ = one_fault(serve("--fault", "flip-every", "--at", "1"), 3)
    assert (phase.errors["wrong"], phase.wrong_bytes) == (3, 192)
    assert [(e.transaction, e.offset, e.count) for e in phase.details] == [
        (0, 0, 64),
        (1, 0, 64),
        (2, 0, 64),
    ]


def test_a_dropped_byte_ends_in_a_stall_that_names_it(serve: Serve) -> None:
    port = serve("--fault", "drop", "--at", "130")
    with Load(
        spec(port, warm_up=0, transactions_per_connection=0, stall_seconds=0.3), spawn
    ) as load:
        load.start()
        with pytest.raises(Stalled) as caught:
            load.go(10)
    result = caught.value.result
    [stuck] = result.stuck
    assert (stuck.connection, stuck.transaction, stuck.state) == (0, 2, "waiting")
    assert (stuck.sent, stuck.received) == (64, 63)
    [error] = result.phases[-1].details
    assert (error.kind, error.transaction) == ("wrong", 2)
    assert error.offset >= 2  # a byte may equal its neighbour
    assert not result.phases[-1].complete
    assert "transaction 2 (64 bytes sent, 63 received)" in str(caught.value)


def test_an_extra_byte(serve: Serve) -> None:
    """It shifts the rest of its reply, and one byte is too many in the end."""
    phase, _ = one_fault(serve("--fault", "extra", "--at", "128", "--connections", "0"), 10)
    assert phase.complete
    assert (phase.transactions, phase.failed) == (10, 0)
    assert phase.errors == {"wrong": 1, "missing": 0, "extra": 1, "early": 0, "connection": 0}
    wrong, extra = phase.details
    first = payload(SEED, 0, 2, 64)
    assert (wrong.transaction, wrong.offset, wrong.expected, wrong.got) == (
        2,
        0,
        first[0],
        ord("!"),
    )
    assert extra == ByteError("extra", 0, 2, 64, None, first[63], 1, "", "")
    assert phase.connections_opened == 1  # the one that replaced it


def test_an_extra_byte_behind_the_fin(serve: Serve) -> None:
    phase, _ = one_fault(serve("--fault", "late"), 4, close="fin", transactions_per_connection=2)
    assert (phase.transactions, phase.errors["extra"]) == (4, 2)
    assert phase.details[0] == ByteError("extra", 0, 1, 64, None, ord("!"), 1, "", "")


@pytest.mark.parametrize("mode", ["closed", "rounds"])
def test_a_byte_before_any_request(serve: Serve, mode: str) -> None:
    port = serve("--fault", "greet", "--connections", "0")
    with Load(
        spec(port, transactions_per_connection=0, warm_up=0, connections=2, mode=mode), spawn
    ) as load:
        load.start()
        phase = load.go(20)
        result = load.finish()
    assert phase.transactions + phase.failed == 20
    errors = [error for p in result.phases for error in p.details]
    assert [error.kind for error in errors] in (["early"], ["wrong", "extra"])
    assert (errors[0].transaction, errors[0].offset, errors[0].got) == (0, 0, ord("!"))


def test_closed_early(serve: Serve) -> None:
    port = serve("--fault", "close", "--at", "100", "--connections", "0")
    phase, _ = one_fault(port, 20, transactions_per_connection=10)
    assert phase.complete
    assert (phase.transactions, phase.failed) == (11, 9)
    assert phase.details == (ByteError("missing", 0, 1, 36, None, None, 1, "", ""),)


def test_closed_early_is_replaced_when_unlimited(serve: Serve) -> None:
    phase, _ = one_fault(serve("--fault", "close", "--at", "100", "--connections", "0"), 20)
    assert (phase.transactions, phase.failed, phase.connections_opened) == (19, 1, 1)


def test_reset(serve: Serve) -> None:
    port = serve("--fault", "reset", "--at", "100", "--connections", "0")
    phase, _ = one_fault(port, 20, transactions_per_connection=10)
    assert (phase.transactions, phase.failed) == (11, 9)
    [errors] = phase.connection_errors
    assert (errors.stage, errors.errno, errors.count) == ("transfer", "ECONNRESET", 1)
    assert phase.details[0].kind == "connection"
    assert phase.details[0].transaction == 1


def test_stalled_server(serve: Serve) -> None:
    port = serve("--fault", "stall", "--at", "70", "--connections", "1")
    wanted = spec(
        port, connections=3, burst=1, transactions_per_connection=5, warm_up=0, stall_seconds=0.3
    )
    with Load(wanted, spawn) as load:
        load.start()
        with pytest.raises(Stalled) as caught:
            load.go(50)
    result = caught.value.result
    assert result.outcome == "stalled"
    assert [(s.connection, s.transaction, s.received) for s in result.stuck] == [(1, 1, 6)]
    assert result.phases[-1].transactions == 46


def test_unanswered_fin_is_a_stall(serve: Serve) -> None:
    with (
        Load(
            spec(serve("--fault", "linger"), close="fin", warm_up=0, stall_seconds=0.3), spawn
        ) as load,
    ):
        load.start()
        with pytest.raises(Stalled) as caught:
            load.go(1)
    assert [s.state for s in caught.value.result.stuck] == ["closing"]


@pytest.mark.parametrize("per_connection", [0, 3])
def test_replies_in_single_bytes(serve: Serve, per_connection: int) -> None:
    phase, total = one_fault(
        serve("--fault", "pieces"), 30, size=301, transactions_per_connection=per_connection
    )
    assert (phase.transactions, total) == (30, 0)


def test_refused_connections_stop_the_run() -> None:
    """Nothing listens on the port."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Load(
            spec(unused.getsockname()[1], transactions_per_connection=0, stop_on_error=5), spawn
        ) as load:
            with pytest.raises(Stopped) as caught:
                load.start()
            with pytest.raises(Stopped):
                load.go(10)
    warm_up = caught.value.result.phases[0]
    assert caught.value.result.outcome == "errors"
    [errors] = warm_up.connection_errors
    assert (errors.stage, errors.errno) == ("connect", "ECONNREFUSED")


def test_too_many_errors_end_the_window(serve: Serve) -> None:
    options: dict[str, Any] = {"warm_up": 0, "transactions_per_connection": 0}
    with Load(
        spec(serve("--fault", "flip-every", "--at", "64"), stop_on_error=7, **options), spawn
    ) as load:
        load.start()
        phase = load.go(100)
        assert not phase.complete
        assert phase.errors["wrong"] == 7
        assert load.finish().outcome == "errors"
        with pytest.raises(Stopped):
            load.go(100)


# ---- The controller --------------------------------------------------------------------------


def test_watch_ends_the_wait_and_close_reaps(serve: Serve) -> None:
    class Panicked(Exception):
        pass

    calls = 0
    children: list[subprocess.Popen[bytes]] = []

    def watch() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise Panicked

    def keep(command: list[str]) -> subprocess.Popen[bytes]:
        children.append(spawn(command))
        return children[0]

    with pytest.raises(Panicked), Load(spec(serve("--fault", "stall")), keep, watch) as load:
        load.start()
    assert children[0].returncode is not None


def test_loadgen_does_not_outlive_its_controller(honest: int) -> None:
    done = run("--address=127.0.0.1", f"--port={honest}", "--control", stdin="go 10\n")
    assert done.returncode == 5
    assert "stdin ended" in done.stderr
    assert parse_result(done.stdout.splitlines()[-1].removeprefix("result ")).outcome == (
        "interrupted"
    )


def test_commands_may_be_sent_ahead(honest: int) -> None:
    done = run("--address=127.0.0.1", f"--port={honest}", "--control", stdin="go 3\ngo 6\nfinish\n")
    assert done.returncode == 0
    ready, one, two, result = done.stdout.splitlines()
    assert ready == "ready"
    assert parse_phase(one.removeprefix("done ")).transactions == 3
    assert parse_phase(two.removeprefix("done ")).transactions == 6
    assert len(parse_result(result.removeprefix("result ")).phases) == 4


@pytest.mark.parametrize("mode", ["closed", "rounds"])
@pytest.mark.parametrize("per_connection", [0, 4])
def test_windows_by_time(honest: int, mode: str, per_connection: int) -> None:
    done = run(
        "--address=127.0.0.1",
        f"--port={honest}",
        "--seconds=0.1",
        "--connections=3",
        f"--mode={mode}",
        f"--transactions-per-connection={per_connection}",
    )
    assert done.returncode == 0
    phase = parse_result(done.stdout).phases[1]
    assert phase.transactions > 0
    assert phase.asked == phase.transactions
    assert phase.wall_ns >= 90_000_000
    if per_connection:
        assert phase.transactions == per_connection * phase.connections_opened


def test_results_convert_to_plain_data(honest: int) -> None:
    phase, _ = one_fault(honest, 5)
    assert json.loads(json.dumps(dataclasses.asdict(phase)))["transactions"] == 5


def test_strict_parsing(honest: int) -> None:
    done = run("--address=127.0.0.1", f"--port={honest}", "--transactions=1")
    good = json.loads(done.stdout)
    parse_result(json.dumps(good))
    damages: tuple[dict[str, object], ...] = (
        {"version": 2},
        {"outcome": 1},
        {"phases": [{}]},
        {"surprise": 0},
        {"max_established": True},
    )
    for damage in damages:
        with pytest.raises(LoadError):
            parse_result(json.dumps(good | damage))
    with pytest.raises(LoadError, match="no JSON"):
        parse_result("{")


# ---- The command line ------------------------------------------------------------------------


def test_help() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in LoadSpec("127.0.0.1", 1, warm_up=1, seed=1, sources=("127.0.0.1",)).arguments():
        assert f"  {name.partition('=')[0]} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port=1", "--transactions=1"], "--address is missing"),
        (["--address=127.0.0.1", "--transactions=1"], "--port is missing"),
        (["--address=localhost"], "not an IPv4 address"),
        (["--port=65536"], "from 1 to 65535"),
        (["--size=0"], "from 1 to 65536"),
        (["--size=65537"], "from 1 to 65536"),
        (["--size=12x"], "from 1 to 65536"),
        (["--size=-1"], "from 1 to 65536"),
        (["--connections=0"], "from 1 to"),
        (["--stall=0"], "seconds above 0"),
        (["--seconds=nan"], "seconds above 0"),
        (["--mode=open"], "neither `closed' nor `rounds'"),
        (["--close=now"], "neither `rst' nor `fin'"),
        (["--source=127.0.0.1,"], "not an IPv4 address"),
        (["--source=127.0.0.1:0"], "source"),
        (["--source=127.0.0.1:5,127.0.0.1"], "all of them a port, or none"),
        (
            [
                *("--address=127.0.0.1", "--port=1", "--transactions=2"),
                *("--source=127.0.0.1:5", "--connections=2"),
            ],
            "cannot share 1 ports",
        ),
        (["--surprise"], "unrecognized option"),
        (["--seed"], "requires an argument"),
        (["surprise"], "unexpected argument"),
        (["--address=127.0.0.1", "--port=1"], "say how much to measure"),
        (
            [
                "--address=127.0.0.1",
                "--port=1",
                "--transactions-per-connection=3",
                "--transactions=4",
            ],
            "not a whole number of connections",
        ),
        (
            ["--address=127.0.0.1", "--port=1", "--transactions=1", "--seconds=1"],
            "exclude each other",
        ),
        (
            ["--address=127.0.0.1", "--port=1", "--control", "--mode=rounds", "--pause=1"],
            "--pause is for --mode closed",
        ),
    ],
)
def test_bad_options(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["gone", "go x", "go 0", "go 5", "go"])
def test_bad_commands(honest: int, command: str) -> None:
    done = run(
        "--address=127.0.0.1",
        f"--port={honest}",
        "--control",
        "--transactions-per-connection=2",
        stdin=f"{command}\nfinish\n",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("loadgen: ")


def test_unwritable_latency_file(honest: int, tmp_path: Path) -> None:
    done = run(
        "--address=127.0.0.1",
        f"--port={honest}",
        "--transactions=1",
        f"--latency-file={tmp_path}/absent/file",
    )
    assert done.returncode == 5
    assert "cannot write" in done.stderr


def test_too_few_descriptors() -> None:
    """Root may raise its own limit, so it gives that right up first."""
    drop = ["setpriv", "--bounding-set=-sys_resource"] if os.geteuid() == 0 else []
    if drop and shutil.which(drop[0]) is None:
        pytest.skip("needs setpriv when run by root")
    limited = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *drop, str(build_loadgen())]
    done = subprocess.run(
        [*limited, "--address=127.0.0.1", "--port=1", "--connections=100", "--transactions=1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 5
    assert "at most 64 are allowed" in done.stderr


def test_a_bad_spec_is_an_error_with_loadgens_own_words() -> None:
    with Load(LoadSpec("127.0.0.1", 1, size=0), spawn) as load, pytest.raises(LoadError) as caught:
        load.start()
    assert "--size: `0' is not a whole number from 1 to 65536" in str(caught.value)


def test_go_refuses_parts_of_connections(honest: int) -> None:
    with Load(spec(honest, transactions_per_connection=10), spawn) as load:
        load.start()
        with pytest.raises(ValueError, match="whole number of connections"):
            load.go(15)
        assert load.go(20).transactions == 20


# ---- Latencies and payload -------------------------------------------------------------------


def test_summarize_agrees_with_hdr_recording_each_value() -> None:
    random = np.random.default_rng(1)
    samples = np.exp(random.normal(12, 2, 5000)).astype(np.uint64)
    summary = summarize(samples)
    assert summary is not None
    exact = HdrHistogram(1, 3_600_000_000_000, 3)
    for sample in samples.tolist():
        exact.record_value(sample)
    assert summary.p50 == exact.get_value_at_percentile(50) / 1000
    assert summary.p99_9 == exact.get_value_at_percentile(99.9) / 1000
    assert (summary.count, summary.max) == (5000, int(samples.max()) / 1000)
    decoded = HdrHistogram.decode(summary.histogram)
    assert decoded.get_total_count() == 5000
    assert base64.b64decode(summary.histogram)
    assert summarize(np.empty(0, dtype=np.uint64)) is None


def test_payload_does_not_repeat() -> None:
    first = payload(SEED, 0, 0, 64)
    assert payload(SEED, 0, 0, 13) == first[:13]
    others = [payload(SEED + 1, 0, 0, 64), payload(SEED, 1, 0, 64), payload(SEED, 0, 1, 64)]
    assert len({first, *others}) == 4
