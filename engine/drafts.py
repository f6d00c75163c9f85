"""Drafts in a step: tokens that are proposed to follow the last one of a sequence, computed with it in one forward and
then accepted or not. Who proposes and who judges is the Speculator's business (engine.speculator); the engine gives it
room, runs the step and keeps what was accepted.

Row 0 of a drafted sequence is its last token, row 1 + n node n of the tree. Each row has its KV at a logical index of
its own, behind the context, and the rows that are accepted are moved to where a plain decode would have put them, in
the step that computes the sequence next: until then nobody else is told of them.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.types import TokenLogprobs
from engine.sequence import Sequence

Mask = NDArray[np.uint32]
"""As SamplingRow.allowed."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A token tree; parents come before children, and the first nodes are a tree again."""

    token_ids: NDArray[np.int64]  # [nodes], at least one
    parents: NDArray[np.int64]  # [nodes] a node, or -1 for the last token of the sequence
    depths: NDArray[np.int64]  # [nodes] 1 for what follows that token
    allowed: tuple[Mask, ...] | None = None
    """[1 + nodes] what the grammar allows after each row; None without one."""

    @property
    def num_rows(self) -> int:
        return 1 + len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return bool(self.depths[-1] == len(self.depths))

    def path_to(self, node: int) -> list[int]:
        """The tokens from the first of the draft to this one."""
        path = []
        while node >= 0:
            path.append(int(self.token_ids[node]))
            node = int(self.parents[node])
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a draft: `path`, the accepted nodes from the root down, and the tokens that are emitted: theirs and
    one more, which may be UNDRAWABLE."""

    token_ids: list[int]
    path: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, where the request asked."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that decodes in the next step, and how many draft tokens there is room for."""

    sequence: Sequence
    room: int


def moves_of(slots: NDArray[np.int64], path: SequenceOf[int]) -> NDArray[np.int64] | None:
    """[moves, 2] that bring the KV of a path to the front, of a chunk with these slots [rows]; None if it is there."""
    rows = 1 + np.asarray(path, np.int64)
    places = np.arange(1, len(rows) + 1)
    moved = rows != places
    return np.stack((slots[rows[moved]], slots[places[moved]]), axis=1) if moved.any() else None
