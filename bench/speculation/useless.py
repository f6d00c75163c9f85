"""The drafter that is never right but by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch, offsets_of, ranges


class Useless(BaseDrafter):
    """Chains of random tokens, as long as it is asked for."""

    name = "useless"

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._rng = np.random.default_rng(0)

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:  # noqa: ARG002
        lengths = np.minimum(budgets, self.max_budget)
        offsets = offsets_of(lengths)
        tokens = self._rng.integers(self.surroundings.vocab_size, size=int(offsets[-1]))
        return DraftBatch(tokens, ranges(np.full(len(lengths), -1), lengths), offsets, self.law, self.name)


def build(surroundings: Surroundings) -> Useless:
    return Useless(surroundings)
