"""Sequences in their order, and whether one is better off to wait for KV that another is about to have."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.block_manager import BlockManager
from engine.sequence import Sequence

MIN_AWAITED_TOKENS = 128
"""Fewer are computed sooner than somebody else's hand-off ends."""


class Ordered:
    """Sequences by (priority, arrival)."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    @staticmethod
    def key(sequence: Sequence) -> tuple[int, int]:
        return sequence.request.priority, sequence.arrival

    def add(self, sequence: Sequence) -> None:
        insort(self._items, sequence, key=self.key)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._items, self.key(sequence), key=self.key)
        assert self._items[index] is sequence, f"{sequence.request_id} is not in this queue"
        del self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._items)


def awaits_prefix(sequence: Sequence, others: list[Sequence], blocks: BlockManager) -> bool:
    """Whether one of the others, whose KV the prefix cache will take, brings the next block that this one could share,
    and half of what it lacks: else it would wait for a step, or for all of a hand-off, to save little. It waits until
    it has that half, or the other one is among them no more. A reservation may wait for those that have blocks only:
    while it waits, it holds blocks where it was computed."""
    awaited, last = sequence.awaited_block
    if awaited in others and awaited.num_cacheable_blocks <= last:
        return True  # what was found then: nothing need be looked up in every step
    index = blocks.first_missing(sequence) if others else None
    if index is None:
        return False
    lacking = len(sequence.token_ids) - index * blocks.block_size
    for other in others:
        enough = max(lacking / 2, MIN_AWAITED_TOKENS if other.awaits_kv else 1)
        last = index + math.ceil(enough / blocks.block_size) - 1
        if blocks.brings(other, sequence, index, last):
            sequence.awaited_block = other, last
            return True
    return False
