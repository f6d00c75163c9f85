"""Growing the trees of all requests at once, level by level, by what continuations are worth.

The worth of a node is the probability that its whole path is accepted: the product of the chances along it. It falls
along a path, so the tree of the most expected tokens under a budget is the budget's worthiest nodes (arXiv:2410.11744
grows it one node at a time), and a node that is not among those found so far never will be: its children need not be
looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.contexts import extended
from speculation.laws import DraftLaw
from speculation.tree import ROOT, DraftBatch, offsets_of

LEAST_WORTH = 1e-3
"""A node that is accepted more seldom is never worth its row."""
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Branches:
    """Continuations of n contexts, in any number each. No context has a token twice."""

    contexts: NDArray[np.int64]  # [branches] below n
    tokens: NDArray[np.int64]  # [branches]
    chances: NDArray[np.float32]  # [branches] at most 1


Continue = Callable[[NDArray[np.int64], NDArray[np.int64]], Branches]
"""What may follow windows [n, width] of requests [n]."""


@dataclass(frozen=True, slots=True)
class _Level:
    nodes: NDArray[np.int64]  # [n] numbers among all nodes; ROOT
    requests: NDArray[np.int64]
    worths: NDArray[np.float32]
    windows: NDArray[np.int64]  # [n, width]


class _Forest:
    """All nodes found so far, parents first."""

    def __init__(self, budgets: NDArray[np.int64], floor: float) -> None:
        self.budgets = budgets
        self.bars = np.full(len(budgets), max(floor, LEAST_WORTH), np.float32)
        """[requests] less than this a further node may not be worth."""
        self.tokens = self.parents = self.requests = np.empty(0, np.int64)
        self.worths = self.chances = np.empty(0, np.float32)

    def add(self, level: _Level, branches: Branches) -> _Level:
        """The next level: those that belong to the best trees found so far."""
        requests, worths = level.requests[branches.contexts], level.worths[branches.contexts] * branches.chances
        kept = np.flatnonzero(worths >= self.bars[requests])
        above, requests, tokens = branches.contexts[kept], requests[kept], branches.tokens[kept]
        first = len(self.tokens)
        self.tokens = np.concatenate([self.tokens, tokens])
        self.parents = np.concatenate([self.parents, level.nodes[above]])
        self.requests = np.concatenate([self.requests, requests])
        self.worths = np.concatenate([self.worths, worths[kept]])
        self.chances = np.concatenate([self.chances, branches.chances[kept]])
        best = self.best()
        new = np.sort(best[best >= first])
        above = above[new - first]
        return _Level(new, self.requests[new], self.worths[new], extended(level.windows[above], self.tokens[new]))

    def best(self) -> NDArray[np.int64]:
        """The nodes of the best trees under the budgets, by request and worth; of equals, parents first."""
        order = np.lexsort((-self.worths, self.requests))
        requests = self.requests[order]
        ranks = np.arange(len(order)) - np.searchsorted(requests, requests)
        last = order[ranks == self.budgets[requests] - 1]
        self.bars[self.requests[last]] = self.worths[last]
        return order[ranks < self.budgets[requests]]

    def harvest(self, law: DraftLaw, drafter: str) -> DraftBatch:
        best = self.best()
        offsets = offsets_of(np.bincount(self.requests[best], minlength=len(self.budgets)))
        place = np.full(len(self.tokens) + 1, ROOT, np.int64)  # the last is that of ROOT
        place[best] = np.arange(len(best)) - offsets[self.requests[best]]
        parents = place[self.parents[best]]
        return DraftBatch(self.tokens[best], parents, offsets, law, drafter, confidence=self.chances[best])


def grow(
    follow: Continue,
    windows: NDArray[np.int64],
    budgets: NDArray[np.int64],
    floor: float,
    *,
    branches: bool,
    law: DraftLaw,
    drafter: str,
) -> DraftBatch:
    """The best trees of at most budgets[r] nodes after windows [requests, width], none worth less than `floor`; chains
    unless there may be `branches`."""
    forest = _Forest(budgets, floor)
    some = np.flatnonzero(budgets > 0)
    level = _Level(np.full(len(some), ROOT), some, np.ones(len(some), np.float32), windows[some])
    for _ in range(min(int(budgets.max(initial=0)), MAX_DEPTH)):
        found = follow(level.requests, level.windows)
        level = forest.add(level, found if branches else _first(found))
        if not len(level.nodes):
            break
    return forest.harvest(law, drafter)


def _first(branches: Branches) -> Branches:
    """The likeliest of each context."""
    order = np.lexsort((-branches.chances, branches.contexts))
    contexts = branches.contexts[order]
    order = order[np.flatnonzero(np.diff(contexts, prepend=-1))]
    return Branches(branches.contexts[order], branches.tokens[order], branches.chances[order])
