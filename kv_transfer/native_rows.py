"""Rows of the cache moved and summed in one pass over memory, by a kernel in C++ (csrc/), where there is one and the
rows suit it. It is compiled once for a machine, in seconds."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core import compiler

STRIPE = 64
"""Rows, and where they begin, are multiples of it."""
MIN_SUMMED_BYTES = 256
"""XXH3 treats shorter inputs in another way."""

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC")
_BY_CAPABILITY = {"AVX2": ("-mavx2",), "AVX512": ("-mavx512f",)}
"""Of CPUs, as PyTorch tells them apart: what the kernel may use there."""

logger = logging.getLogger(__name__)

Memory = NDArray[np.uint8]
Runs = NDArray[np.int64]


class _Rows(ctypes.Structure):
    """As in csrc/rows.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("layers", "slots", "row", "layer_stride", "value_stride")),
    )


@cache
def load() -> ctypes.CDLL | None:
    """The kernel, or None where it can't be had, as the log says. Asked once per process."""
    flags = _BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability())
    if flags is None:
        logger.warning("no native rows, Python's are slower: this CPU has no AVX2")
        return None
    library = compiler.load("rows", _SOURCES, (*_FLAGS, *flags))
    if library is not None:
        rows, address = ctypes.POINTER(_Rows), ctypes.c_void_p
        library.move_rows.argtypes = (
            rows,
            rows,
            address,
            ctypes.c_int64,
            ctypes.c_bool,
            ctypes.POINTER(ctypes.c_uint64),
        )
        library.move_rows.restype = ctypes.c_int64
    return library


def move(source: Memory, target: Memory | None, runs: Runs, *, summed: bool, streamed: bool = False) -> int | None:
    """Copy rows into `target` if there is one, past the caches if `streamed`; the xxh3-64 of what was read if `summed`,
    else 0. None, with nothing done, where the kernel can't: the caller has another way. Lets other threads run. Raises
    IndexError, with nothing done, for a run that is not in the cache."""
    layers, planes, _, row = source.shape
    if not _suits(source, row) or not (target is None or _suits(target, row)) or (library := load()) is None:
        return None
    if target is not None and target.shape[0] != layers:
        raise IndexError(f"rows of {layers} layers can't become rows of {target.shape[0]}")
    few = layers * planes * row * len(runs) < MIN_SUMMED_BYTES
    if summed and few and layers * planes * row * runs[:, 2].sum() < MIN_SUMMED_BYTES:
        return None
    if target is None and not summed:
        return 0
    runs = np.ascontiguousarray(runs, np.int64)
    into = None if target is None else ctypes.byref(_rows(target))
    found = ctypes.c_uint64()
    wrong = library.move_rows(
        ctypes.byref(_rows(source)),
        into,
        runs.ctypes.data,
        len(runs),
        streamed,
        ctypes.byref(found) if summed else None,
    )
    if wrong >= 0:
        first, to, length = runs[wrong].tolist()
        raise IndexError(f"a run of {length} rows from {first} to {to} is not in the cache")
    return found.value


def _rows(memory: Memory) -> _Rows:
    layers, _, slots, row = memory.shape
    return _Rows(memory.ctypes.data, layers, slots, row, *memory.strides[:2])


def _suits(rows: Memory, row: int) -> bool:
    """[layers, 2, slots, bytes], the rows side by side at whole stripes."""
    aligned = not any(number % STRIPE for number in (row, rows.ctypes.data, *rows.strides[:2]))
    return aligned and rows.shape[0] > 0 and rows.shape[3] == row and rows.strides[2:] == (row, 1)
