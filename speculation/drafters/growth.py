"""Growing the trees of all requests at once, level by level.

The tree of the most expected tokens under a budget is the budget's worthiest nodes. DySpec (arXiv:2410.11744) finds
them one at a time; here a level is found at a time, and only below nodes that are among the worthiest so far, as no
other can come to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.contexts import extended
from speculation.drafters.nodes import LEAST_WORTH, Nodes
from speculation.laws import DraftLaw
from speculation.tree import ROOT, DraftBatch

MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Branches:
    """Continuations of n windows, in any number each. No window has a token twice."""

    windows: NDArray[np.int64]  # [branches] below n
    tokens: NDArray[np.int64]  # [branches]
    chances: NDArray[np.float32]  # [branches] at most 1


Follow = Callable[[NDArray[np.int64], NDArray[np.int64]], Branches]
"""What may follow windows [n, width] of requests [n]."""


@dataclass(frozen=True, slots=True)
class Level:
    """Where trees go on."""

    nodes: NDArray[np.int64]  # [n] numbers among all; ROOT
    requests: NDArray[np.int64]
    worths: NDArray[np.float32] | NDArray[np.float64]
    windows: NDArray[np.int64]  # [n, width]
    above: NDArray[np.int64]  # [n] the places of their parents in the level before; of the first, their own


FollowLevel = Callable[[Level], Branches]
"""What may follow the nodes of a level. Levels come one after the other, from that of the roots on."""


class _Forest:
    def __init__(self, budgets: NDArray[np.int64], floor: float) -> None:
        self.nodes = Nodes.joined([])
        self._budgets = budgets
        self._bars = np.full(len(budgets), max(floor, LEAST_WORTH), np.float32)  # what a further node must be worth

    def add(self, level: Level, branches: Branches) -> Level:
        """Those branches that belong to the best trees so far; where to go on."""
        requests, worths = level.requests[branches.windows], level.worths[branches.windows] * branches.chances
        kept = (worths >= self._bars[requests]).nonzero()[0]
        above = branches.windows[kept]
        first = len(self.nodes)
        new = Nodes(branches.tokens[kept], level.nodes[above], requests[kept], worths[kept], branches.chances[kept])
        self.nodes = Nodes.joined([self.nodes, new])
        best = self._best()
        best = best[best >= first]
        on = best - first
        windows = extended(level.windows[above[on]], new.tokens[on])
        return Level(best, new.requests[on], new.worths[on], windows, above[on])

    def _best(self) -> NDArray[np.int64]:
        order, ranks = self.nodes.ranked()
        budgets = self._budgets[self.nodes.requests[order]]
        last = order[ranks == budgets - 1]
        self._bars[self.nodes.requests[last]] = self.nodes.worths[last]
        return order[ranks < budgets]


def grow(
    follow: Follow,
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

    def after(level: Level) -> Branches:
        return follow(level.requests, level.windows)

    return grow_levels(after, windows, budgets, floor, branches=branches, law=law, drafter=drafter)


def grow_levels(
    follow: FollowLevel,
    windows: NDArray[np.int64],
    budgets: NDArray[np.int64],
    floor: float,
    *,
    branches: bool,
    law: DraftLaw,
    drafter: str,
    depth: int = MAX_DEPTH,
    least: float = 0.0,
) -> DraftBatch:
    """As `grow`, for what has to be computed level by level. None is asked for beyond `depth`, nor below a level whose
    nodes are not worth `least` together: more than that a further one can't be."""
    forest = _Forest(budgets, floor)
    some = np.flatnonzero(budgets > 0)
    level = Level(np.full(len(some), ROOT), some, np.ones(len(some), np.float32), windows[some], np.arange(len(some)))
    for _ in range(min(int(budgets.max(initial=0)), depth)):
        found = follow(level)
        level = forest.add(level, found if branches else _first(found))
        if not len(level.nodes) or level.worths.sum() < least:
            break
    return forest.nodes.trees(budgets, law, drafter)


def _first(branches: Branches) -> Branches:
    """The likeliest of each window."""
    order = np.lexsort((-branches.chances, branches.windows))
    windows = branches.windows[order]
    order = order[np.flatnonzero(np.diff(windows, prepend=-1))]
    return Branches(branches.windows[order], branches.tokens[order], branches.chances[order])
