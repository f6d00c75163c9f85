"""Forecasts, on series whose future is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import ConfigError
from placement.forecast import NAMES, Constant, Forecast, HoltWinters, Kalman, maker, squared_error


def after(forecast: Forecast, series: list[float]) -> Forecast:
    for value in series:
        forecast.observe(value)
    return forecast


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_foreseen_of_nothing(name: str) -> None:
    assert math.isnan(maker(name)().ahead(1))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_change_goes_on(name: str) -> None:
    forecast = after(maker(name)(), [7.0] * 30)
    assert [forecast.ahead(steps) for steps in (1, 5, 50)] == pytest.approx([7.0] * 3)


def test_constant_is_the_mean_of_the_last_few() -> None:
    assert after(Constant(memory=3), [100.0, 1.0, 2.0, 6.0]).ahead(9) == pytest.approx(3.0)


@pytest.mark.parametrize("make", [lambda: HoltWinters(damping=1.0), lambda: Kalman(damping=1.0)])
def test_a_trend_that_does_not_fade_is_extrapolated(make) -> None:
    forecast = after(make(), [3.0 + 0.5 * step for step in range(300)])
    assert forecast.ahead(10) == pytest.approx(3.0 + 0.5 * 309, rel=1e-3)


@pytest.mark.parametrize("make", [HoltWinters, Kalman])
def test_a_trend_fades_with_distance(make) -> None:
    """0.5 · (0.9 + 0.81 + …) is 4.5 at the most."""
    forecast = after(make(), [0.5 * step for step in range(300)])
    near, far, farthest = (forecast.ahead(steps) for steps in (1, 20, 10_000))
    assert near < far < farthest < 0.5 * 299 + 4.5 + 0.5
    assert farthest == pytest.approx(forecast.ahead(5000))


def seasonal(steps: int, season: int = 8, trend: float = 0.0) -> list[float]:
    return [50 + trend * step + 20 * math.sin(2 * math.pi * step / season) for step in range(steps)]


@pytest.mark.parametrize("trend", [0.0, 0.3])
def test_a_season_is_known_once_it_was_seen_twice(trend: float) -> None:
    series = seasonal(40, trend=trend)
    forecast = after(HoltWinters(8, damping=1.0), series[:16])
    assert [forecast.ahead(steps) for steps in range(1, 17)] == pytest.approx(series[16:32])
    for place in range(16, 24):
        assert forecast.ahead(1) == pytest.approx(series[place])
        forecast.observe(series[place])


def test_a_season_in_noise_is_foreseen_better_than_without_one() -> None:
    rng = np.random.default_rng(0)
    series = [value + rng.normal(0, 3) for value in seasonal(200)]
    with_it, without = squared_error(HoltWinters(8), series), squared_error(HoltWinters(), series)
    assert with_it < without / 3


def test_the_gain_of_a_level_that_walks_is_that_in_closed_form() -> None:
    """Without a slope the variance settles at p = (q + √(q² + 4q)) / 2 before an observation, and the gain is
    p / (p + 1) (Harvey, 1989, 4.3.2)."""
    q, forecast = 0.3, after(Kalman(level=0.3, slope=0.0, damping=0.0), [0.0] * 500)
    forecast.observe(1.0)
    p = (q + math.sqrt(q**2 + 4 * q)) / 2
    assert forecast.ahead(1) == pytest.approx(p / (p + 1), rel=0.02)


def test_weights_are_those_that_would_have_foreseen_the_past_best() -> None:
    rng = np.random.default_rng(1)
    noise = (20 + rng.normal(0, 3, 200)).tolist()
    walk = (20 + np.cumsum(rng.normal(0, 3, 200))).tolist()
    for name in ("holt-winters", "kalman"):
        calm, quick = maker(name, warm=noise), maker(name, warm=walk)
        assert squared_error(calm(), noise) < squared_error(quick(), noise)
        assert squared_error(quick(), walk) < squared_error(calm(), walk)
        assert squared_error(calm(), noise) <= squared_error(maker(name)(), noise)


def test_a_step_is_followed_by_all() -> None:
    for name in NAMES:
        assert after(maker(name)(), [1.0] * 20 + [4.0] * 20).ahead(1) == pytest.approx(4.0, rel=0.1)


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no forecast is called 'prophet'; there are constant, holt-winters, kalman"):
        maker("prophet")
    with pytest.raises(ConfigError, match="the forecast kalman knows no season: take holt-winters"):
        maker("kalman", season=8)
