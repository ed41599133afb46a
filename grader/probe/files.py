"""The files that a probe shares with its plugin: they live as long as the probe is open."""

from __future__ import annotations

import mmap
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from grader.probe.errors import ProbeError
from grader.probe.loading import plugin, private_folder


class PluginFiles(ABC):
    """What all probes are: a context manager that serves one QEMU process.

    Entering it builds the plugin and makes a private folder (below `parent`, default: memory)
    with the files that the plugin opens. They go away as soon as the plugin has them
    (`_remove_folder`), so that nothing is left behind however the run ends.
    """

    plugin_name: ClassVar[str]

    def __init__(self, qemu: Path | None, parent: Path | None) -> None:
        self._qemu = qemu
        self._parent = parent
        self._folder: Path | None = None
        self._plugin: Path | None = None
        self._map: mmap.mmap | None = None

    @abstractmethod
    def _make_files(self, folder: Path) -> mmap.mmap:
        """Make what the plugin opens, and return a map of what it counts in."""

    @property
    @abstractmethod
    def counting(self) -> bool:
        """Whether a QEMU has loaded the probe; from then on it can be read."""

    def __enter__(self) -> Self:
        self._plugin = plugin(self.plugin_name, self._qemu)
        self._folder = private_folder(self._parent)
        try:
            self._map = self._make_files(self._folder)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove_folder()
        if self._map is not None:
            self._map.close()
            self._map = None

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _opened(self) -> mmap.mmap:
        if self._map is None:
            raise ProbeError("the probe is not open", "use it as a context manager")
        return self._map

    @property
    def opened(self) -> tuple[Path, ...]:
        """The plugin, which QEMU reads, and the folder with the files that it writes to."""
        return self._to_load()

    def _to_load(self) -> tuple[Path, Path]:
        """Return the plugin and the folder, for the QEMU that is to load them."""
        if self._folder is None or self._plugin is None or self.counting:
            raise ProbeError(
                "the probe is not open, or its QEMU runs already", "open a probe per QEMU"
            )
        return self._plugin, self._folder
