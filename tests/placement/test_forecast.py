"""Forecasts, on series whose future is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import ConfigError
from placement.arima import Arima
from placement.forecast import Constant, Forecast, HoltWinters, Kalman, maker, squared_error
from placement.forecast_names import NAMES

HERE = [name for name in NAMES if name != "prophet"]
"""Prophet takes a package of its own, and is tested by itself."""


def after(forecast: Forecast, series: list[float]) -> Forecast:
    for value in series:
        forecast.observe(value)
    return forecast


@pytest.mark.parametrize("name", HERE)
def test_nothing_is_foreseen_of_nothing(name: str) -> None:
    assert math.isnan(maker(name)().ahead(1))


@pytest.mark.parametrize("name", HERE)
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


@pytest.mark.parametrize("place", [40, 43, 46])
def test_a_season_outlives_a_change_of_the_level(place: int) -> None:
    forecast = after(HoltWinters(8), seasonal(place))
    higher = [value + 30 for value in seasonal(place + 16)[place:]]
    forecast.relevel(higher[0])
    assert [forecast.ahead(steps) for steps in range(1, 17)] == pytest.approx(higher)
    assert squared_error(forecast, higher) == pytest.approx(0.0, abs=1e-6)


def test_a_season_is_learnt_though_its_own_swings_are_taken_for_changes_of_the_level() -> None:
    series, forecast = seasonal(24), HoltWinters(8)
    for place, value in enumerate(series[:16]):
        if place % 4 == 1:
            forecast.relevel(value)
        forecast.observe(value)
    assert [forecast.ahead(steps) for steps in range(1, 9)] == pytest.approx(series[16:])


@pytest.mark.parametrize("d", [0, 1])
def test_weights_of_arima_outlive_a_change_of_the_level(d: int) -> None:
    series = walk([0.7], [0.4], 200)
    series = (np.cumsum(np.array(series) - 100.0) + 100.0).tolist() if d else series
    forecast = Arima(1, d, 1)
    after(forecast, series)
    weights, further = forecast.weights, [forecast.ahead(steps) + 50.0 for steps in range(1, 6)]
    forecast.relevel(further[0])
    assert [forecast.ahead(steps) for steps in range(1, 6)] == pytest.approx(further)
    assert np.concatenate(forecast.weights) == pytest.approx(np.concatenate(weights), abs=1e-6)


@pytest.mark.parametrize("make", [Constant, Kalman, HoltWinters])
def test_who_knows_no_season_begins_anew_with_another_level(make) -> None:
    forecast = after(make(), [7.0] * 30)
    forecast.relevel(20.0)
    assert math.isnan(forecast.ahead(1))
    assert after(forecast, [21.0]).ahead(3) == pytest.approx(21.0)


@pytest.mark.parametrize("name", HERE)
def test_another_level_of_nothing_is_nothing(name: str) -> None:
    forecast = maker(name)()
    forecast.relevel(5.0)
    assert after(forecast, [3.0]).ahead(1) == pytest.approx(3.0)


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
    for name in HERE:
        assert after(maker(name)(), [1.0] * 20 + [4.0] * 20).ahead(1) == pytest.approx(4.0, rel=0.1)


def walk(phi: list[float], theta: list[float], steps: int, seed: int = 0, level: float = 100.0) -> list[float]:
    """Of a known law: surprises have the variance 1."""
    surprises, values = np.random.default_rng(seed).normal(0, 1, steps).tolist(), [0.0, 0.0]
    for number in range(2, steps):
        of_values = sum(weight * values[-lag] for lag, weight in enumerate(phi, 1))
        of_surprises = sum(weight * surprises[number - lag] for lag, weight in enumerate(theta, 1))
        values.append(of_values + of_surprises + surprises[number])
    return [level + value for value in values]


@pytest.mark.parametrize(("phi", "theta"), [([0.6, -0.3], []), ([0.7], [0.5]), ([], [0.8]), ([0.5], [-0.9])])
@pytest.mark.parametrize("d", [0, 1])
def test_arima_finds_the_weights_of_a_known_process(phi: list[float], theta: list[float], d: int) -> None:
    series = walk(phi, theta, 4000)
    series = np.cumsum(series).tolist() if d else series
    forecast = Arima(len(phi), d, len(theta), memory=4000)
    assert isinstance(after(forecast, [value - 100 * n * d for n, value in enumerate(series)]), Arima)
    found = forecast.weights
    assert found[0] == pytest.approx(phi, abs=0.06)
    assert found[1] == pytest.approx(theta, abs=0.06)


def test_arima_errs_little_more_than_the_surprises_and_less_than_others() -> None:
    """Of a walk whose steps take after each other, after as many values as it remembers."""
    series = np.cumsum(np.array(walk([0.7], [0.4], 700, seed=3)) - 100.0).tolist()
    known, rest = series[:300], series[300:]
    error = {
        name: squared_error(after(make(), known), rest) / len(rest)
        for name, make in (("arima", Arima), ("constant", Constant), ("holt-winters", HoltWinters), ("kalman", Kalman))
    }
    assert error["arima"] < 1.15
    assert min(error["constant"], error["holt-winters"], error["kalman"]) > 1.3 * error["arima"]


def test_arima_foresees_ever_nearer_to_the_mean_or_to_where_steps_have_led() -> None:
    """An autoregression of weight 0.8 is back to 0.8 ** steps of its distance; steps of a walk add up to four more."""
    back = after(Arima(1, 0, 0, memory=4000), walk([0.8], [], 4000))
    mean, distance = back.ahead(10_000), back.ahead(1) - back.ahead(10_000)
    assert mean == pytest.approx(100.0, abs=0.3)
    assert back.ahead(4) - mean == pytest.approx(distance * 0.8**3, rel=0.15)
    series = np.cumsum(np.array(walk([0.8], [], 4000)) - 100.0).tolist()
    on = after(Arima(1, 1, 0, memory=4000), series)
    assert on.ahead(10_000) - series[-1] == pytest.approx(4.0 * (series[-1] - series[-2]), rel=0.25)


def test_arima_of_a_series_that_explodes_does_not() -> None:
    assert after(Arima(2, 0, 1), [1.5**step for step in range(40)]).ahead(1000) < 1.5**45


def test_orders_of_arima_are_those_that_would_have_foreseen_the_past_best() -> None:
    calm = walk([0.3], [], 200)
    found = maker("arima", warm=calm)
    assert squared_error(found(), calm) <= squared_error(Arima(), calm)
    assert math.isnan(found().ahead(1))


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no forecast is called 'oracle'; there are constant, holt-winters, kal"):
        maker("oracle")
    with pytest.raises(ConfigError, match="the forecast kalman knows no season: take holt-winters or prophet"):
        maker("kalman", season=8)


def test_prophet_is_refused_with_how_to_install_it_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placement.prophet_forecast.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs the prophet package; pip install 'slipstream\[prophet\]'"):
        maker("prophet")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own use of pandas
def test_prophet_foresees_a_season_and_a_trend() -> None:
    pytest.importorskip("prophet")
    series = [20 + 0.05 * n + 6 * math.sin(2 * math.pi * n / 12) for n in range(96)]
    found = after(maker("prophet", 12)(), series)
    expected = [20 + 0.05 * n + 6 * math.sin(2 * math.pi * n / 12) for n in range(96, 102)]
    assert [found.ahead(steps) for steps in range(1, 7)] == pytest.approx(expected, abs=1.0)
    falling = after(maker("prophet")(), [float(max(0, 40 - n)) for n in range(40)])
    assert falling.ahead(20) == 0.0
    assert after(maker("prophet")(), [3.0, 4.0, 5.0]).ahead(2) == 4.0
    assert math.isnan(maker("prophet")().ahead(1))
    found.relevel(50.0)
    more = [value - expected[0] + 50.0 for value in expected]
    assert [found.ahead(steps) for steps in range(1, 7)] == pytest.approx(more, abs=1.5)
