"""y = x W^T in float32 for few rows, by a kernel in C++ (float32/few_rows.cpp) for CPUs with AVX2. It is compiled once
for a machine, in seconds."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch._C._profiler import _RecordFunctionFast

from core import compiler

_SOURCES = Path(__file__).parent / "float32"
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-mavx2", "-mfma")


@cache
def load() -> ctypes.CDLL | None:
    """The kernel, compiled first if this machine has not done so yet. None where it can't be had, as the log says, or
    was not measured. Asked once per process."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":  # docs/performance.md
        return None
    library = compiler.load("few_rows", _SOURCES, _FLAGS)
    if library is not None:
        address, size = ctypes.c_void_p, ctypes.c_int64
        library.few_rows.argtypes = (address, size, size, address, size, size, address, address, ctypes.c_int)
        library.few_rows.restype = None
    return library


def is_loaded() -> bool:
    """Whether somebody has: nothing is compiled for this question."""
    return load.cache_info().currsize > 0 and load() is not None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[rows, inputs] and [outputs, inputs] -> [rows, outputs]. Lets other Python threads run. Raises ValueError for
    tensors that the kernel can't read."""
    library, (outputs, inputs) = load(), weight.shape
    if library is None:
        raise ValueError("there is no kernel for few rows on this machine; ask is_loaded() first")
    if x.dim() != 2 or x.shape[1] != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"x of {tuple(x.shape)} and the bias don't fit a weight of {tuple(weight.shape)}")
    for part in (x, weight, bias):
        if part is not None and (part.dtype is not torch.float32 or part.device.type != "cpu"):
            raise ValueError(f"the kernel computes in float32 on the CPU, not in {part.dtype} on {part.device}")
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("weight and bias must be contiguous")
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(len(x), outputs)
    with _RecordFunctionFast("slipstream::few_rows_linear"):  # in a profile, where others are operators of PyTorch
        library.few_rows(
            x.data_ptr(),
            len(x),
            x.stride(0),
            weight.data_ptr(),
            outputs,
            inputs,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y
