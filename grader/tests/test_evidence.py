"""What the counts say of who did the work; and their means."""

from __future__ import annotations

import pytest

from grader.evidence import answered_elsewhere, not_received
from grader.experiment import Compared, Costs


def costs(*user: float) -> list[Costs]:
    return [Costs(value, 20_000, 0, {}) for value in user]


REFERENCES = [costs(400, 420), costs(180, 200)]


@pytest.mark.parametrize("user", [(190,), (100, 110), (1000,)])
def test_a_server_that_works_is_believed(user: tuple[float, ...]) -> None:
    assert answered_elsewhere(REFERENCES, costs(*user)) == ""


@pytest.mark.parametrize("user", [(0, 3), (-1,), (90, 90)])
def test_work_that_is_not_the_servers_is_seen(user: tuple[float, ...]) -> None:
    reason = answered_elsewhere(REFERENCES, costs(*user))
    assert "fewer than 190" in reason
    assert "-" not in reason


def received(packets: float) -> Costs:
    return Costs(400, 20_000, 0, {"tcp_rcv": packets})


@pytest.mark.parametrize(("packets", "found"), [(5.0, True), (4.6, True), (4.4, False), (0, False)])
def test_transactions_without_packets_have_not_taken_place(packets: float, found: bool) -> None:
    reason = not_received([received(5.0), received(5.2)], received(packets))
    assert (reason == "") is found
    assert found or "of 5.00" in reason


def test_counts_without_instructions_say_nothing() -> None:
    assert answered_elsewhere([costs(0), costs(0)], costs(0)) == ""


def test_what_was_counted_is_averaged_and_the_clock_is_no_kernel_work() -> None:
    rounds = [Costs(400, 20_000, 300, {"syscalls": 2.0}), Costs(420, 20_200, 500, {"syscalls": 4})]
    compared = Compared({"starter": rounds}, {})
    assert compared.means() == {
        "starter": {"user": 410, "kernel": 19_700, "clock": 400, "syscalls": 3}
    }
