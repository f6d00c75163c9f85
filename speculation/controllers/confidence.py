"""Goodput says whether a request drafts; within twice what would be best for all alike it stops where the drafter has
lost confidence (SpecDec++, arXiv:2405.19715).

A path is not drafted further once the probability that something on it is rejected exceeds 1 - floor. The floor is what
another token costs, as a share of what is emitted in that time: a token that is accepted with less lowers the goodput.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.goodput import Goodput
from speculation.rounds import Budgets, Load
from speculation.tree import DraftBatch

REACH = 2
"""Times the budget that would be best for all alike."""


class Confidence(Goodput):
    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        budgets = self.allot(load, stats, self.preferred(load))
        tokens = np.minimum(self.room(load), REACH * budgets.tokens)
        return Budgets(tokens, tokens, budgets.drafters, min(1.0, self.price(load, budgets)))

    def trim(self, drafts: DraftBatch, budgets: Budgets, requests: NDArray[np.int64]) -> DraftBatch:
        """A path ends with the first node at which the floor is passed: that stays, so its own token doesn't decide on
        it."""
        drafts = drafts.prune(budgets.tokens[requests])
        if drafts.confidence is None:
            return drafts
        return drafts.cut_below(drafts.path_products(drafts.confidence) < budgets.floor)


def build(limits: Limits) -> Confidence:
    return Confidence(limits)
