"""Which nodes of drafted trees are worth a row (DySpec, arXiv:2410.11744: a tree is grown greedily, always by the node
that is most likely to be accepted), over all requests of a draft at once.

What a node is worth is the probability that the walk comes to it. For POINT_MASS that of its whole path, itself
included. A node that was drawn must be chosen without regard to what it is, so there it is the probability to come as
far as trying it: that all above it are accepted and its elder siblings are not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from speculation.laws import SAMPLED
from speculation.tree import DraftBatch


def grow(drafts: DraftBatch, confidence: NDArray[np.float32], count: int) -> DraftBatch:
    """The `count` nodes that are worth most, by the drafter's `confidence`. A node is worth no more than its parent,
    nor one that was drawn than an elder sibling, so they are trees."""
    worth = _worth(drafts, confidence)
    return drafts.only(np.sort(np.argsort(-worth, kind="stable")[:count]))


def _worth(drafts: DraftBatch, confidence: NDArray[np.float32]) -> NDArray[np.float64]:
    """[nodes]"""
    accepted = drafts.path_products(confidence)
    if drafts.law not in SAMPLED:
        return accepted
    above = np.append(accepted, 1.0)[drafts.parent_nodes]
    worth: NDArray[np.float64] = above * drafts.path_products(_elders_rejected(drafts, confidence))
    return worth


def _elders_rejected(drafts: DraftBatch, confidence: NDArray[np.float32]) -> NDArray[np.float64]:
    """[nodes] probability that none of the siblings drawn before is accepted."""
    rejected = np.ones(drafts.num_nodes)
    for rank in range(1, int(drafts.sibling_ranks.max(initial=0)) + 1):
        at = np.flatnonzero(drafts.sibling_ranks[drafts.children] == rank)
        nodes, elders = drafts.children[at], drafts.children[at - 1]
        rejected[nodes] = rejected[elders] * (1.0 - confidence[elders])
    return rejected
