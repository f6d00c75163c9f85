"""Rows of the cache moved and summed in one pass over memory, by our kernel (engine/native/csrc/rows.h), where there is
one and the rows suit it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from engine.native import library

STRIPE = 64
"""Rows, and where they begin, are multiples of it."""
MIN_SUMMED_BYTES = 256
"""XXH3 treats shorter inputs in another way."""

Memory = NDArray[np.uint8]
Runs = NDArray[np.int64]


def move(source: Memory, target: Memory | None, runs: Runs, *, summed: bool, streamed: bool = False) -> int | None:
    """Copy rows into `target` if there is one, past the caches if `streamed`; the xxh3-64 of what was read if `summed`,
    else 0. None, with nothing done, where the kernel can't: the caller has another way. Lets other threads run."""
    layers, planes, _, row = source.shape
    if not _suits(source, row) or not (target is None or _suits(target, row)) or not library.load():
        return None
    few = layers * planes * row * len(runs) < MIN_SUMMED_BYTES
    if summed and few and layers * planes * row * runs[:, 2].sum() < MIN_SUMMED_BYTES:
        return None
    into = None if target is None else torch.from_numpy(target)
    found = torch.ops.slipstream.move_rows.default(_readable(source), into, torch.from_numpy(runs), summed, streamed)
    return int(found) % 2**64


def _suits(rows: Memory, row: int) -> bool:
    """[layers, 2, slots, bytes], the rows side by side at whole stripes."""
    aligned = not any(number % STRIPE for number in (row, rows.ctypes.data, *rows.strides[:2]))
    return aligned and rows.shape[0] > 0 and rows.strides[2:] == (row, 1)


class _Readable:
    """Torch has no read-only tensors, and warns; our kernel writes to no source."""

    def __init__(self, rows: Memory) -> None:
        self.rows = rows
        self.__array_interface__ = rows.__array_interface__ | {"data": (rows.ctypes.data, False)}


def _readable(rows: Memory) -> torch.Tensor:
    return torch.from_numpy(rows if rows.flags.writeable else np.asarray(_Readable(rows)))
