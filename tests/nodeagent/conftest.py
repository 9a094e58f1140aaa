"""Make-believe machines with GPUs, seen through the real pynvml."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from bench.fakenvml.box import Box, build, load


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler on the PATH (on Debian, as root: apt-get install build-essential)")
    return build(tmp_path_factory.mktemp("fakenvml"))


@pytest.fixture
def loaded(library: Path) -> Iterator[ctypes.CDLL]:
    """The library, as the one that pynvml finds."""
    made = load(library)
    pynvml.nvmlLib = made
    pynvml._nvmlGetFunctionPointer_cache.clear()
    yield made
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def machine(loaded: ctypes.CDLL, tmp_path: Path) -> Callable[..., Box]:
    """Make a machine: `machine("H100-80", 2)`."""

    def make(model: str = "H100-80", count: int = 8) -> Box:
        return Box(loaded, tmp_path).add(model, count)

    return make
