"""One multiplier for every time limit, measured on the machine at hand.

A time limit is written in the code as what a machine like the reference needs when nothing else
runs there; `scaled` turns it into seconds here. Nothing else in the project knows how fast the
machine is, and no point depends on it.
"""

from __future__ import annotations

import functools
import os
import time

from grader.errors import UserError

ENVIRONMENT_VARIABLE = "MEGAPIPE_TIMEOUT_FACTOR"

# What `_calibration` takes on the reference: a server core of 2.6 GHz with nothing beside it.
_REFERENCE_SECONDS = 0.025

_ROUNDS = 3
_BOUNDS = (1.0, 20.0)


class BadFactor(UserError):
    """The environment gives a multiplier that is none."""


@functools.cache
def factor() -> float:
    """Return the multiplier: 1 on a machine as fast as the reference, more on a slower one.

    Taken from ``$MEGAPIPE_TIMEOUT_FACTOR`` if that is set, measured otherwise, once per process
    (some 0.1 s). A fast machine does not get less than 1: a limit only has to be long enough.
    Raises `BadFactor` if the variable holds anything but a positive number.
    """
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if given is not None:
        try:
            value = float(given)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise BadFactor(
                f"{ENVIRONMENT_VARIABLE} is {given!r}",
                "set it to a positive number such as 2.5, or unset it",
            )
        return value
    # The median, in wall time: what else runs on the machine is part of what a limit must cover,
    # one unlucky moment is not.
    times = sorted(_calibration() for _ in range(_ROUNDS))
    speed = times[_ROUNDS // 2] / _REFERENCE_SECONDS
    # The emulator and the load generator want a core each, beside what runs already.
    wanted = (os.getloadavg()[0] + 2) / len(os.sched_getaffinity(0))
    return min(max(speed * max(wanted, 1.0), _BOUNDS[0]), _BOUNDS[1])


def scaled(seconds: float) -> float:
    """Return the limit `seconds`, given for the reference machine, in seconds of this one."""
    return seconds * factor()


def _calibration() -> float:
    """Return the seconds that a fixed piece of interpreter work takes."""
    begin = time.perf_counter()
    total = 0
    for value in range(600_000):
        total += value & 7
    assert total
    return time.perf_counter() - begin
