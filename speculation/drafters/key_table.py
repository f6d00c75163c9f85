"""A hash table of fixed size from keys to rows, for arrays of keys: whatever is stored for a key is in arrays of the
owner of the table, by row.

Set-associative like a processor's cache: a key has WAYS rows in which it can be, and takes the one that was claimed
longest ago.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WAYS = 4
ROW_BYTES = 3 * 8
_FREE = np.uint64(0)
_NUMBERS = np.arange(1, WAYS + 1)


class KeyTable:
    """No key is 0. A key is only found by whom it belongs to."""

    def __init__(self, max_rows: int) -> None:
        """A power of two of rows, at most `max_rows` but no less than 8."""
        bits = max(max_rows // WAYS, 2).bit_length() - 1
        self.shift = np.uint64(64 - bits)  # the high bits of a key number its bucket
        self.nowhere = (1 << bits) * WAYS
        """The row of keys that have none, after all others."""
        self.claimed = np.zeros((1 << bits, WAYS), np.int64)
        self._now = 0
        self.tags = np.zeros((1 << bits, 2, WAYS), np.uint64)  # keys and owners, side by side in memory
        self._keys, self._owners = self.tags[:, 0], self.tags[:, 1]
        for array in (self.claimed, self.tags):
            array.fill(0)  # so that the pages are there: to get them would be the slowest part of a step

    @property
    def nbytes(self) -> int:
        return self.claimed.nbytes + self.tags.nbytes

    def find(self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The rows of keys [...] of owners [...]."""
        buckets = (keys >> self.shift).view(np.int64)
        tags = self.tags[buckets]
        hits = (tags[..., 0, :] == keys[..., None]) & (tags[..., 1, :] == owners[..., None])
        way = hits @ _NUMBERS
        rows: NDArray[np.int64] = np.where(way, buckets * WAYS + (way - 1), self.nowhere)
        return rows

    def knows(self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> NDArray[np.bool_]:
        known: NDArray[np.bool_] = self.find(keys, owners) != self.nowhere
        return known

    def claim(
        self, keys: NDArray[np.uint64], owners: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows for different keys in ascending order, and those of these rows that had another key or none.
        Nowhere for a key that would drive out another of them."""
        now = self.tick()
        rows = self.find(keys, owners)
        new = (rows == self.nowhere).nonzero()[0]
        claimed = self.claimed.reshape(-1)
        claimed[np.delete(rows, new)] = now
        buckets = (keys[new] >> self.shift).view(np.int64)  # ascending, as keys are
        turns = np.arange(len(new)) - buckets.searchsorted(buckets)  # among the new ones of a bucket
        by_age = self.claimed[buckets].argsort(axis=1, kind="stable")
        places = buckets * WAYS + by_age[np.arange(len(new)), np.minimum(turns, WAYS - 1)]
        fits = (turns < WAYS) & (claimed[places] < now)
        places, new = places[fits], new[fits]
        at = places // WAYS, places % WAYS
        self._keys[at], self._owners[at], self.claimed[at] = keys[new], owners[new], now
        rows[new] = places
        return rows, places

    def tick(self) -> int:
        """The time of a claim: later than all before."""
        self._now += 1
        return self._now

    def forget(self, owner: int) -> NDArray[np.int64]:
        """The rows that were its own."""
        mine = self._owners == np.uint64(owner)
        self._keys[mine], self._owners[mine], self.claimed[mine] = _FREE, 0, 0
        rows: NDArray[np.int64] = mine.reshape(-1).nonzero()[0]
        return rows


def run_starts(values: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each run of equal ones begins."""
    new = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new.nonzero()[0]
