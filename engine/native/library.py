"""Compiles and loads the kernels. The shared object is kept by what it was made from: sources, flags, PyTorch."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch

from core import compiler

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    *("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)

logger = logging.getLogger(__name__)


@cache
def load() -> bool:
    """Make torch.ops.slipstream callable, compiling it first if this machine has not done so yet (about 15 s). False,
    and the reason in the log, where the kernels can't be had; asked once per process."""
    if (reason := _why_not() or _make()) is not None:
        logger.warning("no native kernels, PyTorch's are slower: %s", reason)
        return False
    try:
        torch.ops.load_library(str(library_path()))  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning("no native kernels: %s can't be loaded (%s); remove it", library_path(), error)
        return False
    return True


def is_loaded() -> bool:
    """Whether somebody has: nothing is compiled for this question."""
    return load.cache_info().currsize > 0 and load()


def library_path() -> Path:
    """Where the compiled kernels are, or would be."""
    return compiler.library_path("slipstream", _SOURCES, f"{torch.__version__} {_FLAGS}")


def _why_not() -> str | None:
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    return None if library_path().exists() else compiler.why_no_compiler()


def _make() -> str | None:
    """Compile unless it was done; the reason if that fails."""
    root = Path(torch.__file__).parent
    include = [f"-isystem{root / 'include' / folder}" for folder in ("", "torch/csrc/api/include")]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    return compiler.compile_once(library_path(), [*_FLAGS, *include, str(_SOURCES / "ops.cpp"), *link])
