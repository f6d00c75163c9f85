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
WORTHS = np.array([1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10])
"""Where what nodes are worth is divided into parts."""
TRUST = 2.0
"""Nodes that were accepted as often as their drafter says they would be, for each part."""
ASKED_LATELY = 0.5
"""Weight of a round about 70 rounds ago."""


class _Counts:
    """Weighted, side by side so that all are added at once: of rounds by rank, asked for, proposed and accepted
    [max_budget] each, then first children that were judged, and those of them that were accepted."""

    __slots__ = ("accepted", "asked", "firsts", "proposed", "values")

    def __init__(self, max_budget: int) -> None:
        self.values = np.zeros(3 * max_budget + 2)
        self.asked, self.proposed, self.accepted = self.values[:-2].reshape(3, max_budget)
        self.firsts = self.values[-2:]

    def add(self, more: NDArray[np.float64], rounds: int) -> None:
        self.values *= FORGETTING**rounds
        self.values += more

    @property
    def alpha(self) -> float:
        judged, accepted = self.firsts.tolist()
        return float(accepted + PRIOR_WEIGHT * GUESS) / float(judged + PRIOR_WEIGHT)


@dataclass(slots=True)
class _Worths:
    """Of nodes by what their drafter took them to be worth [parts of the range]: the sum of that, and how many were
    accepted. Weighted."""

    expected: NDArray[np.float64]
    accepted: NDArray[np.float64]

    @classmethod
    def none(cls) -> _Worths:
        return cls(np.zeros(len(WORTHS) + 1), np.zeros(len(WORTHS) + 1))

    def add(self, worths: NDArray[np.float64], accepted: NDArray[np.bool_], rounds: int) -> None:
        parts, kept = WORTHS.searchsorted(worths), FORGETTING**rounds
        self.expected = kept * self.expected + np.bincount(parts, worths, len(self.expected))
        self.accepted = kept * self.accepted + np.bincount(parts, accepted, len(self.accepted))

    def corrected(self, worths: NDArray[np.float64]) -> NDArray[np.float64]:
        ratios = (self.accepted + TRUST) / (self.expected + TRUST)
        found: NDArray[np.float64] = np.minimum(worths * ratios[WORTHS.searchsorted(worths)], 1.0)
        return found


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
        self._worths: dict[str, _Worths] = {}  # by drafter

    def observe(self, drafts: DraftBatch, outcome: Outcome, asked: NDArray[np.int64], classes: Sequence[str]) -> None:
        """A round of some requests of classes[r] with budgets of asked[r] draft tokens, or more where they had more."""
        asked = np.maximum(asked, drafts.lengths)
        by_class = self._counts.setdefault(drafts.drafter, {ALL: _Counts(self._max_budget)})
        if drafts.confidence is not None:
            worths = self._worths.setdefault(drafts.drafter, _Worths.none())
            worths.add(drafts.path_products(drafts.confidence), outcome.accepted, len(classes))
        of_request = np.array(classes)
        everyone = np.ones(len(classes), np.bool_)
        counted = self._count(drafts, outcome, asked, everyone)
        by_class[ALL].add(counted, len(classes))
        for name in set(classes):
            if name not in by_class and len(by_class) <= MAX_CLASSES:
                by_class[name] = _Counts(self._max_budget)
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

    def worths(self, drafter: str, said: NDArray[np.float64]) -> NDArray[np.float64]:
        """[nodes] the probability that each is accepted: what the drafter says it is, by how often that was right."""
        worths = self._worths.get(drafter)
        return said if worths is None else worths.corrected(said)

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
    ) -> NDArray[np.float64]:
        """What _Counts counts, of the requests that are true in `which`."""
        if drafts.shape is not None:
            return drafts.shape.count_ranks(drafts.offsets, outcome.accepted, asked, which, self._max_budget)
        of_these = which[drafts.request_of]
        reached = np.append(outcome.accepted, True)[drafts.parent_nodes]  # the last is ROOT's
        firsts = of_these & reached & (drafts.sibling_ranks == 0)
        by_rank = (
            np.bincount(drafts.ranks[n], minlength=self._max_budget) for n in (of_these, of_these & outcome.accepted)
        )
        counted = ((asked[which, None] > np.arange(self._max_budget)).sum(0), *by_rank)
        return np.array([*np.concatenate(counted), firsts.sum(), (firsts & outcome.accepted).sum()], np.float64)

    def _of_class(self, drafter: str, name: str) -> Prospects:
        counts = self._counts.get(drafter, {ALL: _Counts(self._max_budget)})
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
