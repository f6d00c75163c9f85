"""Successors learned and trees grown in C++ (../csrc): `Successors.add`, and `growth.grow` over `mixture.mixed`, in a
tenth of their time.

Where there is no library the definitions in Python run.
"""

from __future__ import annotations

import ctypes
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.contexts import MIXING, OF_TOKENS, Contexts, Salts
from speculation.drafters.nodes import LEAST_WORTH
from speculation.drafters.successors import Successors
from speculation.laws import DraftLaw
from speculation.native import address, load
from speculation.tree import DraftBatch


class _Memory(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("buckets", "claimed", "rows")),
        ("shift", ctypes.c_int64),
        ("fading", ctypes.c_float),
    )


class _Columns(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "width")),
        *((name, ctypes.c_void_p) for name in ("ends", "tops", "factors")),
        ("mixing", ctypes.c_uint64),
    )


class _Mixing(ctypes.Structure):
    _fields_ = (("doubts", ctypes.c_void_p), ("certainty", ctypes.c_float), ("branches", ctypes.c_int64))


class NativeSuccessors:
    """What `successors` hold, taught and asked by the library. Arrays are as there."""

    def __init__(self, successors: Successors, library: ctypes.CDLL) -> None:
        self._successors = successors
        table = successors.table
        self._memory = _Memory(
            address(table.tags),
            address(table.claimed),
            address(successors.rows),
            int(table.shift),
            float(successors.fading),
        )
        self._library = library
        self._columns: dict[Contexts, _Columns] = {}

    @classmethod
    def of(cls, successors: Successors) -> Self | None:
        """None where there is no library."""
        library = load()
        return None if library is None else cls(successors, library)

    def add(
        self,
        contexts: Contexts,
        windows: NDArray[np.int64],
        salts: Salts,
        tokens: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> None:
        """After all contexts of windows [n, width] came tokens [n, k] with weights [n, k]."""
        taught = [np.ascontiguousarray(array) for array in (windows, salts.owners, salts.terms, tokens, weights)]
        self._library.learn(
            *(ctypes.byref(self._memory), ctypes.byref(self._columns_of(contexts)), self._successors.table.tick()),
            *(len(tokens), tokens.shape[1], *map(address, taught)),
        )

    def grow(
        self,
        contexts: Contexts,
        salts: Salts,
        doubts: NDArray[np.float32],
        certainty: float,
        windows: NDArray[np.int64],
        budgets: NDArray[np.int64],
        floor: float,
        *,
        branches: bool,
        law: DraftLaw,
        drafter: str,
    ) -> DraftBatch:
        """As `growth.grow` after windows [requests, width], where what follows has `certainty` times the chance that
        `mixture.mixed` gives it by all contexts and their doubts."""
        asked = [np.ascontiguousarray(array) for array in (windows, salts.owners, salts.terms, budgets)]
        most, requests = int(budgets.sum()), len(budgets)
        tokens, parents = np.empty(most, np.int64), np.empty(most, np.int64)
        chances, offsets = np.empty(most, np.float32), np.empty(requests + 1, np.int64)
        mixing = _Mixing(address(doubts), certainty, branches)
        self._library.grow(
            *(ctypes.byref(self._memory), ctypes.byref(self._columns_of(contexts)), ctypes.byref(mixing)),
            *(
                requests,
                *map(address, asked),
                max(floor, LEAST_WORTH),
                address(tokens),
                address(parents),
                address(chances),
                address(offsets),
            ),
        )
        found = slice(offsets[-1])
        return DraftBatch(tokens[found], parents[found], offsets, law, drafter, confidence=chances[found])

    def _columns_of(self, contexts: Contexts) -> _Columns:
        columns = self._columns.get(contexts)
        if columns is None:
            arrays = contexts.ends, contexts.tops, OF_TOKENS
            columns = self._columns[contexts] = _Columns(
                contexts.num_columns, contexts.width, *map(address, arrays), MIXING
            )
        return columns
