"""Texts that an engine draws with drafts follow the law that the model, penalties and truncation make, under every rule
that compares laws: over several tokens, and so over several rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import speculation.rules.chain
from speculation.counters import DrafterCounts
from speculation.dice import KeyedDice
from speculation.rounds import Outcome, TargetRows
from speculation.tree import DraftBatch
from tests.chi_square import p_value
from tests.speculation.drawn_texts import Pair, drawn, joint_law

KEPT, LENGTH = 3, 3
REQUESTS = 800
P_VALUE = 1e-9
"""Seeds are fixed: the tests pass or fail always."""
PARAMS = {"temperature": 1.5, "top_k": KEPT, "repetition_penalty": 1.4, "presence_penalty": 0.6, "logit_bias": {4: 1.5}}
Logits = Callable[[Path, list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def law(pair: Pair, reference: Logits) -> NDArray[np.float64]:
    """[VOCAB] * LENGTH"""
    return joint_law(partial(reference, pair.folder), LENGTH, PARAMS)


def texts(pair: Pair, rule: str) -> tuple[NDArray[np.int64], DrafterCounts]:
    return drawn(pair, rule, LENGTH, PARAMS, REQUESTS)


@pytest.mark.parametrize("rule", ["sampled", "chain", "tree", "k_seq"])
def test_drawn_texts_follow_the_law(pair: Pair, law: NDArray[np.float64], rule: str) -> None:
    counts, of_drafts = texts(pair, rule)
    assert of_drafts.accepted_tokens > REQUESTS // 10
    if rule == "chain":
        alpha, positions = of_drafts.alpha_sum / of_drafts.alpha_positions, of_drafts.alpha_positions
        assert abs(of_drafts.accepted_tokens / positions - alpha) < 5 * (alpha * (1 - alpha) / positions) ** 0.5
    assert p_value(counts.ravel(), law.ravel()) > P_VALUE


def accept_first(drafts: DraftBatch, rows: TargetRows, dice: KeyedDice) -> Outcome:
    """Of every chain, if the target may say it at all."""
    assert rows.laws is not None
    assert rows.law_starts is not None
    nodes = drafts.offsets[:-1]
    accepted = np.zeros(drafts.num_nodes, np.bool_)
    accepted[nodes] = (rows.laws[rows.law_starts, drafts.tokens[nodes]] > 0).numpy()
    last = rows.laws[rows.law_starts + accepted[nodes]].argmax(-1)
    return Outcome.of(drafts, accepted, last.numpy())


def test_a_rule_that_accepts_too_much_is_found(
    pair: Pair, law: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation.rules.chain, "verify", accept_first)
    counts, _ = texts(pair, "chain")
    assert p_value(counts.ravel(), law.ravel()) < P_VALUE


def test_the_law_has_something_to_tell(law: NDArray[np.float64]) -> None:
    likely = law[law > 0]
    assert len(likely) == KEPT**LENGTH
    assert 1.0 / (likely**2).sum() > 4  # as many texts as good as equally likely
