"""What commands that put questions to a model, and compare its answers, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of them, or all if there are fewer, at even distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def num_equal(output: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(output, other, strict=False)
    return next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(output), len(other)))
