"""Token trees, flat over the requests of a step.

A tree hangs from a request's last committed token, the root, whose KV is not computed yet. When it is verified the
target computes, per request, a row for the root and then one for each node: `root_rows` and `rows` say which. The
target's law in the row of a node is that of the token after it, so a node is judged by its parent's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.errors import InternalError
from speculation.laws import SAMPLED, DraftLaw
from speculation.qlaw import QLaw
from speculation.shape import Shape

ROOT = -1
"""The parent of the nodes that follow the last committed token."""


@dataclass(frozen=True)
class DraftBatch:
    """What one drafter proposes for some requests. Request r has the nodes offsets[r] .. offsets[r + 1], maybe none.

    Nodes are in the order in which they were drawn, which is also the order of what they are worth: the first k of a
    request are its tree under a budget of k. So parents come before children and siblings in draw order. Whether a
    node was drawn at all may depend on the nodes before it, never on its own token, unless the law is POINT_MASS.
    """

    tokens: NDArray[np.int64]  # [nodes]
    parents: NDArray[np.int64]  # [nodes] index within the request, or ROOT
    offsets: NDArray[np.int64]  # [requests + 1]
    law: DraftLaw
    drafter: str
    version: str = ""
    q: QLaw | None = None
    """Of the laws in SAMPLED; None for POINT_MASS."""
    confidence: NDArray[np.float32] | None = None
    """[nodes] the drafter's estimate of the probability that the node is accepted once its parent is."""

    # --- making one ------------------------------------------------------------------------------------------------

    @staticmethod
    def of_chains(chains: Sequence[Sequence[int]], law: DraftLaw, drafter: str, version: str = "") -> DraftBatch:
        """One chain of tokens per request."""
        lengths = np.array([len(chain) for chain in chains], np.int64)
        offsets = offsets_of(lengths)
        tokens = np.fromiter((token for chain in chains for token in chain), np.int64, int(offsets[-1]))
        parents = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths) - 1
        return DraftBatch(tokens, parents, offsets, law, drafter, version)

    def validate(self, vocab_size: int, requests: int | None = None, law: DraftLaw | None = None) -> None:
        """Raises InternalError, naming drafter and field, unless this is as the class says and, where given, for so
        many requests and of this law."""
        if requests is not None and self.num_requests != requests:
            raise self._malformed(f"offsets: of {self.num_requests} requests, where {requests} are to be drafted for")
        if law is not None and self.law is not law:
            raise self._malformed(f"law: {self.law}, where the drafter's is {law}")
        nodes, offsets = len(self.tokens), self.offsets
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != nodes or (np.diff(offsets) < 0).any():
            raise self._malformed(f"offsets don't cover {nodes} nodes in order")
        if len(self.parents) != nodes:
            raise self._malformed(f"{len(self.parents)} parents for {nodes} tokens")
        if self.shape is None and ((self.parents < ROOT) | (self.parents >= self.ranks)).any():
            raise self._malformed("parents: one is not a node before its child, nor the root")
        if ((self.tokens < 0) | (self.tokens >= vocab_size)).any():
            raise self._malformed(f"tokens: one is not in a vocabulary of {vocab_size}")
        if self.confidence is not None and len(self.confidence) != nodes:
            raise self._malformed(f"confidence: {len(self.confidence)} numbers for {nodes} nodes")
        self._validate_law()

    def _validate_law(self) -> None:
        if (self.q is None) == (self.law in SAMPLED):
            raise self._malformed(f"q: {'none' if self.q is None else 'one'} for the law {self.law}")
        if self.q is not None:
            if len(self.q.rows) != len(self.tokens):
                raise self._malformed(f"q: rows for {len(self.q.rows)} of {len(self.tokens)} nodes")
            first = self.children[self.child_starts[self.parent_rows]]
            if (self.q.rows != self.q.rows[first]).any():
                raise self._malformed("q: siblings from different laws")
        if self.law is not DraftLaw.IID and self._has_twins():
            raise self._malformed(f"tokens: siblings are the same, which {self.law} can't be")

    def _has_twins(self) -> bool:
        pairs = set(zip(self.parent_rows.tolist(), self.tokens.tolist(), strict=True))
        return len(pairs) < self.num_nodes

    def _malformed(self, problem: str) -> InternalError:
        return InternalError(f"drafter {self.drafter} proposed no valid tree: {problem}")

    # --- sizes -----------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    @property
    def num_requests(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[requests] nodes of each."""
        return np.diff(self.offsets)

    # --- where nodes are -------------------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> Shape | None:
        """What C++ says of it, if it is well-formed and there is the library; else NumPy does."""
        return Shape.of(self.parents, self.offsets)

    @cached_property
    def request_of(self) -> NDArray[np.int64]:
        """[nodes]"""
        if self.shape is not None:
            return self.shape.request_of
        return np.repeat(np.arange(self.num_requests), self.lengths)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """[nodes] index within the request."""
        if self.shape is not None:
            return self.shape.ranks
        return np.arange(self.num_nodes) - self.offsets[self.request_of]

    @cached_property
    def parent_nodes(self) -> NDArray[np.int64]:
        """[nodes] index in the batch, or ROOT."""
        if self.shape is not None:
            return self.shape.parent_nodes
        return np.where(self.parents == ROOT, ROOT, self.parents + self.offsets[self.request_of])

    @cached_property
    def root_rows(self) -> NDArray[np.int64]:
        """[requests] the row of each root among the rows of the step."""
        return self.offsets[:-1] + np.arange(self.num_requests)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """[nodes] the row of each node."""
        return np.arange(self.num_nodes) + self.request_of + 1

    @cached_property
    def parent_rows(self) -> NDArray[np.int64]:
        """[nodes] the row by which each node is judged."""
        if self.shape is not None:
            return self.shape.parent_rows
        return self.root_rows[self.request_of] + self.parents + 1

    @property
    def num_rows(self) -> int:
        return self.num_nodes + self.num_requests

    # --- shape -----------------------------------------------------------------------------------------------------

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """[nodes] 1 for a child of the root, so a row sees that many positions past its root's."""
        if self.shape is not None:
            return self.shape.depths
        depths = np.zeros(self.num_nodes, np.int64)
        above = np.arange(self.num_nodes)
        while len(inner := np.flatnonzero(above != ROOT)):
            depths[inner] += 1
            above[inner] = self.parent_nodes[above[inner]]
        return depths

    @cached_property
    def children(self) -> NDArray[np.int64]:
        """[nodes] all nodes by the row of their parent, siblings in draw order; `child_starts` says whose are where."""
        return np.argsort(self.parent_rows, kind="stable")

    @cached_property
    def child_starts(self) -> NDArray[np.int64]:
        """[rows + 1] the children of a row are children[child_starts[row] : child_starts[row + 1]]."""
        return offsets_of(np.bincount(self.parent_rows, minlength=self.num_rows))

    @cached_property
    def sibling_ranks(self) -> NDArray[np.int64]:
        """[nodes] how many siblings were drawn before each."""
        if self.shape is not None:
            return self.shape.sibling_ranks
        ranks = np.empty(self.num_nodes, np.int64)
        ranks[self.children] = np.arange(self.num_nodes) - self.child_starts[self.parent_rows[self.children]]
        return ranks

    @cached_property
    def chains(self) -> NDArray[np.bool_]:
        """[requests] whether each tree is a plain chain; one without nodes is."""
        chains = np.ones(self.num_requests, np.bool_)
        chains[self.request_of[self.parents != self.ranks - 1]] = False
        return chains

    @cached_property
    def paths(self) -> NDArray[np.int64]:
        """[nodes, greatest depth] the nodes from below the root down to each, itself included, then -1."""
        depths = self.depths
        paths = np.full((self.num_nodes, int(depths.max(initial=0))), -1, np.int64)
        nodes = above = np.arange(self.num_nodes)
        while len(nodes):
            paths[nodes, depths[above] - 1] = above
            above = self.parent_nodes[above]
            nodes, above = nodes[above != ROOT], above[above != ROOT]
        return paths

    def ancestors(self, request: int) -> NDArray[np.bool_]:
        """[nodes, nodes] of one request: whether the column's node is above the row's, or is it."""
        start, end = self.offsets[request : request + 2]
        above = np.eye(end - start, dtype=np.bool_)
        nodes, steps = np.arange(end - start), self.parents[start:end]
        while len(inner := np.flatnonzero(steps != ROOT)):
            nodes, steps = nodes[inner], steps[inner]
            above[nodes, steps] = True
            steps = self.parents[start + steps]
        return above

    def path_products(self, factors: NDArray[np.floating | np.bool_]) -> NDArray[np.float64]:
        """[nodes] the product of `factors` [nodes] over each node and those above it."""
        if self.shape is not None:
            return self.shape.path_products(np.asarray(factors, np.float64))
        padded = np.append(np.asarray(factors, np.float64), 1.0)  # -1 in a path is no node
        products: NDArray[np.float64] = padded[self.paths].prod(axis=1)
        return products

    def step_parents(self) -> NDArray[np.int64]:
        """[rows] as StepBatch.tree_parents wants them: rows within the sequence, -1 for the root."""
        parents = np.full(self.num_rows, -1, np.int64)
        parents[self.rows] = self.parents + 1
        return parents

    # --- smaller ones ----------------------------------------------------------------------------------------------

    def prune(self, budgets: NDArray[np.int64]) -> DraftBatch:
        """The first budgets[r] nodes of each request at most. Looks at no token, so every law stays what it is."""
        if (self.lengths <= budgets).all():
            return self
        return self.only(np.flatnonzero(self.ranks < budgets[self.request_of]))

    def keep(self, wanted: NDArray[np.bool_]) -> DraftBatch:
        """The nodes [nodes] that are wanted and hang from wanted ones. For POINT_MASS only: to choose among what was
        drawn by what it is would make its law another one."""
        if self.law in SAMPLED:
            raise InternalError(f"nodes of a draft drawn {self.law} can't be chosen by value: cut it by `prune`")
        return self.only(np.flatnonzero(self.path_products(wanted) > 0))

    def cut_below(self, doomed: NDArray[np.bool_]) -> DraftBatch:
        """Without the nodes that hang from doomed ones [nodes], which stay. For every law: a token that the target
        gives no probability must still be seen to be rejected, but nothing below it is ever looked at."""
        above = np.append(doomed, False)[self.parent_nodes]
        return self.only(np.flatnonzero(self.path_products(~above) > 0))

    def select(self, requests: Sequence[int] | NDArray[np.int64]) -> DraftBatch:
        """Some of the requests, in the order given."""
        chosen = np.asarray(requests, np.int64)
        nodes = ranges(self.offsets[:-1][chosen], self.lengths[chosen])
        return self._take(nodes, self.parents[nodes], self.lengths[chosen])

    def only(self, nodes: NDArray[np.int64]) -> DraftBatch:
        """`nodes`, ascending, their ancestors among them. If they are sampled, the caller chose each by nothing but
        what was drawn before it."""
        lengths = np.bincount(self.request_of[nodes], minlength=self.num_requests)
        starts = offsets_of(lengths)[:-1]
        new_index = np.full(self.num_nodes + 1, ROOT, np.int64)  # the last is that of ROOT
        new_index[nodes] = np.arange(len(nodes)) - starts[self.request_of[nodes]]
        return self._take(nodes, new_index[self.parent_nodes[nodes]], lengths)

    def _take(self, nodes: NDArray[np.int64], parents: NDArray[np.int64], lengths: NDArray[np.int64]) -> DraftBatch:
        return replace(
            self,
            tokens=self.tokens[nodes],
            parents=parents,
            offsets=offsets_of(lengths),
            q=None if self.q is None else self.q.of_nodes(nodes),
            confidence=None if self.confidence is None else self.confidence[nodes],
        )


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, … for lengths[0] numbers, then those from starts[1], and so on."""
    return np.arange(int(lengths.sum())) + np.repeat(starts - offsets_of(lengths)[:-1], lengths)


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n + 1] where each of n consecutive runs begins and the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
