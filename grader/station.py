"""Variant -> Image -> booted machine with a probe: the place where one variant is measured."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from grader.lab import Lab
from grader.machine import Machine, MachineConfig
from grader.probe import Probe, ProbeConfig, Symbols
from grader.variant import Variant
from images.build import Image, build_image, build_programs
from kernel.build import UAPI, Kernel, Module, build_module


@dataclass(frozen=True)
class Built:
    """Everything that is made from a variant before a machine boots it."""

    variant: Variant
    kernel: Kernel
    module: Module
    image: Image


def build(lab: Lab, variant: Variant, kernel: Kernel) -> Built:
    """Compile a variant; a student's mistake is a `ModuleError` or a `CompileError`."""
    module = build_module(kernel, {name: variant.files[name] for name in lab.kernel_files})
    library = [variant.files[name] for name in lab.files if name not in lab.kernel_files]
    image = build_image(build_programs(library, UAPI), module.ko)
    return Built(variant, kernel, module, image)


class Station:
    """A variant, booted under TCG with the standard probe; a context manager."""

    def __init__(self, built: Built, vcpus: int = 4, name: str = "", memory_mib: int = 512) -> None:
        self.built = built
        self.name = name or built.variant.name
        symbols = Symbols.of_kernel(built.kernel.vmlinux)
        self.probe = Probe(ProbeConfig.standard(vcpus, symbols), symbols)
        self._vcpus = vcpus
        self._memory_mib = memory_mib
        self._machine: Machine | None = None
        self._stack = ExitStack()

    @property
    def machine(self) -> Machine:
        """The running machine."""
        assert self._machine is not None
        return self._machine

    def __enter__(self) -> Self:
        """Boot. Raises `MachineError` and leaves nothing if it does not get ready."""
        with ExitStack() as stack:
            stack.enter_context(self.probe)
            config = MachineConfig(
                kernel=self.built.kernel.vmlinux,
                initramfs=self.built.image.initramfs,
                vcpus=self._vcpus,
                memory_mib=self._memory_mib,
                extra_qemu=tuple(self.probe.qemu_arguments()),
                symbols=(self.built.kernel.vmlinux, self.built.module.ko),
            )
            self._machine = stack.enter_context(Machine(config))
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """End the machine; once is enough."""
        self._machine = None
        self._stack.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
