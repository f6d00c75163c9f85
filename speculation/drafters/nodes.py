"""The nodes of the trees of all requests while they are being found, and the trees that are made of the best of them.

The worth of a node is the probability that its whole path is accepted, so it is at most its parent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.laws import DraftLaw
from speculation.tree import ROOT, DraftBatch, offsets_of

LEAST_WORTH = 1e-3
"""A node that is accepted more seldom is never worth its row."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """In any order that has parents first."""

    tokens: NDArray[np.int64]
    parents: NDArray[np.int64]
    """Numbers among all nodes, or ROOT."""
    requests: NDArray[np.int64]
    worths: NDArray[np.float32] | NDArray[np.float64]
    chances: NDArray[np.float32] | NDArray[np.float64]
    """That a node is accepted once its parent is."""

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def joined(parts: Sequence[Nodes]) -> Nodes:
        if not parts:
            none, never = np.empty(0, np.int64), np.empty(0, np.float32)
            return Nodes(none, none, none, never, never)
        return Nodes(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.parents for part in parts]),
            np.concatenate([part.requests for part in parts]),
            np.concatenate([part.worths for part in parts]),
            np.concatenate([part.chances for part in parts]),
        )

    def ranked(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All nodes by request and worth, and the rank of each of these in its request. Of equals, parents first."""
        order = np.lexsort((-self.worths, self.requests))
        requests = self.requests[order]
        return order, np.arange(len(order)) - requests.searchsorted(requests)

    def trees(self, budgets: NDArray[np.int64], law: DraftLaw, drafter: str, floor: float = LEAST_WORTH) -> DraftBatch:
        """Of the budgets[r] best nodes of each request, those that are worth `floor`."""
        order, ranks = self.ranked()
        kept = (ranks < budgets[self.requests[order]]) & (self.worths[order] >= floor)
        best, ranks = order[kept], ranks[kept]
        places = np.full(len(self) + 1, ROOT, np.int64)  # the last is that of ROOT
        places[best] = ranks
        offsets = offsets_of(np.bincount(self.requests[best], minlength=len(budgets)))
        parents, chances = places[self.parents[best]], self.chances[best].astype(np.float32)
        return DraftBatch(self.tokens[best].astype(np.int64), parents, offsets, law, drafter, confidence=chances)
