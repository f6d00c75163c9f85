"""The C++ of this package (csrc/): what would take a dozen small steps of NumPy for a handful of numbers.

Compiled once for a machine, in seconds; where that can't be done the definitions in Python run, and the log says why.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from core import compiler

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off")


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it can't be had, as the log says. Asked once per process."""
    library = compiler.load("drafts", _SOURCES, _FLAGS)
    if library is not None:
        number, place = ctypes.c_int64, ctypes.c_void_p
        library.learn.argtypes = (place, place, number, number, number, *[place] * 5)
        library.grow.argtypes = (place, place, place, number, *[place] * 4, ctypes.c_float, *[place] * 4)
        library.shape_of.argtypes = (number, number, *[place] * 3)
        library.path_products.argtypes = (number, *[place] * 3)
        library.follow.argtypes = (number, number, *[place] * 6)
        library.count_ranks.argtypes = (number, number, *[place] * 7)
        library.learn.restype = library.grow.restype = library.path_products.restype = library.follow.restype = None
        library.count_ranks.restype = None
        library.shape_of.restype = number
    return library


def address(array: NDArray[Any]) -> int:
    """Of its first number."""
    found: int = array.ctypes.data
    return found
