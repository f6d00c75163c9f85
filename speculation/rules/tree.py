"""Rejection down a tree (RSD, arXiv:2402.14160; with independent siblings SpecInfer, arXiv:2305.09781).

Of the children of a node, in the order in which they were drawn: accept x if u < p(x) / q(x), else

    p <- norm((p - q)+)         and without replacement also     q(x) <- 0,  q <- norm(q)

None accepted: the token is drawn from the p that is left. A child that was not drawn is one drawn from a point mass of
its own, so it is accepted with p(x) and its rejection takes it out of p.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.laws import DraftLaw
from speculation.protocols import Dice
from speculation.qlaw import Proposals
from speculation.rounds import Outcome, TargetRows
from speculation.rules.walk import Level, Sight, Verdict, chances_of, go_down, pick, ratio, residual, verify_by
from speculation.tree import DraftBatch


def verify(drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:
    return verify_by(_judge, drafts, rows, dice)


def _judge(sight: Sight) -> Verdict:
    return go_down(sight, _try_children)


def _try_children(level: Level, which: NDArray[np.int64]) -> None:
    """The first try needs p(x) and q(x) only: whole laws are looked at after a rejection."""
    drafts, tokens = level.sight.drafts, level.sight.drafts.tokens
    nodes = level.children(which, 0)
    q = np.ones(len(nodes)) if drafts.q is None else drafts.q.of(nodes, tokens[nodes])
    lost = ~level.accept(which, 0, nodes, ratio(level.chances(which, tokens[nodes]), q))
    which, nodes = which[lost], nodes[lost]
    laws = level.law(which)
    proposals = Proposals.on(tokens[nodes], laws) if drafts.q is None else drafts.q.proposals(nodes, laws)
    tried = 1
    while len(which):
        laws = residual(laws, proposals.probs, proposals)
        childless = level.num_children[which] == tried
        level.draw(which[childless], pick(laws, childless))
        which, laws = which[~childless], pick(laws, ~childless)
        rejected, nodes = nodes[~childless], level.children(which, tried)
        proposals = _next(drafts, proposals[~childless], tokens[rejected], tokens[nodes], laws)
        chances = ratio(chances_of(laws, tokens[nodes]), proposals.of(tokens[nodes]))
        lost = ~level.accept(which, tried, nodes, chances)
        which, nodes, laws, proposals = which[lost], nodes[lost], pick(laws, lost), proposals[lost]
        tried += 1


def _next(
    drafts: DraftBatch,
    before: Proposals,
    rejected: NDArray[np.int64],
    tokens: NDArray[np.int64],
    like: torch.Tensor,
) -> Proposals:
    """What `tokens` were drawn from, siblings of `rejected` that came from `before`."""
    if drafts.law is DraftLaw.POINT_MASS:
        return Proposals.on(tokens, like)
    return before.without(rejected) if drafts.law is DraftLaw.WITHOUT_REPLACEMENT else before
