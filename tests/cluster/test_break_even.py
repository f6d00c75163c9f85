"""When a hand-off is worth it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.break_even import MIN_OBSERVATIONS, BreakEven, FirstGaps, Line


def measured(fixed: float, per_token: float, prefill: float) -> BreakEven:
    """Hand-offs of n tokens take fixed + per_token n seconds, their prefill `prefill` n."""
    known = BreakEven()
    for count in range(MIN_OBSERVATIONS):
        known.observe_handoff(100 * (count + 1), fixed + per_token * 100 * (count + 1))
    known.observe_prefill(1000, 1000 * prefill)
    return known


def longest_that_stays(known: BreakEven, num_running: int = 0) -> int:
    return max((n for n in range(known.max_tokens + 1) if known.stays(n, 0, num_running)), default=-1)


def test_everything_is_handed_over_until_something_was_measured() -> None:
    assert not BreakEven().stays(1, 0, 0)
    fresh = BreakEven()
    for _ in range(MIN_OBSERVATIONS - 1):
        fresh.observe_handoff(10, 1.0)
    fresh.observe_prefill(10, 0.01)
    assert not fresh.stays(1, 0, 0)


def test_short_prompts_stay_up_to_where_their_prefill_takes_as_long_as_the_hand_off() -> None:
    assert longest_that_stays(measured(0.0105, 0.0, 0.001)) == 10
    assert longest_that_stays(measured(0.010, 0.0005, 0.001)) == pytest.approx(20, abs=1)


def test_the_more_run_there_the_fewer_stay() -> None:
    assert longest_that_stays(measured(0.0105, 0.0, 0.001), num_running=5) == 2


def test_a_link_slower_than_the_prefill_moves_only_what_is_too_long_to_stay() -> None:
    known = measured(0.001, 0.002, 0.001)
    assert longest_that_stays(known) == known.max_tokens
    assert not known.stays(known.max_tokens + 1, 0, 0)


def test_tokens_that_would_be_computed_twice_speak_for_staying() -> None:
    assert BreakEven().stays(100, 100, 1)
    assert not BreakEven().stays(100, 99, 1)


@pytest.mark.parametrize("limit", [0, 1, 64])
def test_a_given_limit_settles_it(limit: int) -> None:
    given_limit = BreakEven(limit)
    assert all(given_limit.stays(n, 1000, 0) == (n < limit) for n in range(1000))


@given(st.floats(0, 10), st.floats(0, 0.1), st.lists(st.integers(1, 10_000), min_size=2, max_size=60, unique=True))
def test_the_line_is_found_through_points_on_it(intercept: float, slope: float, xs: list[int]) -> None:
    line = Line()
    for x in xs:
        line.observe(x, intercept + slope * x)
    found = line.fit()
    spread = max(xs) - min(xs)
    if spread > 0.2 * max(xs):
        assert found == pytest.approx((intercept, slope), rel=1e-2, abs=1e-3)


def test_a_line_never_predicts_less_than_nothing() -> None:
    falling, steep = Line(), Line()
    for x, y in [(1, 5.0), (10, 1.0), (20, 0.0)]:
        falling.observe(x, y)
        steep.observe(x + 100, 10.0 * x)
    assert falling.fit()[1] == 0.0
    assert steep.fit()[0] == 0.0


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(-1, 1)), min_size=1, max_size=60))
def test_no_measurements_make_a_line_that_falls_or_begins_below_nothing(points: list[tuple[int, float]]) -> None:
    line = Line()
    for x, y in points:
        line.observe(x, y)
    assert all(part >= 0.0 for part in line.fit())


def test_a_hand_off_that_costs_nothing_is_found_to_whatever_the_steps_vary_by() -> None:
    random = Random(0)
    line = Line()
    for _ in range(1000):
        gaps = FirstGaps(100)
        now, extra = 0.0, None
        while extra is None:
            extra = gaps.heard(1, now)
            now += random.choice([0.01, 0.01, 0.01, 0.04])
        line.observe(100, extra)
    assert line.fit()[0] < 0.002


def test_what_is_old_is_forgotten() -> None:
    line = Line()
    for _ in range(1000):
        line.observe(10, 1.0)
    for _ in range(500):
        line.observe(10, 2.0)
    assert line.fit() == (pytest.approx(2.0, abs=1e-3), 0.0)


def test_the_first_gap_is_measured_against_the_second() -> None:
    gaps = FirstGaps(100)
    assert gaps.heard(1, 10.0) is None
    assert gaps.heard(1, 10.5) is None
    assert gaps.heard(1, 10.6) == pytest.approx(0.4)


def test_tokens_that_come_together_have_no_gap() -> None:
    gaps = FirstGaps(100)
    assert gaps.heard(1, 10.0) is None
    assert gaps.heard(2, 10.5) == pytest.approx(0.5)
