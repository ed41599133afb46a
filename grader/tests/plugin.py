"""Fixtures that more than one test folder needs; pyproject.toml loads this as a plugin.

Tests that boot a machine carry the mark ``vm``: whoever asks for a kernel gets it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from images import build as images
from kernel.build import Kernel, build_kernel

NEEDS_A_KERNEL = {"kernel", "debug_kernel", "vmlinux"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: builds a kernel (once) and boots it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NEEDS_A_KERNEL & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The lab's kernel."""
    return build_kernel()


@pytest.fixture(scope="session")
def debug_kernel() -> Kernel:
    """The kernel with KASAN, lockdep, kmemleak and UBSAN."""
    return build_kernel(debug=True)


@pytest.fixture(scope="session")
def vmlinux(request: pytest.FixtureRequest) -> Path:
    """The lab's kernel as a file; MEGAPIPE_TEST_VMLINUX names another one."""
    given = os.environ.get("MEGAPIPE_TEST_VMLINUX")
    if given:
        return Path(given)
    built: Kernel = request.getfixturevalue("kernel")
    return built.vmlinux


@pytest.fixture(scope="session")
def agent_image(tmp_path_factory: pytest.TempPathFactory) -> images.Image:
    """An initramfs with what init needs and nothing else: no library, servers or module."""
    guest = tmp_path_factory.mktemp("guest")
    for name in ("agent.c", "quickack.c", "init", "Makefile"):
        shutil.copy(images.GUEST / name, guest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "GUEST", guest)
        return images.build_image(images.build_programs([], guest), [])
