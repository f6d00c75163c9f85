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

DOUBT = np.float32(0.25)
"""Of a context: with evidence m its law counts m / (m + DOUBT)."""


class Aded(RecyclingDrafter):
    name: ClassVar[str] = "aded"
    contexts = Contexts((1, 2), (SHARED, SHARED))
    of_text = contexts
    fading = 0.5

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        salts = self.catch_up(requests)
        branches = slice(None) if self.branches else slice(1)

        def expand(
            of_request: NDArray[np.int64], windows: NDArray[np.int64]
        ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
            tokens, weights = self.recall(windows, salts.of(of_request))
            masses = weights.sum(-1)
            known = np.arange(len(tokens)), (masses[:, 1] > 0).astype(np.int64)
            priors = weights[known] / (masses[known] + DOUBT)[:, None]
            return tokens[known][:, branches], priors[:, branches]

        windows = last_windows(requests, self.contexts.width)
        return search(expand, windows, budgets, floor, law=self.law, drafter=self.name)


def build(surroundings: Surroundings) -> Aded:
    return Aded(surroundings)
