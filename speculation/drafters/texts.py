"""An index of all that was written lately, of any request: where a context occurred before, and how it went on there.

Tokens are in one ring, of whichever text they come. Each knows the one after it in its own text, and for each of its
contexts where the same one occurred the last time, as in the hash chains of LZ77. So the longest match is found at the
cost of the occurrences that are looked at, a token costs the same whatever came before it, the oldest text is forgotten
first, and the memory is from the beginning what it will be.

Positions count all tokens that ever came; the ring has the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.contexts import PAD, Contexts, Salts
from speculation.drafters.key_table import ROW_BYTES, KeyTable, run_starts

NOWHERE = -1
"""The position of what there is not."""


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Where contexts of some windows occurred, no place twice for a window."""

    windows: NDArray[np.int64]  # [n]
    positions: NDArray[np.int64]  # [n] of the last token of the context
    columns: NDArray[np.int64]  # [n] the last column of the contexts that occurred there


class Texts:
    def __init__(self, max_bytes: int, contexts: Contexts) -> None:
        columns = contexts.num_columns
        self._contexts = contexts
        self._size = max(max_bytes // (4 + 8 + columns * (8 + 2 * (ROW_BYTES + 8))), 16)
        self._table = KeyTable(2 * self._size * columns)
        self._heads = np.full(self._table.nowhere + 1, NOWHERE)  # of a key: where it occurred last
        self._tokens = np.full(self._size, PAD, np.int32)
        self._after = np.full(self._size, NOWHERE)
        self._links = np.full((self._size, columns), NOWHERE)
        self._end = 0

    @property
    def nbytes(self) -> int:
        arrays = (self._heads, self._tokens, self._after, self._links)
        return self._table.nbytes + sum(array.nbytes for array in arrays)

    @property
    def size(self) -> int:
        """Tokens that it has room for."""
        return self._size

    def append(
        self,
        lasts: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokens: NDArray[np.int64],
        windows: NDArray[np.int64],
        salts: Salts,
    ) -> NDArray[np.int64]:
        """counts[t] more tokens of each of some texts, one after the other and no more than `size`, with the windows
        before them [tokens, width] and the salts of their text. The token before is at lasts [texts], or NOWHERE.
        Returns the positions [texts] of the last ones now."""
        positions = self._end + np.arange(len(tokens))
        self._end += len(tokens)
        slots = positions % self._size
        self._tokens[slots], self._after[slots], self._links[slots] = tokens, NOWHERE, NOWHERE
        ends = counts.cumsum()
        before = positions - 1
        before[ends - counts] = lasts
        there = self._alive(before).nonzero()[0]
        self._after[before[there] % self._size] = positions[there]
        self._index(before[there], self._contexts.keys(windows, salts)[there], salts.owners[there])
        last: NDArray[np.int64] = positions[ends - 1]
        return last

    def find(self, windows: NDArray[np.int64], salts: Salts, most: int) -> Occurrences:
        """Of the contexts of windows [n, width]: the last `most` of each."""
        keys = self._contexts.keys(windows, salts)
        found = np.empty((*keys.shape, most), np.int64)
        here, columns = self._heads[self._table.find(keys, salts.owners)], np.arange(keys.shape[1])
        for turn in range(most):
            alive = self._alive(here)
            found[..., turn] = np.where(alive, here, NOWHERE)
            here = np.where(alive, self._links[here % self._size, columns], NOWHERE)
        of_window, columns, turns = (found != NOWHERE).nonzero()
        positions = found[of_window, columns, turns]
        order = np.lexsort((-columns, positions, of_window))
        of_window, positions, columns = of_window[order], positions[order], columns[order]
        first = np.union1d(run_starts(of_window), run_starts(positions))
        return Occurrences(of_window[first], positions[first], columns[first])

    def continuations(self, positions: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """[n, length] what came after positions [n], then PAD."""
        tokens = np.full((len(positions), length), PAD, np.int32)
        some, here = np.arange(len(positions)), positions
        for step in range(length):
            here = self._after[here % self._size]
            going = here != NOWHERE
            some, here = some[going], here[going]
            if not len(some):
                break
            tokens[some, step] = self._tokens[here % self._size]
        return tokens

    def forget(self, owner: int, positions: NDArray[np.int64]) -> None:
        """What is found by it, and the text that was at positions [n]."""
        self._heads[self._table.forget(owner)] = NOWHERE
        slots = positions[self._alive(positions)] % self._size
        self._tokens[slots], self._after[slots], self._links[slots] = PAD, NOWHERE, NOWHERE

    def _alive(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        return positions >= max(self._end - self._size, 0)

    def _index(self, positions: NDArray[np.int64], keys: NDArray[np.uint64], owners: NDArray[np.uint64]) -> None:
        """Contexts [n, columns] that end at positions [n], in the order of these."""
        columns = np.tile(np.arange(keys.shape[1]), len(keys))
        positions, keys, owners = positions.repeat(keys.shape[1]), keys.reshape(-1), owners.reshape(-1)
        order = keys.argsort(kind="stable")
        keys, positions = keys[order], positions[order]
        starts = run_starts(keys)
        rows, new = self._table.claim(keys[starts], owners[order[starts]])
        self._heads[new] = NOWHERE
        earlier = np.empty_like(positions)
        earlier[1:] = positions[:-1]
        earlier[starts] = self._heads[rows]
        self._links[positions % self._size, columns[order]] = earlier
        stored = rows != self._table.nowhere
        last = np.append(starts[1:], len(keys)) - 1
        self._heads[rows[stored]] = positions[last[stored]]
