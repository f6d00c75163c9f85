"""How many groups nodes have room for, each on one node, exactly: groups whose size does not divide a node leave a part
of it free, and how much depends on what is put together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate


def most_beside(nodes: Sequence[int], one: int, other: int) -> list[int]:
    """Of nodes with so many devices: beside 0, 1, … groups of `one` devices, how many of `other` fit. As long as the
    former fit."""
    return _with_each(tuple(nodes), one, other)[-1]


def shared_out(nodes: Sequence[int], one: int, other: int, ones: int, others: int) -> list[tuple[int, int]] | None:
    """How many of either go to each node, the first nodes first. None if they don't fit."""
    known = _with_each(tuple(nodes), one, other)
    if ones >= len(known[-1]) or known[-1][ones] < others:
        return None
    found: list[tuple[int, int]] = []
    for devices, before in zip(reversed(nodes), reversed(known[:-1]), strict=True):
        here = next(
            n
            for n in range(ones + 1)
            if ones - n < len(before) and before[ones - n] + (devices - n * one) // other >= others
        )
        rest = min(others, before[ones - here])
        found.append((here, others - rest))
        ones, others = ones - here, rest
    return found[::-1]


@lru_cache(maxsize=256)
def _with_each(nodes: tuple[int, ...], one: int, other: int) -> list[list[int]]:
    """most_beside of no node, of the first, of the first two, and so on."""

    def with_another(best: list[int], devices: int) -> list[int]:
        here = [(devices - n * one) // other for n in range(devices // one + 1)]
        return [
            max(best[total - n] + here[n] for n in range(len(here)) if 0 <= total - n < len(best))
            for total in range(len(best) + len(here) - 1)
        ]

    return list(accumulate(nodes, with_another, initial=[0]))
