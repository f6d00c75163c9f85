"""k independent drafts (SpecTr, arXiv:2310.15141, k-SEQ).

Of the k children of a node, all drawn from q, accept each in turn with min(1, p / (rho q)). None is accepted with
probability (1 - beta)^k, where beta = sum min(q, p / rho), and then the token is drawn from

    p - min(q, p / rho) (1 - (1 - beta)^k) / beta

which is nowhere negative if (1 - (1 - beta)^k) / beta <= rho. rho = k always is large enough; the least there is
accepts most.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InternalError
from speculation.laws import DraftLaw
from speculation.protocols import Dice
from speculation.qlaw import QLaw, on_host
from speculation.rounds import Outcome, TargetRows
from speculation.rules.walk import Level, Sight, Verdict, column, go_down, ratio, residual, verify_by
from speculation.tree import DraftBatch

_HALVINGS = 6
"""Of the interval [1, k] in which rho is looked for. Every rho that can come out is valid."""


def verify(drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:
    return verify_by(_judge, drafts, rows, dice)


def _judge(sight: Sight) -> Verdict:
    return go_down(sight, _try_children)


def _try_children(level: Level, which: NDArray[np.int64]) -> None:
    drafts = level.sight.drafts
    if drafts.q is None:
        raise InternalError(f"drafter {drafts.drafter} proposed no {DraftLaw.IID} draft to rule k_seq")
    rho = np.ones(len(which))
    many = np.flatnonzero(level.num_children[which] > 1)
    rho[many] = _least_rho(level, which[many], drafts.q)
    tried = 0
    while len(which):
        childless = level.num_children[which] == tried
        _draw_residual(level, which[childless], drafts.q, rho[childless])
        which, rho = which[~childless], rho[~childless]
        nodes = level.children(which, tried)
        tokens = drafts.tokens[nodes]
        chances = ratio(level.chances(which, tokens), rho * drafts.q.of(nodes, tokens))
        lost = ~level.accept(which, tried, nodes, chances)
        which, rho = which[lost], rho[lost]
        tried += 1


def _draw_residual(level: Level, which: NDArray[np.int64], q: QLaw, rho: NDArray[np.float64]) -> None:
    laws = level.law(which)
    proposals = q.proposals(level.children(which, 0), laws)
    accepting = torch.minimum(proposals.probs, proposals.at_columns(laws) / column(rho, laws))
    factor = _factor(accepting.sum(-1, keepdim=True), column(level.num_children[which], laws))
    level.draw(which, residual(laws, accepting * factor, proposals))


def _least_rho(level: Level, which: NDArray[np.int64], q: QLaw) -> NDArray[np.float64]:
    """[which] valid ones, by bisection."""
    laws = level.law(which)
    proposals = q.proposals(level.children(which, 0), laws)
    p, k = proposals.at_columns(laws), column(level.num_children[which], laws)
    low, high = torch.ones_like(k), k
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        valid = _factor(torch.minimum(proposals.probs, p / middle).sum(-1, keepdim=True), k) <= middle
        low, high = low.where(valid, middle), middle.where(valid, high)
    return on_host(high[:, 0])


def _factor(beta: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(1 - (1 - beta)^k) / beta, which is k at 0."""
    return ((1 - (1 - beta) ** k) / beta).where(beta > 0, k)
