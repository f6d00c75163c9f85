"""What has followed contexts: a cache of fixed size from a key to the likeliest next tokens with their weights.

Set-associative like a processor's cache: a key has WAYS rows in which it can be, and takes the one that was written
longest ago. All operations are on arrays of keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH = 8
"""Tokens that are kept of a context."""
WAYS = 4
_ROW_BYTES = WIDTH * (4 + 4) + 8 + 8 + 8
_FREE = np.uint64(0)
_NUMBERS = np.arange(1, WAYS + 1)


class Successors:
    """Weights are evidence: one for each time that a token followed, or that much of the target's law. When a context
    comes again, what was known of it counts `fading` as much as before."""

    def __init__(self, max_bytes: int, fading: float) -> None:
        bits = max(max_bytes // (_ROW_BYTES * WAYS), 2).bit_length() - 1
        self._shift = np.uint64(64 - bits)  # the high bits of a key number its bucket
        self._nowhere = (1 << bits) * WAYS  # the row of contexts that are not known; it stays empty
        self._keys = np.full((1 << bits, WAYS), _FREE, np.uint64)
        self._owners = np.zeros((1 << bits, WAYS), np.uint64)
        self._written = np.zeros((1 << bits, WAYS), np.int64)
        self._now = 0
        self._fading = np.float32(fading)
        self.tokens = np.zeros((self._nowhere + 1, WIDTH), np.int32)
        self.weights = np.zeros((self._nowhere + 1, WIDTH), np.float32)

    @property
    def nbytes(self) -> int:
        arrays = (self._keys, self._owners, self._written, self.tokens, self.weights)
        return sum(array.nbytes for array in arrays)

    def find(self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The rows of `tokens` and `weights` that belong to keys [...] of owners [...]; an empty one where there is
        none."""
        buckets = (keys >> self._shift).view(np.int64)
        hits = (self._keys[buckets] == keys[..., None]) & (self._owners[buckets] == owners[..., None])
        way = hits @ _NUMBERS
        rows: NDArray[np.int64] = np.where(way, buckets * WAYS + (way - 1), self._nowhere)
        return rows

    def knows(self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self.find(keys, owners) != self._nowhere

    def add(
        self,
        keys: NDArray[np.uint64],
        owners: NDArray[np.uint64],
        tokens: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> None:
        """More evidence: after keys[i] of owners[i] came tokens[i] with weights[i], both [n, k]. A key that comes
        several times came so one after the other."""
        if not len(keys):
            return
        order = keys.argsort(kind="stable")
        keys = keys[order]
        starts = run_starts(keys)
        counts = np.diff(starts, append=len(keys))
        which = np.arange(len(starts)).repeat(counts)
        again = (starts + counts)[which] - np.arange(1, len(keys) + 1)  # how often the key still comes
        rows = self._claim(keys[starts], owners[order[starts]])
        old = self.weights[rows] * self._faded(counts)
        new = weights[order] * self._faded(again)
        best_tokens, best_weights = _likeliest(
            np.concatenate([np.arange(len(rows)).repeat(WIDTH), which.repeat(tokens.shape[1])]),
            np.concatenate([self.tokens[rows].ravel(), tokens[order].ravel()]),
            np.concatenate([old.ravel(), new.ravel()]),
            len(rows),
        )
        stored = rows != self._nowhere
        self.tokens[rows[stored]], self.weights[rows[stored]] = best_tokens[stored], best_weights[stored]

    def forget(self, owner: int) -> None:
        """All that belongs to it."""
        mine = self._owners == np.uint64(owner)
        rows = np.flatnonzero(mine)
        self._keys[mine], self._owners[mine], self._written[mine] = _FREE, 0, 0
        self.tokens[rows], self.weights[rows] = 0, 0.0

    def _faded(self, times: NDArray[np.int64]) -> NDArray[np.float32]:
        return (self._fading ** times.astype(np.float32))[:, None]

    def _claim(self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Rows for different keys in ascending order, those that are new emptied. Nowhere for one that would drive out
        another of them."""
        self._now += 1
        rows = self.find(keys, owners)
        written = self._written.reshape(-1)
        new = (rows == self._nowhere).nonzero()[0]
        written[np.delete(rows, new)] = self._now
        buckets = (keys[new] >> self._shift).view(np.int64)  # ascending, as keys are
        turns = np.arange(len(new)) - buckets.searchsorted(buckets)  # among the new ones of a bucket
        by_age = self._written[buckets].argsort(axis=1, kind="stable")
        places = buckets * WAYS + by_age[np.arange(len(new)), np.minimum(turns, WAYS - 1)]
        fits = (turns < WAYS) & (written[places] < self._now)
        places, new = places[fits], new[fits]
        self._keys.reshape(-1)[places] = keys[new]
        self._owners.reshape(-1)[places] = owners[new]
        written[places] = self._now
        self.weights[places] = 0.0
        rows[new] = places
        return rows


def _likeliest(
    slots: NDArray[np.int64], tokens: NDArray[np.int64], weights: NDArray[np.float32], num_slots: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """[slots, WIDTH] the tokens of each slot with the largest sums of weights, heaviest first, and these; 0 where there
    are no more."""
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
    groups: NDArray[np.int64], tokens: NDArray[np.int64], weights: NDArray[np.float32], least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Every pair of group and token once, in ascending order, with the sum of its weights. Weights that are not above
    `least` are left out before."""
    heavy = (weights > least).nonzero()[0]
    pairs = (groups[heavy] << 32) | tokens[heavy]
    order = pairs.argsort()
    pairs = pairs[order]
    starts = run_starts(pairs)
    sums = np.add.reduceat(weights[heavy[order]], starts) if len(starts) else weights[:0]
    pairs = pairs[starts]
    return pairs >> 32, pairs & 0xFFFFFFFF, sums


def run_starts(values: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each run of equal ones begins."""
    new = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new.nonzero()[0]
