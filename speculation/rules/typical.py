"""Typical acceptance (Medusa, arXiv:2401.10774). Lossy: accept x if p(x) > min(epsilon, delta exp(-H(p))), whatever it
was drawn from; of the nodes that are accepted with all above them the deepest ends the path, the first among equals.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.protocols import Dice
from speculation.rounds import Outcome, TargetRows
from speculation.rules.walk import NO_NODE, Sight, Verdict, verify_by
from speculation.tree import DraftBatch

EPSILON = 0.3
DELTA = 0.09


def verify(drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:
    return verify_by(_judge, drafts, rows, dice)


def _judge(sight: Sight) -> Verdict:
    drafts = sight.drafts
    ends = _deepest(drafts, drafts.path_products(_is_typical(sight)) > 0)
    accepted = np.zeros(drafts.num_nodes + 1, np.bool_)  # the last is that of NO_NODE
    accepted[drafts.paths[ends[ends != NO_NODE]]] = True
    rows = np.where(ends == NO_NODE, drafts.root_rows, np.append(drafts.rows, 0)[ends])
    depths = np.append(drafts.depths, 0)[ends] + 1
    requests = np.arange(drafts.num_requests)
    return accepted[:-1], sight.dice.draw(requests, depths, sight.law(requests, rows))


def _is_typical(sight: Sight) -> NDArray[np.bool_]:
    """[nodes] whether each would be accepted after its parent."""
    drafts = sight.drafts
    judges, judged_by = np.unique(drafts.parent_rows, return_inverse=True)
    requests = np.searchsorted(drafts.root_rows, judges, side="right") - 1
    laws = sight.law(requests, judges)
    entropy = torch.special.entr(laws).sum(-1)
    least = (DELTA * torch.exp(-entropy)).clamp(max=EPSILON)
    nodes = torch.from_numpy(judged_by), torch.from_numpy(drafts.tokens)
    return (laws[nodes] > least[nodes[0]]).cpu().numpy()


def _deepest(drafts: DraftBatch, reached: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[requests] the deepest of the nodes that are reached, the first among equals, or NO_NODE."""
    ends = np.full(drafts.num_requests, NO_NODE, np.int64)
    nodes = np.flatnonzero(reached)[::-1]
    nodes = nodes[np.argsort(drafts.depths[nodes], kind="stable")]
    ends[drafts.request_of[nodes]] = nodes  # of several for a request the last is kept
    return ends
