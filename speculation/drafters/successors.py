"""What has followed contexts: the likeliest next tokens with their weights, in a cache of fixed size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.key_table import ROW_BYTES, KeyTable, run_starts

WIDTH = 8
"""Tokens that are kept of a context."""
_BYTES = WIDTH * (4 + 4) + ROW_BYTES


class Successors:
    """Weights are evidence: one for each time that a token followed, or that much of the target's law. When a context
    comes again, what was known of it counts `fading` as much as before."""

    def __init__(self, max_bytes: int, fading: float) -> None:
        self.table = KeyTable(max_bytes // _BYTES)
        self.fading = np.float32(fading)
        self.rows = np.zeros((self.table.nowhere + 1, 2, WIDTH), np.int32)  # the last stays empty
        self.rows.fill(0)  # as in the table
        self._tokens, self._weights = self.rows[:, 0], self.rows[:, 1].view(np.float32)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.rows.nbytes

    def knows(self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self.table.knows(keys, owners)

    def after(
        self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """[..., WIDTH] the tokens after keys [...] of owners [...], heaviest first, and their weights; where there are
        no more, a weight of 0."""
        return self._read(self.table.find(keys, owners))

    def add(
        self,
        keys: NDArray[np.uint64],
        owners: NDArray[np.uint64],
        tokens: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> None:
        """More evidence: after keys[i] of owners[i] came tokens[i] with weights[i], both [n, k]. A key that comes
        several times came so one after the other."""
        order = keys.argsort(kind="stable")
        keys = keys[order]
        starts = run_starts(keys)
        counts = np.diff(starts, append=len(keys))
        which = np.arange(len(starts)).repeat(counts)
        again = (starts + counts)[which] - np.arange(1, len(keys) + 1)  # how often the key still comes
        rows, new = self.table.claim(keys[starts], owners[order[starts]])
        self._weights[new] = 0.0
        old_tokens, old_weights = self._read(rows)
        old_weights = old_weights * self._faded(counts)
        best = _heaviest(
            np.concatenate([np.arange(len(rows)).repeat(WIDTH), which.repeat(tokens.shape[1])]),
            np.concatenate([old_tokens.ravel(), tokens[order].ravel()]),
            np.concatenate([old_weights.ravel(), (weights[order] * self._faded(again)).ravel()]),
            len(rows),
        )
        stored = rows != self.table.nowhere
        self._tokens[rows[stored]], self._weights[rows[stored]] = best[0][stored], best[1][stored]

    def forget(self, owner: int) -> None:
        """All that belongs to it."""
        self.rows[self.table.forget(owner)] = 0

    def _read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        found = self.rows[rows]
        return found[..., 0, :], found[..., 1, :].view(np.float32)

    def _faded(self, times: NDArray[np.int64]) -> NDArray[np.float32]:
        faded: NDArray[np.float32] = (self.fading ** times.astype(np.float32))[:, None]
        return faded


def _heaviest(
    slots: NDArray[np.int64], tokens: NDArray[np.int64], weights: NDArray[np.float32], num_slots: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """[slots, WIDTH] the tokens of each slot with the largest sums of weights, and these; 0 where there are no more."""
    slots, tokens, weights = added_up(slots, tokens, weights, 0.0)
    order = np.lexsort((-weights, slots))
    slots, tokens, weights = slots[order], tokens[order], weights[order]
    rank = np.arange(len(slots)) - slots.searchsorted(slots)
    kept = rank < WIDTH
    at = slots[kept], rank[kept]
    best_tokens, best_weights = np.zeros((num_slots, WIDTH), np.int32), np.zeros((num_slots, WIDTH), np.float32)
    best_tokens[at], best_weights[at] = tokens[kept], weights[kept]
    return best_tokens, best_weights


def added_up(
    groups: NDArray[np.int64], tokens: NDArray[np.int64] | NDArray[np.int32], weights: NDArray[np.float32], least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Every pair of group and token once, in ascending order, with the sum of its weights. Weights that are not above
    `least` are left out before."""
    heavy = (weights > least).nonzero()[0]
    pairs = (groups[heavy] << 32) | tokens[heavy]
    order = pairs.argsort(kind="stable")
    pairs = pairs[order]
    starts = run_starts(pairs)
    sums = np.add.reduceat(weights[heavy[order]], starts) if len(starts) else weights[:0]
    pairs = pairs[starts]
    return pairs >> 32, pairs & 0xFFFFFFFF, sums
