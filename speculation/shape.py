"""Where the nodes of a DraftBatch are, found in one pass over them by C++ (csrc/trees.cpp). tree.py defines it all."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speculation.native import address, load

_ARRAYS = 6
"""Of a Shape."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All [nodes], as the properties of DraftBatch of these names."""

    library: ctypes.CDLL
    request_of: NDArray[np.int64]
    ranks: NDArray[np.int64]
    parent_nodes: NDArray[np.int64]
    parent_rows: NDArray[np.int64]
    depths: NDArray[np.int64]
    sibling_ranks: NDArray[np.int64]

    @classmethod
    def of(cls, parents: NDArray[np.int64], offsets: NDArray[np.int64]) -> Self | None:
        """None if there is no library, or these are no trees."""
        library, nodes = load(), len(parents)
        if library is None or not len(offsets) or parents.dtype != np.int64 or offsets.dtype != np.int64:
            return None
        parents, offsets = np.ascontiguousarray(parents), np.ascontiguousarray(offsets)
        arrays = np.empty((_ARRAYS, nodes), np.int64)
        wrong = library.shape_of(len(offsets) - 1, nodes, address(parents), address(offsets), address(arrays))
        return None if wrong else cls(library, *arrays)

    def path_products(self, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """[nodes] the product of `factors` [nodes] over each node and those above it."""
        factors, products = np.ascontiguousarray(factors), np.empty(len(factors))
        self.library.path_products(len(factors), address(self.parent_nodes), address(factors), address(products))
        return products

    def follow(
        self, drafted: NDArray[np.int64], offsets: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """As walk.follow for drafted tokens [nodes] at these offsets [requests + 1], by tokens [rows]."""
        drafted, offsets, tokens = (np.ascontiguousarray(array, np.int64) for array in (drafted, offsets, tokens))
        accepted, last = np.empty(len(drafted), np.bool_), np.empty(len(offsets) - 1, np.int64)
        self.library.follow(
            *(len(last), len(drafted), address(drafted), address(self.parent_rows)),
            *(address(offsets), address(tokens), address(accepted), address(last)),
        )
        return accepted, last

    def count_ranks(
        self,
        offsets: NDArray[np.int64],
        accepted: NDArray[np.bool_],
        asked: NDArray[np.int64],
        wanted: NDArray[np.bool_],
        ranks: int,
    ) -> NDArray[np.float64]:
        """As Acceptance counts them: [3 * ranks + 2]. No request has more than `ranks` nodes."""
        counts = np.zeros(3 * ranks + 2)
        arrays = [np.ascontiguousarray(array) for array in (accepted, asked, wanted)]
        self.library.count_ranks(
            *(len(offsets) - 1, ranks, address(offsets), address(self.parent_nodes), address(self.sibling_ranks)),
            *(*map(address, arrays), address(counts)),
        )
        return counts
