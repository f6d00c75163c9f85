"""Token trees, against what plain Python says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InternalError
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.tree import ROOT, DraftBatch

VOCAB = 50


@st.composite
def batches(draw: st.DrawFn) -> DraftBatch:
    """Some requests, some without nodes."""
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5))
    parents = [draw(st.integers(ROOT, node - 1)) for size in sizes for node in range(size)]
    tokens = draw(st.permutations(range(VOCAB)))[: len(parents)]
    confidence = [draw(st.floats(0, 1, width=32)) for _ in parents]
    return DraftBatch(
        np.array(tokens, np.int64),
        np.array(parents, np.int64),
        np.cumsum([0, *sizes]),
        DraftLaw.POINT_MASS,
        "random",
        confidence=np.array(confidence, np.float32),
    )


def texts(batch: DraftBatch) -> list[list[tuple[int, ...]]]:
    """[requests][nodes] the tokens from the root down to each node, found the slow way."""
    found: list[list[tuple[int, ...]]] = []
    for request in range(batch.num_requests):
        start, end = batch.offsets[request : request + 2]
        of: list[tuple[int, ...]] = []
        for token, parent in zip(batch.tokens[start:end].tolist(), batch.parents[start:end].tolist(), strict=True):
            of.append((*(of[parent] if parent != ROOT else ()), token))
        found.append(of)
    return found


def flat(of: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [text for texts in of for text in texts]


@settings(max_examples=50, deadline=None)
@given(batches())
def test_paths_depths_and_ancestors_are_those_of_the_texts(batch: DraftBatch) -> None:
    batch.validate(VOCAB)
    every = texts(batch)
    assert batch.depths.tolist() == [len(text) for text in flat(every)]
    assert [tuple(batch.tokens[path[path >= 0]].tolist()) for path in batch.paths] == flat(every)
    for request, of in enumerate(every):
        above = [[below[: len(text)] == text for text in of] for below in of]
        assert batch.ancestors(request).tolist() == above


@settings(max_examples=50, deadline=None)
@given(batches())
def test_children_are_in_draw_order_under_the_row_that_judges_them(batch: DraftBatch) -> None:
    under: dict[int, list[int]] = {}
    for node, row in enumerate(batch.parent_rows.tolist()):
        under.setdefault(row, []).append(node)
    for row in range(batch.num_rows):
        start, end = batch.child_starts[row : row + 2]
        assert batch.children[start:end].tolist() == under.get(row, [])
        assert batch.sibling_ranks[batch.children[start:end]].tolist() == list(range(end - start))


@settings(max_examples=50, deadline=None)
@given(batches())
def test_rows_are_each_root_and_then_its_nodes(batch: DraftBatch) -> None:
    rows = [("root", request) for request in range(batch.num_requests)]
    at = dict(zip(batch.root_rows.tolist(), rows, strict=True))
    at |= {row: ("node", node) for node, row in enumerate(batch.rows.tolist())}
    assert sorted(at) == list(range(batch.num_rows))
    parents = batch.step_parents()
    for request in range(batch.num_requests):
        start, end = batch.root_rows[request], batch.root_rows[request] + batch.lengths[request] + 1
        assert parents[start] == -1
        assert (parents[start + 1 : end] + start).tolist() == batch.parent_rows[batch.request_of == request].tolist()


@settings(max_examples=50, deadline=None)
@given(batches(), st.data())
def test_pruning_leaves_the_first_nodes_of_each_request(batch: DraftBatch, data: st.DataObject) -> None:
    budgets = np.array([data.draw(st.integers(0, 8)) for _ in range(batch.num_requests)])
    smaller = batch.prune(budgets)
    smaller.validate(VOCAB)
    assert texts(smaller) == [of[:budget] for of, budget in zip(texts(batch), budgets.tolist(), strict=True)]


@settings(max_examples=50, deadline=None)
@given(batches(), st.data())
def test_keeping_and_cutting_go_by_what_is_above_a_node(batch: DraftBatch, data: st.DataObject) -> None:
    wanted = np.array([data.draw(st.booleans()) for _ in range(batch.num_nodes)], np.bool_)
    every = texts(batch)
    liked = {text for text, keep in zip(flat(every), wanted.tolist(), strict=True) if keep}
    kept, cut = batch.keep(wanted), batch.cut_below(~wanted)
    for smaller, shortest in ((kept, 0), (cut, 1)):
        smaller.validate(VOCAB)
        assert texts(smaller) == [
            [text for text in of if all(text[:i] in liked for i in range(1, len(text) + 1 - shortest))] for of in every
        ]
        confidences = dict(zip(batch.tokens.tolist(), batch.confidence.tolist(), strict=True))
        assert smaller.confidence.tolist() == [confidences[token] for token in smaller.tokens.tolist()]


@settings(max_examples=50, deadline=None)
@given(batches(), st.data())
def test_requests_can_be_selected_in_any_order(batch: DraftBatch, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, batch.num_requests - 1), unique=True))
    assert texts(batch.select(chosen)) == [texts(batch)[request] for request in chosen]


@settings(max_examples=50, deadline=None)
@given(batches())
def test_a_chain_is_a_tree_whose_nodes_all_hang_from_the_one_before(batch: DraftBatch) -> None:
    assert batch.chains.tolist() == [[len(text) for text in of] == list(range(1, len(of) + 1)) for of in texts(batch)]


@settings(max_examples=50, deadline=None)
@given(batches())
def test_path_products_multiply_what_is_above_and_the_node_itself(batch: DraftBatch) -> None:
    of_token = dict(zip(batch.tokens.tolist(), batch.confidence.tolist(), strict=True))
    expected = [float(np.prod([of_token[token] for token in text])) for text in flat(texts(batch))]
    assert batch.path_products(batch.confidence).tolist() == pytest.approx(expected)


def test_chains_are_made_of_lists() -> None:
    batch = DraftBatch.of_chains([[5, 6, 7], [], [8]], DraftLaw.POINT_MASS, "lists")
    assert texts(batch) == [[(5,), (5, 6), (5, 6, 7)], [], [(8,)]]
    assert DraftBatch.of_chains([[]], DraftLaw.POINT_MASS, "lists").num_nodes == 0


# --- what is no tree -----------------------------------------------------------------------------------------------

FORK = DraftBatch(np.array([3, 4, 3]), np.array([ROOT, ROOT, 1]), np.array([0, 3]), DraftLaw.POINT_MASS, "wrong")
Q = QLaw(np.array([0, 0, 1]), torch.full((2, VOCAB), 1 / VOCAB))


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (replace(FORK, offsets=np.array([0, 2])), "offsets don't cover 3 nodes"),
        (replace(FORK, offsets=np.array([0, 4, 3])), "offsets"),
        (replace(FORK, parents=np.array([ROOT, 1, 0])), "parents"),
        (replace(FORK, parents=np.array([ROOT, 2, 1])), "parents"),
        (replace(FORK, parents=np.array([ROOT, -2, 1])), "parents"),
        (replace(FORK, parents=np.array([ROOT])), "1 parents for 3 tokens"),
        (replace(FORK, offsets=np.array([0, 2, 3])), "parents"),
        (replace(FORK, tokens=np.array([3, VOCAB, 3])), f"tokens: one is not in a vocabulary of {VOCAB}"),
        (replace(FORK, tokens=np.array([3, -1, 3])), "tokens"),
        (replace(FORK, tokens=np.array([3, 3, 3])), "tokens: siblings are the same"),
        (replace(FORK, confidence=np.ones(2, np.float32)), "confidence: 2 numbers for 3 nodes"),
        (replace(FORK, q=Q), "q: one for the law point_mass"),
        (replace(FORK, law=DraftLaw.IID), "q: none for the law iid"),
        (replace(FORK, law=DraftLaw.IID, q=QLaw(Q.rows[:2], Q.probs)), "q: rows for 2 of 3 nodes"),
        (replace(FORK, law=DraftLaw.IID, q=QLaw(np.array([0, 1, 1]), Q.probs)), "q: siblings from different laws"),
    ],
)
def test_what_is_no_tree_is_refused_by_drafter_and_field(batch: DraftBatch, problem: str) -> None:
    with pytest.raises(InternalError, match=f"drafter wrong proposed no valid tree: {problem}"):
        batch.validate(VOCAB)


def test_siblings_may_be_the_same_if_they_were_drawn_independently() -> None:
    replace(FORK, tokens=np.array([3, 3, 3]), law=DraftLaw.IID, q=Q).validate(VOCAB)


def test_nodes_that_were_drawn_are_not_chosen_by_value() -> None:
    drawn = replace(FORK, law=DraftLaw.WITHOUT_REPLACEMENT, q=Q)
    with pytest.raises(InternalError, match="can't be chosen by value"):
        drawn.keep(np.array([True, False, True]))
    assert drawn.cut_below(np.array([False, True, False])).tokens.tolist() == [3, 4]
    assert drawn.prune(np.array([2])).q.rows.tolist() == [0, 0]


def test_a_law_in_bfloat16_is_refused() -> None:
    with pytest.raises(InternalError, match=r"law is torch\.bfloat16: draw from float32"):
        QLaw(np.zeros(1, np.int64), torch.ones(1, 1, dtype=torch.bfloat16))
