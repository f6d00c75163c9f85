"""Arrivals follow the gamma law they claim."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serving.arrivals import arrival_offsets


@given(
    n=st.integers(1, 200),
    rate=st.floats(0.01, 1e4),
    burstiness=st.floats(1e-3, 1e3) | st.just(math.inf),
    seed=st.integers(0, 9),
)
def test_offsets_ascend_and_the_last_falls_on_n_over_rate(n, rate, burstiness, seed):
    offsets = arrival_offsets(n, rate, burstiness, np.random.default_rng(seed))
    assert len(offsets) == n
    assert offsets[0] >= 0
    assert (np.diff(offsets) >= 0).all()
    assert offsets[-1] == pytest.approx(n / rate)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_variation_of_their_gamma_shape(burstiness):
    gaps = np.diff(arrival_offsets(50_000, 20.0, burstiness, np.random.default_rng(1)))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.02)
    # The squared coefficient of variation of Gamma(k) is 1/k; its skewness 2/sqrt(k).
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.06)
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 / math.sqrt(burstiness), rel=0.12)


def test_burstiness_1_is_a_poisson_process():
    gaps = np.diff(arrival_offsets(50_000, 10.0, 1.0, np.random.default_rng(2)))
    for t in (0.05, 0.1, 0.3):
        assert (gaps > t).mean() == pytest.approx(math.exp(-10 * t), abs=0.01)


def test_infinite_burstiness_is_a_metronome():
    np.testing.assert_allclose(arrival_offsets(4, 2.0, math.inf, np.random.default_rng(0)), [0.5, 1.0, 1.5, 2.0])


def test_infinite_rate_sends_everything_at_once():
    assert arrival_offsets(3, math.inf, 1.0, np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_the_same_seed_gives_the_same_arrivals():
    one, two, other = (arrival_offsets(20, 5.0, 1.0, np.random.default_rng(s)) for s in (3, 3, 4))
    assert one.tolist() == two.tolist() != other.tolist()
