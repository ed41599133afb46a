"""The one exception for what the person at the keyboard can put right.

Standard library only: the bootstrap raises it before anything is installed.
"""

from __future__ import annotations


class UserError(Exception):
    """Something expected went wrong; `todo` says what to do about it.

    A verb that ends with it prints `report()` and no traceback, and exits with `status`.
    """

    status = 1

    def __init__(self, problem: str, todo: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.todo = todo

    def report(self) -> str:
        """Return the text to print: the problem, and what to do."""
        return f"error: {self.problem}\nwhat to do: {self.todo}"

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of a traceback; IPython looks for this name."""
        return self.report().split("\n")


class UsageError(UserError):
    """A verb or an option was used wrongly."""

    status = 2
