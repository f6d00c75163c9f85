"""The index of recent text, against looking for it token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.drafters.contexts import PRIVATE, Contexts, Salts, windows_at
from speculation.drafters.texts import NOWHERE, Texts

ORDERS = (1, 2, 4)
CONTEXTS = Contexts(ORDERS, (PRIVATE,) * len(ORDERS))
MOST = 3


def salts(owner: int, count: int) -> Salts:
    return CONTEXTS.salts(np.full((count, 2), owner, np.uint64))


class Written:
    """A text that is written piece by piece."""

    def __init__(self, texts: Texts, owner: int) -> None:
        self.texts, self.owner = texts, owner
        self.tokens: list[int] = []
        self.last = NOWHERE
        self.positions: list[int] = []

    def write(self, more: list[int]) -> None:
        first, self.tokens = len(self.tokens), self.tokens + more
        windows = windows_at(self.tokens, first - 1, len(self.tokens) - 1, CONTEXTS.width)
        lasts = self.texts.append(
            np.array([self.last]), np.array([len(more)]), np.array(more), windows, salts(self.owner, len(more))
        )
        self.last = int(lasts[0])
        self.positions += range(self.last + 1 - len(more), self.last + 1)

    def found(self) -> dict[int, int]:
        """Positions of occurrences, and how many tokens are sure to be the same."""
        window = windows_at(self.tokens, len(self.tokens) - 1, len(self.tokens), CONTEXTS.width)
        found = self.texts.find(window, salts(self.owner, 1), MOST)
        return {
            position: ORDERS[column]
            for position, column in zip(found.positions.tolist(), found.columns.tolist(), strict=True)
        }

    def expected(self) -> dict[int, int]:
        """The last MOST of each order that are not the end itself."""
        found: dict[int, int] = {}
        for order in ORDERS:
            padded = [-1] * order + self.tokens
            ends = [padded[end : end + order] for end in range(1, len(self.tokens) + 1)]  # that end at each index
            same = [index for index in range(len(ends) - 1) if ends[index] == ends[-1]]
            found |= {self.positions[index]: order for index in same[-MOST:]}
        return found


PIECES = st.lists(
    st.tuples(st.integers(1, 2), st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(PIECES)
def test_the_last_occurrences_of_every_context_are_found(pieces: list[tuple[int, list[int]]]) -> None:
    texts = Texts(1 << 18, CONTEXTS)
    both = {owner: Written(texts, owner) for owner in (1, 2)}
    for owner, tokens in pieces:
        both[owner].write(tokens)
        assert both[owner].found() == both[owner].expected()


@settings(max_examples=40, deadline=None)
@given(PIECES)
def test_continuations_stay_in_their_own_text(pieces: list[tuple[int, list[int]]]) -> None:
    texts = Texts(1 << 18, CONTEXTS)
    both = {owner: Written(texts, owner) for owner in (1, 2)}
    for owner, tokens in pieces:
        both[owner].write(tokens)
    for text in both.values():
        after = texts.continuations(np.array(text.positions, np.int64), 4).tolist()
        assert after == [(text.tokens[index + 1 :] + [-1] * 4)[:4] for index in range(len(text.tokens))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=6, max_size=25))
def test_what_the_ring_has_no_room_for_any_more_is_not_found(pieces: list[list[int]]) -> None:
    texts = Texts(0, CONTEXTS)
    text = Written(texts, 1)
    for tokens in pieces:
        text.write(tokens)
        kept = set(text.positions[-texts.size :])
        found = text.found()
        assert found.keys() <= kept
        for position in found:
            index = text.positions.index(position)
            want = (text.tokens[index + 1 :] + [-1] * 3)[:3]
            assert texts.continuations(np.array([position]), 3)[0].tolist() == want


def test_nothing_is_found_of_what_was_forgotten() -> None:
    texts = Texts(1 << 18, CONTEXTS)
    ours, theirs = Written(texts, 1), Written(texts, 2)
    for text in (ours, theirs):
        text.write([1, 2, 3, 1, 2, 3, 1])
    texts.forget(1, np.array(ours.positions))
    assert not ours.found()
    assert theirs.found() == theirs.expected()
    assert (texts.continuations(np.array(ours.positions[:-1]), 2) == -1).all()
