"""What has become of drafts, by drafter and class of request: exponential averages that controllers decide by.

A node has a rank, its index in its request's draft. As the first k nodes of a draft are the tree under a budget of k,
rounds of any budget above i say how often the node of rank i is proposed and accepted. Ranks that were not asked for
are unobserved, not rejected. Those that were, but seldom, are taken to be much like their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.rounds import Outcome
from speculation.tree import DraftBatch

FORGETTING = 0.99
"""Weight of a request's round relative to the next of its class: the last 100 count."""
PRIOR_WEIGHT = 4.0
"""Rounds that what is known of all classes counts for in one, and the guess in all."""
GUESS = 0.5
"""Of alpha, when nothing is known."""
MAX_CLASSES = 64
"""Of a drafter. Requests of further ones count for all classes together only."""
ALL = ""
"""All classes together."""
ASKED_LATELY = 0.5
"""Weight of a round about 70 rounds ago."""


@dataclass(slots=True)
class _Counts:
    """Weighted: of rounds by rank [max_budget], and of first children that were judged."""

    asked: NDArray[np.float64]
    proposed: NDArray[np.float64]
    accepted: NDArray[np.float64]
    firsts: float = 0.0
    firsts_accepted: float = 0.0

    @classmethod
    def none(cls, max_budget: int) -> _Counts:
        return cls(np.zeros(max_budget), np.zeros(max_budget), np.zeros(max_budget))

    def add(self, more: _Counts, rounds: int) -> None:
        kept = FORGETTING**rounds
        self.asked = kept * self.asked + more.asked
        self.proposed = kept * self.proposed + more.proposed
        self.accepted = kept * self.accepted + more.accepted
        self.firsts = kept * self.firsts + more.firsts
        self.firsts_accepted = kept * self.firsts_accepted + more.firsts_accepted

    @property
    def alpha(self) -> float:
        return (self.firsts_accepted + PRIOR_WEIGHT * GUESS) / (self.firsts + PRIOR_WEIGHT)


@dataclass(frozen=True, slots=True)
class Prospects:
    """Of requests with a budget above each rank: [requests, max_budget] or, of one class, [max_budget]."""

    gains: NDArray[np.float64]
    """Probability that the node of the rank is proposed and accepted: tokens that it adds. Never rises with rank."""
    fills: NDArray[np.float64]
    """Probability that it is proposed: rows that it costs."""


class Acceptance:
    """Pure. `max_budget` is the most draft tokens for a request."""

    def __init__(self, max_budget: int) -> None:
        self._max_budget = max_budget
        self._counts: dict[str, dict[str, _Counts]] = {}  # by drafter and class, of which ALL is the first

    def observe(self, drafts: DraftBatch, outcome: Outcome, asked: NDArray[np.int64], classes: Sequence[str]) -> None:
        """A round of some requests of classes[r] with budgets of asked[r] draft tokens, or more where they had more."""
        asked = np.maximum(asked, drafts.lengths)
        by_class = self._counts.setdefault(drafts.drafter, {ALL: _Counts.none(self._max_budget)})
        of_request = np.array(classes)
        everyone = np.ones(len(classes), np.bool_)
        counted = self._count(drafts, outcome, asked, everyone)
        by_class[ALL].add(counted, len(classes))
        for name in set(classes):
            if name not in by_class and len(by_class) <= MAX_CLASSES:
                by_class[name] = _Counts.none(self._max_budget)
            if name in by_class:
                which = of_request == name
                these = counted if which.all() else self._count(drafts, outcome, asked, which)
                by_class[name].add(these, int(which.sum()))

    def prospects(self, drafters: Sequence[str], classes: Sequence[str]) -> Prospects:
        """For requests of classes[r] with drafters[r]."""
        pairs = list(zip(drafters, classes, strict=True))
        found = {pair: self._of_class(*pair) for pair in set(pairs)}
        both = [found[pair] for pair in pairs]
        return Prospects(np.stack([one.gains for one in both]), np.stack([one.fills for one in both]))

    def known(self, drafter: str) -> int:
        """Ranks that were asked for lately: of others `prospects` only guesses."""
        counts = self._counts.get(drafter)
        return int((counts[ALL].asked >= ASKED_LATELY).sum()) if counts else 0

    def rounds(self, drafter: str, name: str) -> float:
        """Weighted, of a class: how much of its prospects is its own."""
        by_class = self._counts.get(drafter, {})
        if name not in by_class and len(by_class) > MAX_CLASSES:
            name = ALL
        return float(by_class[name].asked[0]) if name in by_class else 0.0

    def alpha(self, drafter: str) -> float:
        """How often the first child of an accepted node is accepted: under rules chain and tree, on average, the sum of
        min(p, q). GUESS before anything was seen."""
        counts = self._counts.get(drafter)
        return counts[ALL].alpha if counts else GUESS

    def _count(
        self, drafts: DraftBatch, outcome: Outcome, asked: NDArray[np.int64], which: NDArray[np.bool_]
    ) -> _Counts:
        of_these = which[drafts.request_of]
        reached = np.append(outcome.accepted, True)[drafts.parent_nodes]  # the last is ROOT's
        firsts = of_these & reached & (drafts.sibling_ranks == 0)
        return _Counts(
            (asked[which, None] > np.arange(self._max_budget)).sum(0).astype(np.float64),
            self._by_rank(drafts, of_these),
            self._by_rank(drafts, of_these & outcome.accepted),
            float(firsts.sum()),
            float((firsts & outcome.accepted).sum()),
        )

    def _by_rank(self, drafts: DraftBatch, nodes: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(drafts.ranks[nodes], minlength=self._max_budget).astype(np.float64)

    def _of_class(self, drafter: str, name: str) -> Prospects:
        counts = self._counts.get(drafter, {ALL: _Counts.none(self._max_budget)})
        guess = np.power(counts[ALL].alpha, np.arange(1.0, self._max_budget + 1))
        gains, fills = _blend(counts[ALL], guess, np.ones(self._max_budget))
        if name in counts:
            gains, fills = _blend(counts[name], gains, fills)
        return Prospects(np.minimum.accumulate(gains), np.minimum(fills, 1.0))


def _blend(
    counts: _Counts, gains: NDArray[np.float64], fills: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What was counted, with what to expect otherwise as a prior: first of neighbours together, then of each rank."""
    starts = (
        2 ** np.arange(len(gains).bit_length()) - 1
    )  # 0, 1, 3, 7, …: ranks of a neighbourhood differ by up to twice
    sizes = np.diff(np.append(starts, len(gains)))

    def blend(counted: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
        asked, seen = np.add.reduceat(counts.asked, starts), np.add.reduceat(counted, starts)
        mean = np.add.reduceat(expected, starts) / sizes
        nearby = np.repeat((seen + PRIOR_WEIGHT * mean) / (asked + PRIOR_WEIGHT), sizes)
        return (counted + PRIOR_WEIGHT * nearby) / (counts.asked + PRIOR_WEIGHT)

    return blend(counts.accepted, gains), blend(counts.proposed, fills)
