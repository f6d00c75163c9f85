"""Weights on large pages: a step reads all of them, and finding them 4 KiB at a time takes up to a tenth of that."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

LARGE = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1


def enlarge(tensors: Iterable[torch.Tensor]) -> int:
    """Gather the memory of the tensors into large pages, where it lies, and return how many bytes it then has in them.
    To be called once they have found their last place; a machine that can't keeps its small pages, and is slower."""
    advise = ctypes.CDLL(None).madvise
    starts = {start for tensor in tensors for start in _pages(tensor)}
    return LARGE * len(
        [start for start in starts if advise(ctypes.c_void_p(start), ctypes.c_size_t(LARGE), _COLLAPSE) == 0]
    )


def _pages(tensor: torch.Tensor) -> range:
    """Where the large pages begin that the tensor is in: smaller tensors share them with their neighbours."""
    start = tensor.data_ptr()
    return range(start // LARGE * LARGE, start + tensor.nbytes, LARGE)
