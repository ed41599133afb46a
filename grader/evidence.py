"""Whether what was measured is what it seems: pure functions on what the probe has counted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from grader.experiment import Costs

# Of the server's own instructions, fewer than this share is not the server any more.
LEAST_SHARE = 0.5


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


def _user(costs: Sequence[Costs]) -> float:
    return statistics.fmean(one.user_instructions for one in costs)
