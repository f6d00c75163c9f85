"""Trees that are drawn from a draft model's law: shapes that don't depend on tokens, and a q that is the law they were
drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from speculation.drafters.draft_model_draws import SUPPORT, Drawn, Shape
from speculation.drafters.draft_model_steps import Nodes
from speculation.drafters.prefixes import LONGEST
from speculation.laws import DraftLaw
from speculation.tree import ROOT, DraftBatch
from tests.chi_square import p_value
from tests.engine.driver import tokens
from tests.speculation.drafters.draft_models import VOCAB, logprobs, made, path_tokens, propose, request

IID, WITHOUT_REPLACEMENT = DraftLaw.IID, DraftLaw.WITHOUT_REPLACEMENT
FIRST = np.array([0.5, 0.3, 0.2])
AFTER = np.array([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.25, 0.25, 0.5]])
"""[first token, next token]"""


def trees(law: DraftLaw, budget: int, count: int = 1, *, temperature: float = 1.0, floor: float = 0.0) -> DraftBatch:
    """Of a model that has these two laws; requests differ in their seeds."""
    requests = [request(key, [1], seed=key, temperature=temperature) for key in range(count)]
    drawn = Drawn(requests, np.full(count, budget), floor, Shape(12, branches=True), law)

    def logits(nodes: Nodes) -> torch.Tensor:
        return torch.from_numpy(np.log(AFTER[nodes.paths[:, -1]]).astype(np.float32))

    drawn.draw(torch.from_numpy(np.log(FIRST).astype(np.float32)).expand(count, -1), logits)
    drafts = drawn.drafts("draft_model")
    drafts.validate(3)
    return drafts


# --- shapes --------------------------------------------------------------------------------------------------------


def test_the_first_nodes_are_the_best_tree_of_so_many() -> None:
    large = Shape(40, branches=True)
    assert (np.diff(large.worths) <= 0).all()
    assert (large.parents < np.arange(40)).all()
    for size in (1, 5, 17):
        assert Shape(size, branches=True).parents.tolist() == large.parents[:size].tolist()


def test_without_branches_it_is_a_chain() -> None:
    assert Shape(5, branches=False).parents.tolist() == [ROOT, 0, 1, 2, 3]
    assert Shape(100, branches=False).size == LONGEST


@pytest.mark.parametrize("law", [IID, WITHOUT_REPLACEMENT])
def test_a_smaller_budget_draws_the_same_nodes(law: DraftLaw) -> None:
    smaller, larger = trees(law, 4, 20), trees(law, 9, 20).prune(np.full(20, 4))
    assert [list(path_tokens(smaller, index)) for index in range(20)] == [
        list(path_tokens(larger, index)) for index in range(20)
    ]


def test_what_is_not_worth_the_floor_is_not_drawn() -> None:
    assert trees(IID, 12, floor=0.3).num_nodes == int((Shape(12, branches=True).worths >= 0.3).sum()) > 0


# --- laws ----------------------------------------------------------------------------------------------------------


def test_tokens_come_by_their_law() -> None:
    """Two siblings and the first child of the first, together, over many seeds."""
    shape = Shape(12, branches=True)
    (first, second), child = shape.children[ROOT, :2], shape.children[0, 0]
    for law in (IID, WITHOUT_REPLACEMENT):
        drafts = trees(law, 1 + max(first, second, child), 4000)
        found = drafts.tokens.reshape(4000, -1)[:, [first, second, child]]
        counts = np.bincount(found @ [9, 3, 1], minlength=27)
        siblings = np.outer(FIRST, FIRST)
        if law is WITHOUT_REPLACEMENT:
            siblings = siblings * (1 - np.eye(3)) / (1 - FIRST)[:, None]
        assert p_value(counts, (siblings[:, :, None] * AFTER[:, None, :]).ravel()) > 1e-6


def test_q_is_the_law_of_the_parent() -> None:
    drafts = trees(WITHOUT_REPLACEMENT, 9, 50)
    assert drafts.q is not None
    q = drafts.q.of(np.arange(drafts.num_nodes), drafts.tokens)
    above = drafts.parent_nodes
    expected = np.where(above == ROOT, FIRST[drafts.tokens], AFTER[drafts.tokens[above], drafts.tokens])
    np.testing.assert_allclose(q, expected, rtol=1e-5)


def test_where_nothing_is_left_to_draw_a_sibling_and_what_hangs_from_it_are_missing() -> None:
    """A fourth of three tokens."""
    shape = Shape(12, branches=True)
    assert (shape.parents == ROOT).sum() < 4
    wide = Drawn([request(0, [1], temperature=1.0)], np.array([60]), 0.0, Shape(60, branches=True), WITHOUT_REPLACEMENT)
    rows = torch.zeros(1, 3)
    wide.draw(rows, lambda nodes: rows.expand(len(nodes.requests), -1))
    drafts = wide.drafts("draft_model")
    drafts.validate(3)
    assert drafts.num_nodes < 60
    assert np.bincount(drafts.parent_rows).max() == 3


def test_greedy_requests_get_the_likeliest_tokens() -> None:
    """Siblings are different ones, also where others may be the same."""
    for law in (IID, WITHOUT_REPLACEMENT):
        drafts = trees(law, 12, temperature=0.0)
        assert drafts.tokens[:3].tolist() == [0, 1, 0], "a chain of the likeliest"
        assert drafts.tokens[drafts.parents == ROOT].tolist() == [0, 1, 2][: (drafts.parents == ROOT).sum()]


@pytest.mark.parametrize(("law", "branches"), [(IID, False), (IID, True), (WITHOUT_REPLACEMENT, True)])
def test_a_model_draws_by_the_likeliest_part_of_its_law(
    make_checkpoint: Callable[..., Path],
    reference: Callable[[Path, Sequence[int]], torch.Tensor],
    law: DraftLaw,
    branches: bool,
) -> None:
    folder = make_checkpoint()
    drafter = made(folder, law=law, branches=branches)
    requests = [request(key, tokens(11 + key, seed=key), seed=key, temperature=0.7) for key in range(3)]
    drafts = propose(drafter, requests, 10)
    assert drafts.q is not None
    assert drafts.lengths.tolist() == [10] * 3
    q = drafts.q.of(np.arange(drafts.num_nodes), drafts.tokens)
    for index, one in enumerate(requests):
        for node, path in enumerate(path_tokens(drafts, index), int(drafts.offsets[index])):
            probs = logprobs(reference(folder, [*one.token_ids, *path[:-1]])[-1] / 0.7).exp()
            kept = probs.sort(descending=True).values[:SUPPORT].sum()
            assert q[node] == pytest.approx(float(probs[path[-1]] / kept), rel=1e-3)
    assert SUPPORT < VOCAB
