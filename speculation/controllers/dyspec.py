"""Goodput's budgets for the step as a whole: drafters propose more, and growth.py chooses among all requests' nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.goodput import Goodput
from speculation.controllers.growth import grow
from speculation.rounds import Budgets, Load
from speculation.tree import DraftBatch

CANDIDATES = 2
"""Times what is verified."""


class DySpec(Goodput):
    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        budgets = self.allot(load, stats, self.preferred(load))
        candidates = np.minimum(self.room(load), CANDIDATES * budgets.tokens)
        return Budgets(budgets.tokens, candidates, budgets.drafters)

    def trim(self, drafts: DraftBatch, budgets: Budgets, requests: NDArray[np.int64]) -> DraftBatch:
        """A draft without confidences keeps the budget of each request."""
        if drafts.confidence is None:
            return drafts.prune(budgets.tokens[requests])
        return grow(drafts, drafts.confidence, int(budgets.tokens[requests].sum()))


def build(limits: Limits) -> DySpec:
    return DySpec(limits)
