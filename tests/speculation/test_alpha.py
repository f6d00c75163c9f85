"""alpha is the mass that the laws of target and drafter share, at every position where a draft was judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.step import NOT_ASKED, UNDRAWABLE
from speculation.dice import KeyedDice
from speculation.laws import DraftLaw
from speculation.overlap import MOST, Overlap, overlap
from speculation.rounds import Outcome, TargetRows
from speculation.rules.registry import RULES
from speculation.tree import DraftBatch
from tests.speculation.enumeration import CHAIN, TREE, Drafts, Shape, Texts, all_drafts

P, Q = Texts(3, 1), Texts(3, 2)


def laws_of(drafts: Drafts) -> TargetRows:
    laws = torch.tensor(np.stack([P.after(prefix) for rows in drafts.prefixes for prefix in rows]))
    return TargetRows(np.full(len(laws), NOT_ASKED), laws, drafts.batch.root_rows)


def by_definition(shape: Shape, drafts: Drafts, outcome: Outcome) -> Overlap:
    total, positions = 0.0, 0
    accepted = outcome.accepted.reshape(-1, len(shape))
    tokens = drafts.batch.tokens.reshape(-1, len(shape))
    for request, prefixes in enumerate(drafts.prefixes):
        for parent in sorted(set(shape)):
            if parent < 0 or accepted[request, parent]:
                p, q = P.after(prefixes[parent + 1]), Q.after(prefixes[parent + 1])
                first = tokens[request, list(shape).index(parent)]
                total += p[first] if drafts.batch.law is DraftLaw.POINT_MASS else np.minimum(p, q).sum()
                positions += 1
    return Overlap(total, positions)


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("law", DraftLaw)
def test_it_is_the_sum_of_the_lesser_of_both_laws_wherever_the_rule_has_come(
    law: DraftLaw, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculation.overlap.MOST", 10_000)
    drafts = all_drafts(shape, law, Q)
    rows, count = laws_of(drafts), drafts.batch.num_requests
    for seed in range(4):
        dice = KeyedDice(list(range(seed, seed + count)), [1] * count)
        outcome = RULES["tree"].verify(drafts.batch, rows, dice)
        found = overlap(drafts.batch, rows, outcome, np.zeros(count, np.bool_))
        expected = by_definition(shape, drafts, outcome)
        assert (found.positions, found.total) == (expected.positions, pytest.approx(expected.total))


def test_where_there_are_many_positions_some_stand_for_all() -> None:
    drafts = all_drafts(CHAIN, DraftLaw.IID, Q)
    rows, count = laws_of(drafts), drafts.batch.num_requests
    outcome = RULES["tree"].verify(drafts.batch, rows, KeyedDice(list(range(count)), [1] * count))
    found = overlap(drafts.batch, rows, outcome, np.zeros(count, np.bool_))
    expected = by_definition(CHAIN, drafts, outcome)
    assert found.positions == expected.positions > 3 * MOST
    assert found.total == pytest.approx(expected.total, rel=0.2)


def test_a_point_mass_is_as_likely_as_the_targets_own_token_is_the_same() -> None:
    """So verified by tokens it is seen on average, and exactly if the request is greedy."""
    drafts, draws = DraftBatch.of_chains([[2]], DraftLaw.POINT_MASS, "x"), np.array([[2, 0], [1, 0], [UNDRAWABLE, 0]])
    found = []
    for tokens in draws:
        rows = TargetRows(tokens)
        outcome = RULES["sampled"].verify(drafts, rows, KeyedDice([0], [0]))
        found.append(overlap(drafts, rows, outcome, np.zeros(1, np.bool_)))
    assert found == [Overlap(1.0, 1), Overlap(0.0, 1), Overlap(0.0, 1)]


def test_what_was_drawn_shows_nothing_of_alpha_by_one_token_unless_the_request_is_greedy() -> None:
    drafts = all_drafts(CHAIN[:1], DraftLaw.IID, Q)
    for greedy in (False, True):
        rows = TargetRows(np.zeros(drafts.batch.num_rows, np.int64))
        outcome = RULES["sampled"].verify(drafts.batch, rows, KeyedDice([0] * 3, [0] * 3))
        found = overlap(drafts.batch, rows, outcome, np.full(3, greedy))
        expected = Overlap(3 * float(Q.after(())[0]), 3) if greedy else Overlap(0.0, 0)
        assert (found.positions, found.total) == (expected.positions, pytest.approx(expected.total))


def test_requests_with_and_without_a_law_are_added_up() -> None:
    drafts = all_drafts(CHAIN[:1], DraftLaw.POINT_MASS, Q)
    both = DraftBatch.of_chains([[int(drafts.batch.tokens[0])]] * 2, DraftLaw.POINT_MASS, "x")
    laws = torch.tensor(P.after(()))[None].repeat(2, 1)
    rows = TargetRows(np.array([NOT_ASKED, NOT_ASKED, both.tokens[0], 0]), laws, np.array([0, -1]))
    outcome = Outcome.of(both, np.array([False, True]), np.zeros(2, np.int64))
    found = overlap(both, rows, outcome, np.array([False, True]))
    assert found == Overlap(pytest.approx(1.0 + P.after(())[both.tokens[0]]), 2)
