"""Whether what was measured is what it seems: pure functions on what the probe has counted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from grader.experiment import Costs

# Of the server's own instructions, fewer than this share is not the server any more.
LEAST_SHARE = 0.5
# Of the packets of a transaction; batches of acknowledgements differ a little.
LEAST_PACKETS = 0.9


def answered_elsewhere(references: Sequence[Sequence[Costs]], submission: Sequence[Costs]) -> str:
    """Return why these transactions cannot have been the server's work, or nothing.

    `references` are the rounds of each variant that the server is known to have served in. What
    the processors execute in user mode for a transaction is the server and its library; if it is
    much less than for every reference, something in the kernel answers.
    """
    least = min(_user(costs) for costs in references)
    found = _user(submission)
    if found >= LEAST_SHARE * least:
        return ""
    return (
        f"the server executes {max(found, 0):.0f} instructions per transaction, which cannot be "
        f"done in fewer than {least:.0f}: something else answers in its place"
    )


def not_received(references: Sequence[Costs], submission: Costs) -> str:
    """Return why these transactions cannot have taken place at all, or nothing.

    For exact mode, where nobody outside has seen a reply: each transaction takes packets, and they
    go through `tcp_v4_rcv()`, as many as for the references.
    """
    least = min(costs.calls["tcp_rcv"] for costs in references)
    found = submission.calls["tcp_rcv"]
    if found >= LEAST_PACKETS * least:
        return ""
    return (
        f"{found:.2f} packets arrived for a transaction, of {least:.2f} that it takes: what the "
        "clients report has not taken place"
    )


def _user(costs: Sequence[Costs]) -> float:
    return statistics.fmean(one.user_instructions for one in costs)
