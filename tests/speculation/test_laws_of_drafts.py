"""The same law may be kept dense, over a reduced vocabulary or by its support: rules can't tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.step import NOT_ASKED
from speculation.dice import KeyedDice
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import Outcome, TargetRows
from speculation.rules.registry import RULES
from speculation.tree import ROOT, DraftBatch

VOCAB = 12
REQUESTS = 64
PARENTS = (ROOT, ROOT, 0)
REDUCED = torch.tensor([11, 2, 7, 5])


def laws() -> dict[str, QLaw]:
    """Three laws for each request, of the children of the root and of the first node."""
    rng = np.random.default_rng(3)
    small = torch.tensor(rng.dirichlet(np.ones(4), REQUESTS * 2), dtype=torch.float32)
    dense = torch.zeros(len(small), VOCAB).index_copy_(1, REDUCED, small)
    shuffled = torch.tensor([rng.permutation(4).tolist() for _ in range(len(small))])
    support = torch.cat([REDUCED[shuffled], torch.zeros(len(small), 1, dtype=torch.int64)], 1)
    padded = torch.cat([small.gather(1, shuffled), torch.zeros(len(small), 1)], 1)
    rows = (np.arange(REQUESTS)[:, None] * 2 + np.array([0, 0, 1])).ravel()
    return {
        "dense": QLaw(rows, dense),
        "reduced": QLaw(rows, small, REDUCED),
        "support": QLaw(rows, padded, support),
    }


def verified(rule: str, law: DraftLaw, q: QLaw) -> Outcome:
    rng = np.random.default_rng(5)
    p = torch.tensor(rng.dirichlet(np.ones(VOCAB), REQUESTS * 4), dtype=torch.float32)
    pairs = np.array([rng.permutation(4)[:2] for _ in range(REQUESTS)])
    picks = np.concatenate([pairs, rng.integers(0, 4, (REQUESTS, 1))], 1)
    drafts = DraftBatch(
        REDUCED.numpy()[picks].ravel(), np.tile(PARENTS, REQUESTS), np.arange(REQUESTS + 1) * 3, law, "drawn", q=q
    )
    drafts.validate(VOCAB)
    rows = TargetRows(np.full(drafts.num_rows, NOT_ASKED), p, drafts.root_rows)
    return RULES[rule].verify(drafts, rows, KeyedDice(range(REQUESTS), [4] * REQUESTS))


@pytest.mark.parametrize("form", ["reduced", "support"])
@pytest.mark.parametrize(
    ("rule", "law"),
    [("tree", DraftLaw.IID), ("tree", DraftLaw.WITHOUT_REPLACEMENT), ("k_seq", DraftLaw.IID)],
)
def test_the_form_of_a_law_changes_nothing(rule: str, law: DraftLaw, form: str) -> None:
    expected, got = (verified(rule, law, laws()[name]) for name in ("dense", form))
    assert 20 < expected.num_accepted.sum() < 2 * REQUESTS
    assert got.emitted.tolist() == expected.emitted.tolist()
    assert got.path.tolist() == expected.path.tolist()


def test_probabilities_are_found_in_every_form() -> None:
    tokens = np.tile(np.array([2, 11, 6]), REQUESTS)
    found = [law.of(np.arange(len(tokens)), tokens).tolist() for law in laws().values()]
    assert found[0] == found[1] == found[2]
    assert found[0][2] == 0.0
