"""What can go wrong with the probe."""

from __future__ import annotations

from grader.errors import UserError


class ProbeError(UserError):
    """The probe cannot do what was asked."""


class PluginUnavailable(ProbeError):
    """The plugin cannot be built for, or loaded into, the QEMU at hand."""


class UnknownSymbol(ProbeError):
    """A function is not in the kernel's symbol table."""
