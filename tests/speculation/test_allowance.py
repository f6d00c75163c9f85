"""Learning from steps that nobody drafted for takes no more than its share of their time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from speculation.allowance import SHARE, Allowance


@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=200), st.floats(0.0001, 0.05))
def test_no_more_is_spent_than_a_share_and_once(steps: list[float], cost: float) -> None:
    allowance, spent = Allowance(), 0.0
    for step in steps:
        if allowance.left:
            allowance.spend(cost)
            spent += cost
        allowance.earn(step)
    assert cost <= spent <= SHARE * sum(steps) + cost + 1e-9
