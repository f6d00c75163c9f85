"""Token trees that are drawn from a draft model's law, for rules that compare it with the target's.

Which nodes are drawn must not depend on what is drawn, so the tree has the same shape for all: the best one if each
try at a token is accepted with the same probability, in the manner of Sequoia (arXiv:2402.12374). A chain is the case
of one try. Tokens come from the likeliest ones of each law, and q is that law, cut to them and scaled back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.sampler import GREEDY_TEMPERATURE
from speculation.dice import draft_uniforms
from speculation.drafters.draft_model_steps import Nodes
from speculation.drafters.prefixes import LONGEST
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import DraftRequest
from speculation.tree import ROOT, DraftBatch, offsets_of

ACCEPTED = 0.7
"""Of each try at a token, on average; the shape hardly depends on it."""
SUPPORT = 64
"""Tokens of a law that can be drawn. What it leaves out is seldom accepted and would cost a vocabulary per node."""

Logits = Callable[[Nodes], torch.Tensor]
"""[n, vocab] after nodes of a level; the levels come one after the other."""


class Shape:
    """The nodes of the largest tree in the order of what they are worth; the first k are the tree of k nodes."""

    def __init__(self, size: int, *, branches: bool) -> None:
        parents, worths = _best(size, branches=branches)
        size = len(parents)
        tree = DraftBatch(np.zeros(size, np.int64), parents, np.array([0, size]), DraftLaw.POINT_MASS, "")
        self.parents, self.worths = parents, worths
        self.depths, self.paths = tree.depths, tree.paths
        self.children = np.full((size + 1, int(tree.sibling_ranks.max(initial=-1)) + 1), ROOT)
        """[nodes + 1, most] of each node, and last of the root, in draw order, then ROOT."""
        self.children[parents, tree.sibling_ranks] = np.arange(size)

    @property
    def size(self) -> int:
        return len(self.parents)

    def with_children(self, depth: int) -> NDArray[np.int64]:
        """The nodes of a depth that have some; of depth 0 the root."""
        nodes = np.flatnonzero(self.depths == depth) if depth else np.array([ROOT])
        some: NDArray[np.int64] = nodes[self.children[nodes, 0] != ROOT]
        return some


def _best(size: int, *, branches: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Parents and worths: the j-th try after a node is worth what the node is, times A (1 - A)^j. A chain ends where
    texts do that prefixes are made of."""
    parents, worths = np.full(size, ROOT), np.zeros(size)
    heap = [(-ACCEPTED, 0, ROOT, 1)]
    pushed = 1
    for node in range(size):
        worth, _, parents[node], depth = heapq.heappop(heap)
        worths[node] = -worth
        if branches:
            heapq.heappush(heap, (worth * (1 - ACCEPTED), pushed, int(parents[node]), depth))
        if depth < LONGEST:
            heapq.heappush(heap, (worth * ACCEPTED, pushed + 1, node, depth + 1))
        pushed += 2
        if not heap:
            return parents[: node + 1], worths[: node + 1]
    return parents, worths


class Drawn:
    """Trees while they are drawn: tokens and laws of nodes, by request and number in the shape."""

    def __init__(
        self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float, shape: Shape, law: DraftLaw
    ) -> None:
        size = min(shape.size, int(budgets.max(initial=0)))
        self._shape, self._law = shape, law
        self._wanted = (np.arange(size) < budgets[:, None]) & (shape.worths[:size] >= floor)
        self._there = np.zeros((len(requests), size + 1), np.bool_)
        self._there[:, ROOT] = True
        self._tokens = np.zeros((len(requests), size), np.int64)
        self._rows = np.zeros((len(requests), size), np.int64)
        temperatures = np.array([request.temperature for request in requests])
        self._greedy = temperatures < GREEDY_TEMPERATURE
        self._temperatures = np.where(self._greedy, 1.0, temperatures).astype(np.float32)
        self._uniforms = draft_uniforms(
            [request.seed for request in requests], [request.position for request in requests], size
        )
        self._probs: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._num_laws = 0

    def draw(self, first: torch.Tensor, logits: Logits) -> None:
        """`first` [requests, vocab]: after the roots."""
        for depth in range(int(self._shape.depths[: self._wanted.shape[1]].max(initial=0))):
            requests, parents = self._parents(depth)
            if not len(requests):
                break
            if depth == 0:
                rows = first[torch.from_numpy(requests).to(first.device)]
            else:
                paths = self._tokens[requests[:, None], self._shape.paths[parents, :depth]]
                rows = logits(Nodes(requests, paths))
            self._draw_children(requests, parents, rows)

    def drafts(self, drafter: str) -> DraftBatch:
        drawn = self._there[:, :-1]
        requests, nodes = drawn.nonzero()
        numbers = np.column_stack([drawn.cumsum(axis=1) - 1, np.full(len(drawn), ROOT)])  # the last is that of ROOT
        return DraftBatch(
            self._tokens[drawn],
            numbers[requests, self._shape.parents[nodes]],
            offsets_of(drawn.sum(axis=1)),
            self._law,
            drafter,
            q=QLaw(self._rows[drawn], _joined(self._probs, torch.float32), _joined(self._ids, torch.int64)),
        )

    def _parents(self, depth: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Requests and nodes of this depth that are there and whose first child, at least, is wanted."""
        nodes = self._shape.with_children(depth)
        firsts = self._shape.children[nodes, 0]
        nodes, firsts = nodes[firsts < self._wanted.shape[1]], firsts[firsts < self._wanted.shape[1]]
        requests, which = (self._there[:, nodes] & self._wanted[:, firsts]).nonzero()
        return requests, nodes[which]

    def _draw_children(self, requests: NDArray[np.int64], parents: NDArray[np.int64], logits: torch.Tensor) -> None:
        values, ids = logits.topk(min(SUPPORT, logits.shape[1]))
        temperatures = torch.from_numpy(self._temperatures[requests])[:, None].to(logits.device)
        probs = (values / temperatures).softmax(-1)
        self._probs.append(probs)
        self._ids.append(ids)
        left, tokens = probs.double().cpu().numpy(), ids.cpu().numpy()
        children = self._shape.children[parents]
        for tries in range(children.shape[1]):
            some = np.flatnonzero((children[:, tries] != ROOT) & (children[:, tries] < self._wanted.shape[1]))
            some = some[self._wanted[requests[some], children[some, tries]]]
            where = requests[some], children[some, tries]
            columns, drawable = self._columns(left[some], *where)
            self._tokens[where] = tokens[some, columns]
            self._there[where] = drawable
            self._rows[where] = self._num_laws + some
            without = self._greedy[requests[some]] | (self._law is DraftLaw.WITHOUT_REPLACEMENT)
            left[some[without], columns[without]] = 0.0
        self._num_laws += len(requests)

    def _columns(
        self, left: NDArray[np.float64], requests: NDArray[np.int64], nodes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[n] drawn from what is `left` of laws [n, columns], of greedy requests the likeliest; and whether there was
        something to draw."""
        sums = left.cumsum(axis=1)
        total = sums[:, -1]
        drawn = (sums <= (self._uniforms[requests, nodes] * total)[:, None]).sum(axis=1)
        columns = np.where(self._greedy[requests], left.argmax(axis=1), np.minimum(drawn, left.shape[1] - 1))
        return columns, total > 0


def _joined(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(list(parts)) if parts else torch.empty((0, 1), dtype=dtype)
