"""What C++ says of trees, their outcomes and their counts against NumPy, which defines them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation import native, shape
from speculation.acceptance import Acceptance
from speculation.rounds import Outcome
from speculation.rules.walk import follow
from speculation.shape import Shape
from speculation.tree import DraftBatch
from tests.speculation.test_tree import batches

ARRAYS = ("request_of", "ranks", "parent_nodes", "parent_rows", "depths", "sibling_ranks")
BUDGET = 8


@pytest.fixture(autouse=True)
def library() -> None:
    if native.load() is None:
        pytest.skip("no compiler here")


def both(batch: DraftBatch) -> tuple[DraftBatch, DraftBatch]:
    """The same twice: C++ is asked about the first, and never about the second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "load", lambda: None)
        plain = replace(batch)
        assert plain.shape is None
    fast = replace(batch)
    assert isinstance(fast.shape, Shape)
    return fast, plain


@settings(max_examples=60, deadline=None)
@given(batches())
def test_nodes_are_where_numpy_says(batch: DraftBatch) -> None:
    fast, plain = both(batch)
    for name in ARRAYS:
        assert getattr(fast, name).tolist() == getattr(plain, name).tolist(), name
    assert batch.confidence is not None
    products = [one.path_products(batch.confidence) for one in (fast, plain)]
    assert products[0] == pytest.approx(products[1])


@settings(max_examples=60, deadline=None)
@given(batches(), st.data())
def test_the_same_nodes_are_accepted_and_counted(batch: DraftBatch, data: st.DataObject) -> None:
    tokens = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=batch.num_rows, max_size=batch.num_rows)), np.int64
    )
    fast, plain = both(replace(batch, tokens=batch.tokens % 4))  # siblings may be the same
    (accepted, last), (expected, expected_last) = follow(fast, tokens), follow(plain, tokens)
    assert accepted.tolist() == expected.tolist()
    assert last.tolist() == expected_last.tolist()
    asked, classes = np.maximum(batch.lengths, 2), [f"{r % 2}" for r in range(batch.num_requests)]
    stats = Acceptance(BUDGET), Acceptance(BUDGET)
    for one, drafts in zip(stats, (fast, plain), strict=True):
        one.observe(drafts, Outcome.of(drafts, accepted, last), asked, classes)
    found = [one.prospects(["random"] * len(classes), classes) for one in stats]
    assert found[0].gains == pytest.approx(found[1].gains)
    assert found[0].fills == pytest.approx(found[1].fills)
    assert stats[0].alpha("random") == pytest.approx(stats[1].alpha("random"))


def test_what_is_no_tree_has_no_shape() -> None:
    offsets = np.array([0, 2])
    for parents in ([-1, 1], [-2, 0], [-1, 0, 0], [-1]):
        assert Shape.of(np.array(parents), offsets) is None
    assert Shape.of(np.array([-1, 0]), np.array([0, 3, 2])) is None
    assert Shape.of(np.array([-1, 0]), np.array([1, 2])) is None
