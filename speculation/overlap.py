"""How much of the target's law a drafter's has: alpha = E[sum over x of min(p(x), q(x))].

Taken where a draft was judged: at its root and at each accepted node that has children, for what the first of these was
drawn from. What was not drawn is a point mass, of which that is p(x). It depends on the two laws and on nothing that
was drawn by them, nor on the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.qlaw import on_host
from speculation.rounds import Outcome, TargetRows
from speculation.tree import DraftBatch

MOST = 8
"""Positions of a step at which two whole laws are compared, in equal distances: that takes as long as to judge them."""


@dataclass(frozen=True, slots=True)
class Overlap:
    total: float
    """Of sum min(p, q) over the positions."""
    positions: int


def overlap(drafts: DraftBatch, rows: TargetRows, outcome: Outcome, greedy: NDArray[np.bool_]) -> Overlap:
    """`greedy` [requests]. Requests that are verified by the token y that the target drew show no p: for a point mass
    it stands in that y is x, which is so with p(x); what was drawn from a q of its own says nothing then and is left
    out, unless the request is greedy and p a point mass as well."""
    reached = np.append(outcome.accepted, True)[drafts.parent_nodes]  # the last is ROOT's
    firsts = np.flatnonzero(reached & (drafts.sibling_ranks == 0))
    with_law = np.zeros(drafts.num_requests, np.bool_) if rows.law_starts is None else rows.law_starts >= 0
    lawful = with_law[drafts.request_of[firsts]]
    chances = [_by_tokens(drafts, rows, firsts[~lawful], greedy)]
    if rows.laws is not None and lawful.any():
        chances.append(_by_laws(drafts, rows, rows.laws, firsts[lawful]))
    return Overlap(float(sum(of.sum() for of in chances)), sum(map(len, chances)))


def _by_tokens(
    drafts: DraftBatch, rows: TargetRows, firsts: NDArray[np.int64], greedy: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """One number for each of `firsts` that says something."""
    if drafts.q is None:
        same: NDArray[np.bool_] = drafts.tokens[firsts] == rows.tokens[drafts.parent_rows[firsts]]
        return same.astype(np.float64)
    firsts = firsts[greedy[drafts.request_of[firsts]]]
    said = rows.tokens[drafts.parent_rows[firsts]]
    return drafts.q.of(firsts, np.maximum(said, 0)) * (said >= 0)


def _by_laws(
    drafts: DraftBatch, rows: TargetRows, laws: torch.Tensor, firsts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[firsts], of which those that are not looked at are taken to be like the others."""
    assert rows.law_starts is not None
    requests, judges = drafts.request_of[firsts], drafts.parent_rows[firsts]
    places = torch.from_numpy(rows.law_starts[requests] + judges - drafts.root_rows[requests]).to(laws.device)
    if drafts.q is None:
        return on_host(laws[places, torch.from_numpy(drafts.tokens[firsts]).to(laws.device)])
    apart = -(-len(firsts) // MOST)
    p = laws[places[::apart]]
    proposals = drafts.q.proposals(firsts[::apart], p)
    shared = on_host(torch.minimum(proposals.probs, proposals.at_columns(p)).sum(-1))
    return np.full(len(firsts), shared.mean())
