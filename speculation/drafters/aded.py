"""ADED (arXiv:2407.12021): tri-grams whose probabilities follow the target's law while it decodes, and a tree that is
searched for in them (search.py), weighing what looks good against what was not looked at yet.

The paper begins with tri-grams of a corpus. Here they begin empty, for each scope, and where a tri-gram was never seen
the bigram stands in for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import SHARED, Contexts, last_windows
from speculation.drafters.recycling import RecyclingDrafter
from speculation.drafters.search import search
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch


class Aded(RecyclingDrafter):
    name: ClassVar[str] = "aded"
    contexts = of_text = Contexts((1, 2), (SHARED, SHARED))
    doubts = np.array([0.25, 0.25], np.float32)
    fading = 0.5

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        salts = self.catch_up(requests)
        branches = slice(None) if self.branches else slice(1)

        def expand(
            of_request: NDArray[np.int64], windows: NDArray[np.int64]
        ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
            tokens, weights = self.recall(windows, salts.of(of_request))
            chances = weights / (weights.sum(-1) + self.doubts)[..., None]
            longest = np.arange(len(tokens)), (weights[:, 1, 0] > 0).astype(np.int64)
            return tokens[longest][:, branches], chances[longest][:, branches]

        windows = last_windows(requests, self.contexts.width)
        return search(expand, windows, budgets, floor, law=self.law, drafter=self.name)


def build(surroundings: Surroundings) -> Aded:
    return Aded(surroundings)
