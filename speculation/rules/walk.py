"""What the rules share: following drawn tokens, and going down a tree level by level for all requests at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.protocols import Dice
from speculation.qlaw import Proposals, on_host
from speculation.rounds import Outcome, TargetRows
from speculation.tree import DraftBatch

NO_NODE = -1

Verdict = tuple[NDArray[np.bool_], NDArray[np.int64]]
"""Which nodes are accepted [nodes], and the target's own token for each request [requests]."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A draft together with the target's law in each of its rows; requests that have no law are not among these."""

    drafts: DraftBatch
    laws: torch.Tensor  # [some rows, vocab]
    law_starts: NDArray[np.int64]  # [requests]
    dice: Dice

    def law_rows(self, requests: NDArray[np.int64], rows: NDArray[np.int64]) -> torch.Tensor:
        """[n] where in `laws` the law of each row is; rows are numbered as by DraftBatch.rows."""
        return torch.from_numpy(self.law_starts[requests] + rows - self.drafts.root_rows[requests]).to(self.laws.device)

    def law(self, requests: NDArray[np.int64], rows: NDArray[np.int64]) -> torch.Tensor:
        """[n, vocab] in memory of its own."""
        return self.laws[self.law_rows(requests, rows)]


def verify_by(judge: Callable[[Sight], Verdict], drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:
    """`judge` for the requests that have laws. Those without follow their tokens: where the target's law is a point
    mass every rule here comes down to that."""
    if rows.laws is None or rows.law_starts is None or (rows.law_starts < 0).all():
        return Outcome.of(drafts, *follow(drafts, rows.tokens))
    random = rows.law_starts >= 0
    if random.all():
        return Outcome.of(drafts, *judge(Sight(drafts, rows.laws, rows.law_starts, dice)))
    accepted, last = follow(drafts, rows.tokens)
    some = np.flatnonzero(random)
    sight = Sight(drafts.select(some), rows.laws, rows.law_starts[some], dice.select(some))
    accepted[random[drafts.request_of]], last[random] = judge(sight)
    return Outcome.of(drafts, accepted, last)


def follow(drafts: DraftBatch, tokens: NDArray[np.int64]) -> Verdict:
    """From each root to the child that is the token [rows] in its row, the first among equals, and so on. The token
    of the row where there is none is the target's own."""
    if drafts.shape is not None:
        return drafts.shape.follow(drafts.tokens, drafts.offsets, tokens)
    matching = np.flatnonzero(drafts.tokens == tokens[drafts.parent_rows])[::-1]
    following = np.full(drafts.num_rows, NO_NODE, np.int64)
    following[drafts.parent_rows[matching]] = matching
    accepted = np.zeros(drafts.num_nodes, np.bool_)
    rows, going = drafts.root_rows.copy(), np.arange(drafts.num_requests)
    while len(going):
        nodes = following[rows[going]]
        going, nodes = going[nodes != NO_NODE], nodes[nodes != NO_NODE]
        accepted[nodes] = True
        rows[going] = drafts.rows[nodes]
    return accepted, tokens[rows]


class Level:
    """One level on the way down: the node that each of some requests has come to, whose children a rule tries in draw
    order. `which` are indices into `requests`."""

    def __init__(self, sight: Sight, requests: NDArray[np.int64], rows: NDArray[np.int64], depth: int) -> None:
        starts = sight.drafts.child_starts
        self.sight = sight
        self.requests = requests
        self.rows = rows  # of the nodes come to
        self.depth = depth  # of their children
        self.num_children = starts[rows + 1] - starts[rows]
        self.taken = np.full(len(requests), NO_NODE, np.int64)
        self.last = np.empty(len(requests), np.int64)

    def children(self, which: NDArray[np.int64], tried: int) -> NDArray[np.int64]:
        """[which] the node that comes after `tried` others."""
        drafts = self.sight.drafts
        return drafts.children[drafts.child_starts[self.rows[which]] + tried]

    def law(self, which: NDArray[np.int64]) -> torch.Tensor:
        """[which, vocab] the target's, after the nodes come to; in memory of its own."""
        return self.sight.law(self.requests[which], self.rows[which])

    def chances(self, which: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """[which] the target's probability of one token each, after the nodes come to."""
        columns = torch.from_numpy(tokens).to(self.sight.laws.device)
        return on_host(self.sight.laws[self.sight.law_rows(self.requests[which], self.rows[which]), columns])

    def accept(
        self, which: NDArray[np.int64], tried: int, nodes: NDArray[np.int64], chances: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """[which] whether each of `nodes`, tried after `tried` others, is where its request goes on."""
        requests = self.requests[which]
        depths, tries = np.full(len(which), self.depth), np.full(len(which), tried)
        accepted = self.sight.dice.accept(requests, depths, tries, chances)
        self.taken[which[accepted]] = nodes[accepted]
        return accepted

    def draw(self, which: NDArray[np.int64], laws: torch.Tensor) -> None:
        """Ends the paths of `which` by a token from laws [which, vocab]."""
        if len(which):
            self.last[which] = self.sight.dice.draw(self.requests[which], np.full(len(which), self.depth), laws)


def go_down(sight: Sight, try_children: Callable[[Level, NDArray[np.int64]], None]) -> Verdict:
    """`try_children` accepts a child for each of the requests of a level that it is given, or draws their last token.
    After a node without children that comes from the target's law there."""
    drafts = sight.drafts
    accepted, last = np.zeros(drafts.num_nodes, np.bool_), np.empty(drafts.num_requests, np.int64)
    rows, going, depth = drafts.root_rows, np.arange(drafts.num_requests), 1
    while len(going):
        level = Level(sight, going, rows, depth)
        leaves = np.flatnonzero(level.num_children == 0)
        level.draw(leaves, level.law(leaves))
        try_children(level, np.flatnonzero(level.num_children > 0))
        on = level.taken != NO_NODE
        last[going[~on]] = level.last[~on]
        accepted[level.taken[on]] = True
        rows, going, depth = drafts.rows[level.taken[on]], going[on], depth + 1
    return accepted, last


def residual(laws: torch.Tensor, amounts: torch.Tensor, proposals: Proposals) -> torch.Tensor:
    """norm((laws - amounts)+), where `amounts` [n, columns] are at the columns of `proposals`. Where nothing is left,
    which only rounding can do to a law that something was rejected by, `laws`."""
    left = proposals.taken_from(laws, amounts)
    total = left.sum(-1, keepdim=True)
    return (left / total).where(total > 0, laws)


def ratio(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """p / q, and 0 where q is: what q can't have drawn is not accepted."""
    return np.divide(p, q, out=np.zeros_like(p), where=q > 0)


def column(values: NDArray[np.float64] | NDArray[np.int64], like: torch.Tensor) -> torch.Tensor:
    """[n, 1]"""
    return torch.from_numpy(values)[:, None].to(like)


def chances_of(laws: torch.Tensor, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n] the probability of one token for each of laws [n, vocab]."""
    columns = torch.from_numpy(tokens).to(laws.device)[:, None]
    return on_host(laws.gather(1, columns)[:, 0])


def pick(laws: torch.Tensor, which: NDArray[np.bool_]) -> torch.Tensor:
    """The rows where `which` is true."""
    return laws if which.all() else laws[torch.from_numpy(which).to(laws.device)]
