"""Golden costs: a function that has become dearer is named, and what is no change is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from grader import golden
from grader import variant as variants
from grader.golden import Cost, NoGolden, Road
from grader.lab import load_lab
from grader.progress import Progress
from grader.station import Built, build, build_solution

LAB = "3-lwsocket"
# Of its file, before which the line that adds work is put.
LINE = "\treturn sock_accept_bare(listener, sock, &arg);\n"
EXTRA = "\tWRITE_ONCE(arg.err, READ_ONCE(listener->type));\n"
ROAD = Road(
    "BPL",
    1,
    1000,
    {
        "megapipe/: mp_read": Cost(2000, 100_000),
        "net/ipv4/tcp.c: tcp_sendmsg": Cost(1000, 900_000),
        "kernel/sched/core.c: schedule": Cost(100, 40_000),
        "mm/slub.c: slab_free": Cost(11_000, 110_000),
        "user": Cost(0, 800_000),
    },
)


def changed(**costs: Cost) -> Road:
    names = {name.rpartition(" ")[2]: name for name in ROAD.functions}
    functions = {names.get(name, name): cost for name, cost in costs.items()}
    return dataclasses.replace(ROAD, functions={**ROAD.functions, **functions})


def said(now: Road) -> list[str]:
    return [str(dearer) for dearer in golden.compare(ROAD, now)]


def test_the_same_is_no_change() -> None:
    assert said(ROAD) == []


def test_one_instruction_more_is_found() -> None:
    (line,) = said(changed(mp_read=Cost(2000, 102_000)))
    assert line == "BPL, n = 1: megapipe/: mp_read: instructions per call 50.00 -> 51.00"


def test_one_call_more_is_found() -> None:
    (line,) = said(changed(mp_read=Cost(2300, 115_000)))
    assert line == "BPL, n = 1: megapipe/: mp_read: calls per transaction 2.00 -> 2.30"


def test_a_new_function_is_found() -> None:
    (line,) = said(changed(mp_new=Cost(1000, 5_000)))
    assert line == "BPL, n = 1: mp_new: calls per transaction 0.00 -> 1.00"


def test_the_dearest_comes_first_and_the_sum_is_judged_as_well() -> None:
    now = changed(mp_read=Cost(2000, 102_000), tcp_sendmsg=Cost(1000, 950_000))
    names = [dearer.function for dearer in golden.compare(ROAD, now)]
    assert names == [golden.ALL, "net/ipv4/tcp.c: tcp_sendmsg", "megapipe/: mp_read"]


@pytest.mark.parametrize(
    "now",
    [
        # Cheaper, and of a call so little that it is the length of a list.
        changed(mp_read=Cost(2000, 90_000)),
        # What ages with time costs what has passed of it.
        changed(**{"kernel/sched/pelt.c: __update_load_avg_se": Cost(1000, 5_000)}),
        changed(tcp_sendmsg=Cost(1000, 905_000)),
        # Of many calls a part of one.
        changed(slab_free=Cost(11_300, 113_000)),
        # Not on every transaction's path.
        changed(schedule=Cost(110, 45_000)),
        changed(schedule=Cost(99, 41_000)),
    ],
)
def test_what_is_not_dearer(now: Road) -> None:
    assert said(now) == []


@pytest.fixture(scope="module")
def built() -> Built:
    return build_solution(load_lab(LAB), Progress(quiet=True))


@pytest.mark.vm
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no accepted costs"),
        ("[]", "no accepted costs"),
        (json.dumps({"version": 0}), "version 0"),
        (
            json.dumps({"version": golden.VERSION, "servers": [], "identity": {}}),
            "accepted with another kernel, kernel_key, qemu, cpu_model",
        ),
    ],
)
def test_without_accepted_costs_there_is_nothing_to_compare(
    built: Built, tmp_path: Path, content: str, problem: str
) -> None:
    path = tmp_path / "golden.json"
    path.write_text(content)
    with pytest.raises(NoGolden, match=problem):
        golden.read(path, built)


def accepted(built: Built) -> dict[tuple[str, int], Road]:
    try:
        roads = golden.read(golden.ACCEPTED, built)
    except NoGolden as error:
        pytest.skip(f"other numbers would be right here: {error.problem}")
    return {(road.server, road.per_connection): road for road in roads}


@pytest.mark.vm
def test_no_function_has_become_dearer(built: Built) -> None:
    before = accepted(built)
    now = golden.measure(built)
    assert {(road.server, road.per_connection) for road in now} == set(golden.MEASURED)
    dearer = [
        one
        for road in now
        for one in golden.compare(before[road.server, road.per_connection], road)
    ]
    assert [str(one) for one in dearer] == []


@pytest.mark.vm
def test_a_line_that_adds_work_is_found_and_its_function_named(
    built: Built, tmp_path: Path
) -> None:
    before = accepted(built)["BPL", 1]
    lab = load_lab(LAB)
    for name, path in variants.solution(lab.folder).files.items():
        text = path.read_text()
        assert text.count(LINE) == 1
        (tmp_path / name).write_text(text.replace(LINE, EXTRA + LINE))
    slower = build(lab, variants.submission(lab.folder, tmp_path), built.kernel)
    (now,) = golden.measure(slower, [("BPL", 1)])
    found = golden.compare(before, now)
    assert [dearer.function for dearer in found] == ["megapipe/: lightweight_accept"]
    assert found[0].what == "instructions per call"
