"""What C++ learns and grows against its definition in Python."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speculation.drafters import native
from speculation.drafters.contexts import PRIVATE, SHARED, Contexts, windows_at
from speculation.drafters.growth import Branches, grow
from speculation.drafters.mixture import mixed
from speculation.drafters.native import NativeSuccessors
from speculation.drafters.successors import Successors
from speculation.laws import DraftLaw
from speculation.tree import DraftBatch

CONTEXTS = Contexts((1, 1, 2, 4), (SHARED, PRIVATE, SHARED, PRIVATE))
DOUBTS = np.array([2.0, 1.0, 0.5, 0.1], np.float32)
FADING, CERTAINTY = 0.55, np.float32(0.9)
CAME = 3
ROOMS = (0, 1 << 16)
"""Bytes: the smallest cache, in which keys drive each other out, and one that holds all."""


@pytest.fixture(autouse=True)
def library() -> None:
    if native.load() is None:
        pytest.skip("no compiler here")


@dataclass
class Both:
    """The same successors, taught by Python and by the library."""

    plain: Successors
    other: Successors
    library: NativeSuccessors

    @classmethod
    def of(cls, room: int) -> Both:
        plain, other = Successors(room, FADING), Successors(room, FADING)
        library = NativeSuccessors.of(other)
        assert library is not None
        return cls(plain, other, library)

    def learn(self, seed: int, texts: list[list[int]]) -> None:
        """What followed every context of these texts, with weights of which no two are the same."""
        random = np.random.default_rng(seed)
        windows = np.concatenate([windows_at(text, 0, len(text), CONTEXTS.width) for text in texts])
        owners = np.array([[10 + place, 1] for place, text in enumerate(texts) for _ in text], np.uint64)
        salts = CONTEXTS.salts(owners)
        tokens = random.integers(0, 12, (len(windows), CAME))
        weights = random.random((len(windows), CAME), np.float32) * (random.random((len(windows), CAME)) < 0.8)
        keys = CONTEXTS.keys(windows, salts)
        which = np.arange(len(keys)).repeat(keys.shape[1])
        self.plain.add(keys.reshape(-1), salts.owners.reshape(-1), tokens[which], weights[which])
        self.library.add(CONTEXTS, windows, salts, tokens, weights)

    def grow(self, texts: list[list[int]], budgets: list[int], floor: float, *, branches: bool) -> list[DraftBatch]:
        windows = np.concatenate([windows_at(text, len(text) - 1, len(text), CONTEXTS.width) for text in texts])
        salts = CONTEXTS.salts(np.array([[10 + place, 1] for place in range(len(texts))], np.uint64))

        def follow(of_request: np.ndarray, windows: np.ndarray) -> Branches:
            of = salts.of(of_request)
            law = mixed(*self.plain.after(CONTEXTS.keys(windows, of), of.owners), DOUBTS)
            return Branches(law.windows, law.tokens, CERTAINTY * law.chances)

        most = np.array(budgets)
        return [
            grow(follow, windows, most, floor, branches=branches, law=DraftLaw.POINT_MASS, drafter="some"),
            self.library.grow(
                *(CONTEXTS, salts, DOUBTS, float(CERTAINTY), windows, most, floor),
                branches=branches,
                law=DraftLaw.POINT_MASS,
                drafter="some",
            ),
        ]


TEXT = st.lists(st.integers(0, 11), min_size=1, max_size=12)
TEXTS = st.lists(TEXT, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ROOMS), st.lists(TEXTS, max_size=5), st.integers(0, 99))
def test_the_same_is_learned(room: int, rounds: list[list[list[int]]], seed: int) -> None:
    both = Both.of(room)
    for place, texts in enumerate(rounds):
        both.learn(seed + place, texts)
    assert (both.plain.table.tags == both.other.table.tags).all()
    assert (both.plain.table.claimed == both.other.table.claimed).all()
    weights = [successors.rows[:, 1].view(np.float32) for successors in (both.plain, both.other)]
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)
    held = weights[0] > 0
    assert (both.plain.rows[:, 0][held] == both.other.rows[:, 0][held]).all()


@example(  # two nodes are worth the same where the budget ends
    rounds=[[[3, 2, 0], [1, 1, 1, 1, 1]]], budgets=[26, 0, 0, 0], floor=0.0, branches=True
)
@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(TEXTS, min_size=1, max_size=4),
    budgets=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    floor=st.sampled_from([0.0, 0.02, 0.3]),
    branches=st.booleans(),
)
def test_the_same_trees_are_grown(
    rounds: list[list[list[int]]], budgets: list[int], floor: float, branches: bool
) -> None:
    both = Both.of(1 << 16)
    for seed, texts in enumerate(rounds):
        both.learn(seed, texts)
    budgets = budgets[: len(rounds[0])]
    expected, found = both.grow(rounds[0], budgets, floor, branches=branches)
    found.validate(12)
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.confidence is not None
    assert expected.confidence is not None
    for start, end in pairwise(found.offsets):
        ours, theirs = (
            dict(zip(paths(batch, start, end), batch.path_products(batch.confidence)[start:end].tolist(), strict=True))
            for batch in (found, expected)
        )
        assert sorted(ours.values()) == pytest.approx(sorted(theirs.values()), rel=1e-4)
        last = 1.0001 * min(theirs.values(), default=0.0)  # of those worth as little, either may be the one that fits
        assert {path for path, worth in ours.items() if worth > last} == {
            p for p, worth in theirs.items() if worth > last
        }
        both_have = ours.keys() & theirs.keys()
        assert {path: ours[path] for path in both_have} == pytest.approx(
            {path: theirs[path] for path in both_have}, rel=1e-4
        )


def paths(batch: DraftBatch, start: int, end: int) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(batch.tokens[start:end].tolist(), batch.parents[start:end].tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def test_a_long_text_is_learned_as_a_short_one() -> None:
    """Sizes at which sorting and sums go other ways."""
    both = Both.of(1 << 20)
    text = np.random.default_rng(0).integers(0, 5, 5000).tolist()
    both.learn(1, [text])
    weights = [successors.rows[:, 1].view(np.float32) for successors in (both.plain, both.other)]
    assert weights[0].any()
    assert weights[1] == pytest.approx(weights[0], rel=1e-4)
