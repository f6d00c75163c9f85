"""How many of the nodes that were drafted are verified: as many as emit most tokens per second.

    (B + sum of the n highest worths) / (plain + added(n))

over the requests of the step, at the best n, which is 0 where no node is worth its row: then the draft was in vain and
the step takes plain + what it took. So a step goes far where the drafter is sure, and costs nothing but the draft where
it is not.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from speculation.acceptance import Acceptance
from speculation.controllers.step_time import Speculation, StepTime
from speculation.rounds import Load
from speculation.tree import DraftBatch

MARGIN = 1.01
"""Times as fast as if the draft was in vain: neither is foretold exactly."""
CAUTION = 0.8
"""Of what a node must be worth: what drafters say of it may be wrong."""


class Choice:
    """For a few steps of the same requests, whose load is much the same. Chooses among POINT_MASS nodes by what they
    are."""

    def __init__(self, time: StepTime, load: Load, stats: Acceptance, drafting_s: float) -> None:
        """`drafting_s`: what it takes to draft, which is spent by the time nodes are chosen."""
        self._time = time
        self._load = load
        self._stats = stats
        self._in_vain = 1 + drafting_s / time.plain(load)  # times as long as a plain step
        self._slower: dict[int, NDArray[np.float64]] = {}  # by drafter

    def floor(self, speedup: float) -> float:
        """What a node must be said to be worth, at least, so that a drafter need not go on for less: what is emitted in
        the time of a row, where that takes least, in steps with this speed-up."""
        return CAUTION * speedup * self._cheapest_row

    def of(self, drafts: DraftBatch, confidence: NDArray[np.float32], drafter: int) -> DraftBatch:
        """`drafter` is its number."""
        said, slower = drafts.path_products(confidence), self._slower_by(drafter)
        order = np.argsort(-said, kind="stable")[: len(slower)]
        if not len(order):
            return drafts
        gains = self._stats.worths(drafts.drafter, said[order]).cumsum() / len(self._load.classes)
        speedups = (1 + gains) / np.maximum(slower[: len(order)], self._in_vain)
        best = int(speedups.argmax())
        kept = order[: best + 1] if speedups[best] * self._in_vain > MARGIN else order[:0]
        return drafts if len(kept) == drafts.num_nodes else drafts.only(np.sort(kept))

    @cached_property
    def _cheapest_row(self) -> float:
        """In plain steps."""
        slower = [by for number in range(self._time.num_drafters) if len(by := self._slower_by(number)) > 1]
        return min((float(np.diff(by).min()) for by in slower), default=0.0)

    def _slower_by(self, drafter: int) -> NDArray[np.float64]:
        """[n - 1] times as long as a plain step, with n tokens of the drafter: as far as that is known."""
        found = self._slower.get(drafter)
        if found is None:
            counts = np.arange(1.0, self._time.horizon + 1)
            only = np.arange(self._time.num_drafters) == drafter
            each = np.minimum(counts, len(self._load.classes))
            speculation = Speculation(counts[:, None] * only, each[:, None] * only)
            found = 1 + self._time.added(self._load, speculation) / self._time.plain(self._load)
            self._slower[drafter] = found
        return found
