"""What a rule says of a request depends on nothing else in the batch, and greedy requests need no laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.step import NOT_ASKED, UNDRAWABLE
from speculation.dice import KeyedDice
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import Outcome, TargetRows
from speculation.rules.registry import RULES
from speculation.tree import ROOT, DraftBatch

VOCAB = 6


@st.composite
def steps(draw: st.DrawFn) -> tuple[DraftBatch, torch.Tensor, list[bool]]:
    """A draft, a law for every row, and which requests are greedy."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    parents, tokens = [], []
    for size in sizes:
        free = {ROOT: rng.permutation(VOCAB).tolist()}
        for node in range(size):
            parents.append(int(rng.integers(ROOT, node)))
            tokens.append(free[parents[-1]].pop())
            free[node] = rng.permutation(VOCAB).tolist()
    law = DraftLaw.POINT_MASS
    batch = DraftBatch(np.array(tokens, np.int64), np.array(parents, np.int64), np.cumsum([0, *sizes]), law, "any")
    greedy = [draw(st.booleans()) for _ in sizes]
    laws = rng.dirichlet(np.full(VOCAB, 0.3), batch.num_rows)
    point = np.repeat(greedy, batch.lengths + 1)
    laws[point] = np.eye(VOCAB)[laws[point].argmax(-1)]
    return batch, torch.tensor(laws, dtype=torch.float32), greedy


def verify(rule: str, drafts: DraftBatch, laws: torch.Tensor, greedy: list[bool], seeds: list[int]) -> Outcome:
    drawn = np.where(np.repeat(greedy, drafts.lengths + 1), laws.argmax(-1).numpy(), NOT_ASKED)
    random = ~np.repeat(greedy, drafts.lengths + 1)
    starts = np.where(greedy, -1, (np.cumsum(random) - random)[drafts.root_rows])
    rows = TargetRows(drawn, laws[torch.from_numpy(random)], starts)
    return RULES[rule].verify(drafts, rows, KeyedDice(seeds, [3] * len(seeds)))


def texts(outcome: Outcome) -> list[list[int]]:
    return [part.tolist() for part in np.split(outcome.emitted, outcome.emitted_offsets[1:-1])]


READING = sorted(rule.name for rule in RULES.values() if rule.reads_laws and DraftLaw.POINT_MASS in rule.laws)


@pytest.mark.parametrize("rule", [name for name in READING if name != "chain"])
@given(step=steps())
@settings(max_examples=40, deadline=None)
def test_a_request_fares_alone_as_it_does_among_others(
    rule: str, step: tuple[DraftBatch, torch.Tensor, list[bool]]
) -> None:
    drafts, laws, greedy = step
    together = texts(verify(rule, drafts, laws, greedy, list(range(len(greedy)))))
    for request in range(drafts.num_requests):
        start, end = drafts.root_rows[request], drafts.root_rows[request] + drafts.lengths[request] + 1
        alone = verify(rule, drafts.select([request]), laws[start:end], greedy[request : request + 1], [request])
        assert texts(alone) == [together[request]]


@pytest.mark.parametrize("rule", [name for name in READING if name != "chain"])
@given(step=steps())
@settings(max_examples=40, deadline=None)
def test_following_tokens_is_what_point_masses_come_to(
    rule: str, step: tuple[DraftBatch, torch.Tensor, list[bool]]
) -> None:
    drafts, laws, _ = step
    greedy = [True] * drafts.num_requests
    laws = torch.eye(VOCAB)[laws.argmax(-1)]
    by_tokens = verify(rule, drafts, laws, greedy, list(range(len(greedy))))
    by_laws = verify(rule, drafts, laws, [False] * len(greedy), list(range(len(greedy))))
    assert texts(by_tokens) == texts(by_laws)
    assert by_tokens.path.tolist() == by_laws.path.tolist()


@given(step=steps())
@settings(max_examples=40, deadline=None)
def test_what_is_emitted_is_the_path_and_one_token_more(step: tuple[DraftBatch, torch.Tensor, list[bool]]) -> None:
    drafts, laws, greedy = step
    outcome = verify("tree", drafts, laws, greedy, list(range(len(greedy))))
    for request, text in enumerate(texts(outcome)):
        path = outcome.path[outcome.path_offsets[request] : outcome.path_offsets[request + 1]]
        assert text[:-1] == drafts.tokens[path].tolist()
        assert drafts.parent_nodes[path].tolist() == [-1, *path.tolist()][: len(path)]
        assert outcome.accepted[path].all()
        assert (drafts.request_of[path] == request).all()
    assert outcome.accepted.sum() == outcome.num_accepted.sum()


def test_sampled_siblings_that_are_the_same_are_followed_once() -> None:
    drafts = DraftBatch(np.array([4, 4]), np.array([ROOT, ROOT]), np.array([0, 2]), DraftLaw.IID, "twins")
    outcome = RULES["sampled"].verify(drafts, TargetRows(np.array([4, 1, 2])), KeyedDice([0], [0]))
    assert (outcome.path.tolist(), outcome.emitted.tolist()) == ([0], [4, 1])


@pytest.mark.parametrize("rule", READING)
def test_a_law_that_is_not_numbers_ends_its_own_request_only(rule: str) -> None:
    drafts = DraftBatch.of_chains([[1], [1]], DraftLaw.POINT_MASS, "any")
    laws = torch.zeros(4, VOCAB).index_fill_(1, torch.tensor([1]), 1.0)
    laws[:2] = torch.nan
    outcome = verify(rule, drafts, laws, [False, False], [0, 1])
    assert texts(outcome) == [[UNDRAWABLE], [1, 1]]


def test_a_sampled_row_from_which_nothing_can_be_drawn_ends_the_path() -> None:
    drafts = DraftBatch.of_chains([[1, 2]], DraftLaw.POINT_MASS, "any")
    outcome = RULES["sampled"].verify(drafts, TargetRows(np.array([1, UNDRAWABLE, 3])), KeyedDice([0], [0]))
    assert outcome.emitted.tolist() == [1, UNDRAWABLE]


def test_requests_that_draft_nothing_get_a_token_of_the_targets_own() -> None:
    drafts = DraftBatch.of_chains([[], []], DraftLaw.POINT_MASS, "any")
    laws = torch.eye(VOCAB)[[2, 5]]
    assert texts(verify("tree", drafts, laws, [False, True], [0, 1])) == [[2], [5]]


def test_a_law_half_used_up_by_rounding_is_drawn_from_as_it_is() -> None:
    """p is q but for the last bit of a token, which is rejected by chance: nothing is left of p - q."""
    q = torch.tensor([[0.5, 0.5]])
    p = torch.tensor([[0.5 - 2**-25, 0.5 - 2**-26], [1.0, 0.0]])
    drafts = DraftBatch(
        np.array([0]), np.array([ROOT]), np.array([0, 1]), DraftLaw.IID, "near", q=QLaw(np.zeros(1, np.int64), q)
    )

    class Rejecting(KeyedDice):
        def accept(self, requests: object, depths: object, tries: object, chances: np.ndarray) -> np.ndarray:
            return np.zeros(len(chances), np.bool_)

    outcome = RULES["chain"].verify(
        drafts, TargetRows(np.full(2, NOT_ASKED), p, np.zeros(1, np.int64)), Rejecting([0], [0])
    )
    assert outcome.emitted[0] in (0, 1)
