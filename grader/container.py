"""Grading inside a container that is made for one submission and thrown away after it.

Most grading services run a grader in such a container, which may make no namespaces. Exact mode
(`grader.exact`) needs none for its network; what else they hold apart, the student's files from the
rest of the machine, the container itself does. Whoever runs it says so: nothing is guessed.
"""

from __future__ import annotations

import os

from grader.errors import UserError

VARIABLE = "MEGAPIPE_CONTAINER"


def thrown_away() -> bool:
    """Whether this machine is said to be such a container. Raises `UserError`."""
    said = os.environ.get(VARIABLE, "")
    if said not in ("", "0", "1"):
        raise UserError(
            f"{VARIABLE}={said}",
            "1: this machine holds one submission and is thrown away after it; else leave it out",
        )
    return said == "1"
