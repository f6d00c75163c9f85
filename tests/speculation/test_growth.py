"""Choosing nodes of drafts by what they are worth, and that it leaves the law of drawn ones what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from speculation.controllers.growth import grow
from speculation.laws import DraftLaw
from speculation.rules.registry import RULES
from speculation.tree import DraftBatch
from tests.speculation.enumeration import TREE, Drafts, Law, Texts, all_drafts, output_law, total_variation
from tests.speculation.test_tree import Q, batches

Choose = Callable[[DraftBatch, NDArray[np.float32], int], DraftBatch]


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(0, 12))
def test_no_other_trees_of_as_many_nodes_are_accepted_more(batch: DraftBatch, count: int) -> None:
    values = batch.path_products(batch.confidence)
    grown = grow(batch, batch.confidence, count)
    grown.validate(50)
    assert grown.num_nodes == min(count, batch.num_nodes)
    if batch.num_nodes <= 8:
        best = max(sum(values[list(nodes)]) for nodes in combinations(range(batch.num_nodes), grown.num_nodes))
        assert grown.path_products(grown.confidence).sum() == pytest.approx(best)


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(1, 12), st.data())
def test_whether_a_drawn_node_is_chosen_does_not_depend_on_its_own_token(
    batch: DraftBatch, count: int, data: st.DataObject
) -> None:
    if not batch.num_nodes:
        return
    drawn = replace(batch, law=DraftLaw.WITHOUT_REPLACEMENT)
    node = data.draw(st.integers(0, batch.num_nodes - 1))
    other = batch.confidence.copy()
    other[node] = data.draw(st.floats(0, 1, width=32))
    token = batch.tokens[node]
    kept = [token in grow(drawn, confidence, count).tokens for confidence in (batch.confidence, other)]
    assert kept[0] == kept[1]


def law_of_chosen(choose: Choose, p: Texts, q: Texts) -> Law:
    """Of what the rule makes of the two or three nodes that are chosen of each draft, by q of their tokens."""
    every = all_drafts(TREE, DraftLaw.WITHOUT_REPLACEMENT, q)
    law = np.zeros((p.vocab,) * 3)
    for request, (prefixes, weight) in enumerate(zip(every.prefixes, every.weights, strict=True)):
        draft = every.batch.select([request])
        confidence = draft.q.of(np.arange(draft.num_nodes), draft.tokens).astype(np.float32)
        marked = replace(draft, confidence=np.arange(draft.num_nodes, dtype=np.float32))
        chosen = choose(marked, confidence, 2)
        rows = [prefixes[0], *(prefixes[int(node) + 1] for node in chosen.confidence)]
        law += output_law(Drafts(chosen, np.array([weight]), [rows]), RULES["tree"], p, 3)
    return law


def test_the_output_law_is_the_targets_when_drawn_trees_are_grown() -> None:
    p, q = Texts(3, 1), Texts(3, 2)
    assert total_variation(law_of_chosen(grow, p, q), p.joint(3)) < 1e-12


def test_it_is_not_when_nodes_are_chosen_by_value() -> None:
    def by_value(drafts: DraftBatch, confidence: NDArray[np.float32], count: int) -> DraftBatch:
        values = drafts.path_products(confidence)
        return drafts.only(np.sort(np.argsort(-values, kind="stable")[:count]))

    p, q = Texts(3, 1), Texts(3, 2)
    assert total_variation(law_of_chosen(by_value, p, q), p.joint(3)) > 0.01


def test_what_elder_siblings_are_worth_counts_against_a_drawn_node() -> None:
    fork = DraftBatch(np.array([1, 2, 3]), np.array([-1, -1, 0]), np.array([0, 3]), DraftLaw.IID, "drawn", q=Q)
    sure, unsure = np.array([0.9, 0.5, 0.1], np.float32), np.array([0.2, 0.5, 0.1], np.float32)
    assert grow(fork, sure, 2).tokens.tolist() == [1, 3]
    assert grow(fork, unsure, 2).tokens.tolist() == [1, 2]
