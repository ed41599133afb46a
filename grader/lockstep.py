"""What an exact run needs of QEMU itself: see lockstep.c, which is loaded before its libraries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from grader import cache
from grader.errors import UserError
from grader.probe.loading import FLAGS, compile_library

SOURCE = Path(__file__).with_name("lockstep.c")


def libraries() -> list[Path]:
    """Return what is loaded before QEMU's libraries, compiled and cached.

    Raises `PluginUnavailable` without a compiler, `UserError` if it lies where it cannot be loaded
    from.
    """

    def make(folder: Path) -> None:
        compile_library(SOURCE, folder / "lockstep.so")

    library = cache.entry("lockstep", cache.digest(SOURCE, *FLAGS), make) / "lockstep.so"
    if re.search(r"[\s:]", str(library)):
        raise UserError(
            f"{library}: a library is not loaded into QEMU from a path with a space or a colon",
            "name another folder for what is built: XDG_CACHE_HOME=/a/folder",
        )
    return [library]


def prefix(libraries: Sequence[Path]) -> list[str]:
    """Return the words before QEMU's command line that have the libraries loaded into it."""
    return ["env", f"LD_PRELOAD={':'.join(map(str, libraries))}"]
