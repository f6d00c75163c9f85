"""What controllers are made with, and have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.warm_up import RowTime
from speculation.rounds import Budgets, Load, Tally, Timing
from speculation.tree import DraftBatch


@dataclass(frozen=True, slots=True)
class Limits:
    max_budget: int
    """Most draft tokens for a request."""
    drafters: tuple[str, ...]
    """By name, the preferred one first; at least one."""
    row_times: Sequence[RowTime] = ()
    """What steps took that verified so many rows, in the order in which they ran."""


class BaseController:
    """For one that learns nothing and verifies what is proposed, up to the budget."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def trim(self, drafts: DraftBatch, budgets: Budgets, requests: NDArray[np.int64]) -> DraftBatch:
        return drafts.prune(budgets.tokens[requests])

    def record(self, load: Load, budgets: Budgets, tally: Tally, timing: Timing) -> None:
        pass

    def preferred(self, load: Load) -> list[str]:
        """[requests] the preferred drafter for each that did not ask for another."""
        return load.drafters([self.limits.drafters[0]] * len(load.classes))

    def room(self, load: Load) -> NDArray[np.int64]:
        """[requests] draft tokens that each can take at most."""
        return np.minimum(load.limits, self.limits.max_budget)


def plain_step(drafters: Sequence[str], rest: int = 0) -> Budgets:
    nothing = np.zeros(len(drafters), np.int64)
    return Budgets(nothing, nothing, drafters, rest=rest)
