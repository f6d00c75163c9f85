"""Learning from steps that nobody drafted for takes no more than its share of their time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.allowance import SHARE, Allowance
from speculation.seen import PART, likeliest


@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=200), st.floats(0.0001, 0.05))
def test_no_more_is_spent_than_a_share_and_once(steps: list[float], cost: float) -> None:
    allowance, spent = Allowance(), 0.0
    for step in steps:
        if allowance.left:
            allowance.spend(cost)
            spent += cost
        allowance.earn(step)
    assert cost <= spent <= SHARE * sum(steps) + cost + 1e-9


@pytest.mark.parametrize("vocab", [8, PART, 20 * PART, 20 * PART + 1, 33 * PART - 1])
def test_the_likeliest_are_those_of_topk(vocab: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0] = torch.arange(vocab)  # the largest all in one part, or after the last
    logits[1] = -torch.arange(vocab).float()
    values, places = likeliest(logits, 8)
    assert torch.equal(values, logits.topk(8).values)
    assert torch.equal(logits.gather(1, places), values)
    assert all(len(set(row.tolist())) == 8 for row in places)
