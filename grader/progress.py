"""Progress for people: one line that moves on a terminal, plain lines elsewhere.

Every stage of the road is a *phase*. Its time is kept, so that the end of a run can say where
the time went.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.status import Status
from rich.text import Text


@dataclass
class Progress:
    """Shows phases on standard error and remembers their times."""

    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    quiet: bool = False
    times: dict[str, float] = field(default_factory=dict)
    _status: Status | None = None
    _phase: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a phase: shown while it lasts, its time added to `times[name]` in seconds."""
        begin = time.monotonic()
        outer = self._phase
        self._phase = name
        self.update("")
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.monotonic() - begin
            self._phase = outer
            if not outer:
                self.close()

    def update(self, text: str) -> None:
        """Say what the phase is doing just now; overwritten by the next update."""
        if self.quiet or not self.console.is_terminal:
            return
        line = Text(f"{self._phase}: {text}" if text else self._phase)
        if self._status is None:
            self._status = self.console.status(line)
            self._status.start()
        else:
            self._status.update(line)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """End the moving line."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def summary(self) -> str:
        """Return the time of each phase in one line, for example ``kernel 0.1 s, boot 1.9 s``."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.times.items())


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
