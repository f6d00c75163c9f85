"""All that is known without training, in one law: the request's own text (as in prompt lookup), what the target thought
of it and of other requests' contexts (Token Recycling, ADED's tri-grams), and longer contexts where there are any.

For each node the target's next token is predicted by mixing (mixture.py) what followed the last 1, 2 and 4 tokens in
any request of the scope with what followed the last 2, 4 and 8 in the request itself; the tree is the worthiest one
under the budget (growth.py). So it follows a copied passage far, and spreads where it only knows what is common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import PRIVATE, SHARED, Contexts, last_windows
from speculation.drafters.growth import Branches, grow
from speculation.drafters.mixture import mixed
from speculation.drafters.recycling import RecyclingDrafter
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch

# Fitted on generations of a 135M model over Spec-Bench; the optimum is flat.
DOUBTS = np.array([3.75, 3.75, 1.25, 3.0, 0.5, 0.06], np.float32)
"""Of the contexts below."""
CERTAINTY, FLATNESS = np.float32(0.97), np.float32(0.8)
"""The chance of a token with probability p in the mixture is CERTAINTY p^FLATNESS: the mixture is more careful than it
has to be with a target that takes its likeliest token."""


class Hybrid(RecyclingDrafter):
    name: ClassVar[str] = "hybrid"
    contexts = Contexts((1, 2, 2, 4, 4, 8), (SHARED, SHARED, PRIVATE, SHARED, PRIVATE, PRIVATE))
    fading = 0.6
    of_text = contexts.only(PRIVATE)

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        salts = self.catch_up(requests)

        def follow(of_request: NDArray[np.int64], windows: NDArray[np.int64]) -> Branches:
            law = mixed(*self.recall(windows, salts.of(of_request)), DOUBTS)
            return Branches(law.windows, law.tokens, CERTAINTY * law.chances**FLATNESS)

        windows = last_windows(requests, self.contexts.width)
        return grow(follow, windows, budgets, floor, branches=self.branches, law=self.law, drafter=self.name)


def build(surroundings: Surroundings) -> Hybrid:
    return Hybrid(surroundings)
