"""Drafts that follow the grammar of their request, and what it allows after each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.structured.constraint import Constraint
from speculation.laws import DraftLaw
from speculation.tree import DraftBatch

Masks = tuple[NDArray[np.uint32], ...]


def follow_grammars(
    drafts: DraftBatch, constraints: Sequence[Constraint | None]
) -> tuple[DraftBatch, list[Masks | None]]:
    """`drafts` without what the grammars of its requests rule out, and [requests] what is allowed after each row that
    is left, None for a request without a grammar. Of drafts that were drawn only what hangs from a token that is ruled
    out may go: that it was proposed, and is rejected, is part of the law."""
    if all(constraint is None for constraint in constraints):
        return drafts, [None] * drafts.num_requests
    legal = np.ones(drafts.num_nodes, np.bool_)
    after: list[NDArray[np.uint32] | None] = [None] * drafts.num_nodes
    for request, constraint in enumerate(constraints):
        start, stop = drafts.offsets[request], drafts.offsets[request + 1]
        if constraint is not None and start < stop:
            allowed = constraint.look_along(drafts.tokens[start:stop].tolist(), drafts.parents[start:stop].tolist())
            after[start:stop] = allowed
            legal[start:stop] = [mask is not None for mask in allowed]
    kept = np.flatnonzero(legal)
    if drafts.law is DraftLaw.POINT_MASS:
        followed = drafts.keep(legal)
    else:
        kept = np.flatnonzero(legal[drafts.parent_nodes] | (drafts.parent_nodes < 0))
        followed = drafts.cut_below(~legal)
    of_each = np.split(kept, kept.searchsorted(drafts.offsets[1:-1]))
    return followed, [
        None if constraint is None else _masks(constraint, [after[node] for node in own])
        for constraint, own in zip(constraints, of_each, strict=True)
    ]


def _masks(constraint: Constraint, after: Sequence[NDArray[np.uint32] | None]) -> Masks:
    """A row after a token that is ruled out is never asked for a token that counts; it gets what the root has."""
    return (constraint.allowed, *(constraint.allowed if mask is None else mask for mask in after))
