"""Token Recycling (arXiv:2408.08696): what the target thought likely after a token, when it was last computed, is what
is drafted after that token.

The paper keeps an adjacency matrix, [vocab, 8] of tokens, and fills a fixed tree from it. Here a row also has the
probabilities, so the tree is grown by them to the budget, and rows belong to scopes: all their matrices share one
bounded cache. A request's prompt tells what followed tokens that the target was not yet asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import SHARED, Contexts, last_windows
from speculation.drafters.growth import Branches, grow
from speculation.drafters.mixture import mixed
from speculation.drafters.recycling import RecyclingDrafter
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch

DOUBTS = np.array([0.25], np.float32)
"""Of a row, whose evidence is at most 1."""


class TokenRecycling(RecyclingDrafter):
    name: ClassVar[str] = "token_recycling"
    contexts = Contexts((1,), (SHARED,))
    of_text = contexts
    fading = 0.5

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        salts = self.catch_up(requests)

        def follow(of_request: NDArray[np.int64], windows: NDArray[np.int64]) -> Branches:
            return mixed(*self.recall(windows, salts.of(of_request)), DOUBTS)

        windows = last_windows(requests, self.contexts.width)
        return grow(follow, windows, budgets, floor, branches=self.branches, law=self.law, drafter=self.name)


def build(surroundings: Surroundings) -> TokenRecycling:
    return TokenRecycling(surroundings)
