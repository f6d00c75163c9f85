"""Tree search for the draft trees of all requests: simulations that go down together, shared out by the PUCT score.

A request has as many simulations as its budget has nodes. Of those that reach a node one stays, which makes it part of
the tree, and the others go on, one after the other to the branch a with the highest

    Q(a) + EXPLORATION P(a) sqrt(N) / (1 + N(a))

where P(a) is the probability of the branch, N(a) how many have taken it, and N how many share out. Q(a) is what is
gained by it, which is known before anybody goes: P(a) again. So likely branches are followed far, and others are
looked at in proportion. As the score of a branch depends on its own N(a) only, the shares come from one sort. Those
that find nothing to go on with are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.contexts import extended
from speculation.drafters.nodes import LEAST_WORTH, Nodes
from speculation.laws import DraftLaw
from speculation.tree import ROOT, DraftBatch, ranges

EXPLORATION = np.float32(3.0)

Expand = Callable[[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int32], NDArray[np.float32]]]
"""What may follow windows [n, width] of requests [n]: [n, branches] tokens and their probabilities, 0 where there is
none."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where simulations go on from."""

    nodes: NDArray[np.int64]  # [n] numbers among all nodes; ROOT
    requests: NDArray[np.int64]
    worths: NDArray[np.float32]
    windows: NDArray[np.int64]  # [n, width]
    simulations: NDArray[np.int64]


def search(
    expand: Expand,
    windows: NDArray[np.int64],
    budgets: NDArray[np.int64],
    floor: float,
    *,
    law: DraftLaw,
    drafter: str,
) -> DraftBatch:
    """Trees of at most budgets[r] nodes after windows [requests, width], none accepted more seldom than `floor`."""
    least = np.float32(max(floor, LEAST_WORTH))
    some = np.flatnonzero(budgets > 0)
    places = _Places(np.full(len(some), ROOT), some, np.ones(len(some), np.float32), windows[some], budgets[some])
    levels: list[Nodes] = []
    while len(places.nodes):
        tokens, priors = expand(places.requests, places.windows)
        priors = np.where(priors * places.worths[:, None] >= least, priors, np.float32(0))
        visits = share_out(priors, places.simulations)
        at = above, _ = visits.nonzero()
        worths = places.worths[above] * priors[at]
        first = sum(map(len, levels))
        levels.append(
            Nodes(tokens[at].astype(np.int64), places.nodes[above], places.requests[above], worths, priors[at])
        )
        on = (visits[at] > 1).nonzero()[0]
        places = _Places(
            first + on,
            levels[-1].requests[on],
            worths[on],
            extended(places.windows[above[on]], levels[-1].tokens[on]),
            visits[at][on] - 1,
        )
    return Nodes.joined(levels).trees(budgets, law, drafter)


def share_out(priors: NDArray[np.float32], simulations: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, branches] how many of simulations [n] take each branch, by priors [n, branches]; none one of 0."""
    branches = priors.shape[1]
    likely = priors.reshape(-1).nonzero()[0]
    counts = simulations.repeat(branches)[likely]
    each = likely.repeat(counts)  # every branch as often as it might be taken
    times = ranges(np.ones(len(likely), np.int64), counts)
    whose = each // branches
    scores = priors.reshape(-1)[each] * (1 + EXPLORATION * np.sqrt(simulations[whose], dtype=np.float32) / times)
    order = np.lexsort((-scores, whose))
    whose = whose[order]
    taken = each[order[np.arange(len(order)) - whose.searchsorted(whose) < simulations[whose]]]
    return np.bincount(taken, minlength=priors.size).reshape(priors.shape)
