"""The last tokens of texts as keys: what drafters that only remember look up.

A key is a hash of a context's tokens, of how many they are, and of who may look it up. That owner is compared apart
from the key as well, so that no accident of hashing shows anybody what belongs to somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from speculation.rounds import DraftRequest

PAD = -1
"""In place of a token before the beginning of a text."""
PRIVATE, SHARED = 0, 1
"""Kinds of owners: the request alone, and all requests of its scope."""

_LONGEST = 16
_FACTORS = np.random.default_rng(0x51).integers(0, 2**64, _LONGEST + 3, np.uint64) | np.uint64(1)
OF_TOKENS = _FACTORS[:_LONGEST]
_OF_OWNER, _OF_ORDER, MIXING = _FACTORS[_LONGEST:]
_HALF, _ONE = np.uint64(32), np.uint64(1)


def owners_of(request: DraftRequest) -> tuple[int, int]:
    """Private and shared. What may not be remembered has no shared one, but its private one in both places."""
    private = _digest(f"request {request.key}")
    return private, _digest(f"scope {request.scope}") if request.remember else private


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Salts:
    """What the keys of some texts have of their owners: [n, columns]."""

    owners: NDArray[np.uint64]
    terms: NDArray[np.uint64]

    @staticmethod
    def joined(parts: Sequence[Salts]) -> Salts:
        """At least one."""
        return Salts(np.concatenate([part.owners for part in parts]), np.concatenate([part.terms for part in parts]))

    def of(self, texts: NDArray[np.int64]) -> Salts:
        return Salts(self.owners[texts], self.terms[texts])


class Contexts:
    """Which contexts are looked up, one in each column: by how many tokens, and for which kind of owner."""

    def __init__(self, orders: Sequence[int], kinds: Sequence[int]) -> None:
        self.width = max(orders)
        self.orders = np.array(orders)
        self.ends = np.array(orders) - 1
        self._kinds = np.array(kinds)
        self._of_orders = np.array(orders, np.uint64) * _OF_ORDER
        self.tops = self._kinds.astype(np.uint64) << np.uint64(63)

    @property
    def num_columns(self) -> int:
        return len(self.ends)

    def only(self, kind: int) -> Contexts:
        """The columns for one kind of owner."""
        some = self._kinds == kind
        return Contexts((self.ends[some] + 1).tolist(), self._kinds[some].tolist())

    def salts(self, owners: NDArray[np.uint64]) -> Salts:
        """Of texts with these private and shared owners [n, 2]."""
        of_columns = owners[:, self._kinds]
        return Salts(of_columns, of_columns * _OF_OWNER + self._of_orders)

    def keys(self, windows: NDArray[np.int64], salts: Salts) -> NDArray[np.uint64]:
        """[n, columns] after windows [n, width or more]; none is 0. The highest bit is the kind: in what is sorted by
        keys, kinds are apart.

        A sum of the tokens times random odd numbers, one for each distance from the end, then mixed."""
        width = self.width
        terms = (windows[:, : -width - 1 : -1].astype(np.uint64) + _ONE) * OF_TOKENS[:width]
        keys = terms.cumsum(axis=1)[:, self.ends] + salts.terms
        keys = (keys ^ (keys >> _HALF)) * MIXING
        found: NDArray[np.uint64] = ((keys ^ (keys >> _HALF)) >> _ONE) | self.tops | _ONE
        return found


def windows_at(token_ids: Sequence[int], first: int, end: int, width: int) -> NDArray[np.int64]:
    """[end - first, width] for each of these indices the tokens up to and with it."""
    start = first - width + 1
    text = np.full(end - start, PAD, np.int64)
    text[max(-start, 0) :] = token_ids[max(start, 0) : end]
    windows: NDArray[np.int64] = text[np.arange(end - first)[:, None] + np.arange(width)]
    return windows


def last_windows(requests: Sequence[DraftRequest], width: int) -> NDArray[np.int64]:
    """[requests, width] the last tokens of each."""
    windows = np.full((len(requests), width), PAD, np.int64)
    for window, request in zip(windows, requests, strict=True):
        tail = request.token_ids[-width:]
        window[width - len(tail) :] = tail
    return windows


def extended(windows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, width] with one more token [n] each."""
    return np.concatenate([windows[:, 1:], tokens[:, None]], axis=1)
