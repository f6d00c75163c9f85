"""What a number that is observed at even intervals will be some intervals from now.

Five ways behind one protocol, of which arima.py and prophet_forecast.py have one each. Trends of the others fade with
distance (Gardner and McKenzie, 1985): traffic does not grow forever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from placement.arima import MEMORY, Arima
from placement.forecast_names import NAMES, SEASONAL
from placement.prophet_forecast import Prophet, check_installed

DAMPING = 0.9
"""What is left of a trend from one interval to the next."""


class Forecast(Protocol):
    def observe(self, value: float) -> None:
        """The next of the series."""
        ...

    def ahead(self, steps: int) -> float:
        """The value `steps` intervals after the last that was observed, 1 or more; NaN before any was."""
        ...

    def relevel(self, value: float) -> None:
        """From its next value on, which will be about this one, the series has another level. What was learnt of how it
        goes around its level stays; who has learnt nothing of that begins anew."""
        ...


class Constant:
    """As on average in the last few intervals."""

    def __init__(self, memory: int = 3) -> None:
        self._last: deque[float] = deque(maxlen=memory)

    def observe(self, value: float) -> None:
        self._last.append(value)

    def ahead(self, steps: int) -> float:  # noqa: ARG002 - the same at any distance
        return float(np.mean(self._last)) if self._last else math.nan

    def relevel(self, value: float) -> None:  # noqa: ARG002 - what comes tells more than what is known by now
        self._last.clear()


class HoltWinters:
    """Additive exponential smoothing of level, damped trend and, with a `season` of 2 or more intervals, a season
    (Winters, 1960). Until two seasons were seen there is no season, and level and trend alone are smoothed; then all
    start from these two as in Hyndman and Athanasopoulos, Forecasting (2021), 8.3."""

    def __init__(
        self,
        season: int = 0,
        *,
        level: float = 0.4,
        trend: float = 0.1,
        seasonal: float = 0.2,
        damping: float = DAMPING,
    ) -> None:
        self._season, self._weights, self._damping = season, (level, trend, seasonal), damping
        self._early: list[float] = []
        self._offsets: deque[float] = deque([0.0])
        """Of each interval of a season from the level, the next one first."""
        self._level, self._trend = math.nan, 0.0

    def observe(self, value: float) -> None:
        if self._season > 1 and len(self._early) < 2 * self._season:
            self._early.append(value)
            if len(self._early) == 2 * self._season:
                self._start()
                return
        if math.isnan(self._level):
            self._level = value
        else:
            self._smooth(value)

    def ahead(self, steps: int) -> float:
        faded = self._trend * sum(self._damping**step for step in range(1, steps + 1))
        return self._level + faded + self._offsets[(steps - 1) % len(self._offsets)]

    def relevel(self, value: float) -> None:
        """The season stays. While it is still being learnt, a change of the level can't be told from it, so that what
        has come for it stays too."""
        self._level = value - self._offsets[0] if len(self._offsets) > 1 else math.nan
        self._trend = 0.0

    def _smooth(self, value: float) -> None:
        level, trend, seasonal = self._weights
        before, slope, offset = self._level, self._damping * self._trend, self._offsets.popleft()
        self._level = level * (value - offset) + (1 - level) * (before + slope)
        self._trend = trend * (self._level - before) + (1 - trend) * slope
        learned = seasonal * (value - before - slope) + (1 - seasonal) * offset
        self._offsets.append(learned if self._offsets else 0.0)  # one offset is no season

    def _start(self) -> None:
        first, second = np.array(self._early).reshape(2, self._season)
        self._trend = float((second - first).mean() / self._season)
        middle = (self._season - 1) / 2
        detrended = first - first.mean() - self._trend * (np.arange(self._season) - middle)
        self._level = float(second.mean() + self._trend * middle)
        self._offsets = deque(detrended.tolist())


_UNSURE = np.diag([1.0, 1.0])


class Kalman:
    """The local linear trend model: level and slope walk at random, and what is observed is the level with noise
    (Harvey, 1989, 2.3.3). `level` and `slope` are the variances of their steps relative to that of the noise; only
    these ratios matter to what is expected."""

    def __init__(self, *, level: float = 0.2, slope: float = 0.01, damping: float = DAMPING) -> None:
        self._step = np.array([[1.0, 1.0], [0.0, 1.0]])
        self._noise = np.diag([level, slope])
        self._damping = damping
        self._state: NDArray[np.float64] | None = None  # [level, slope]
        self._variance = _UNSURE

    def observe(self, value: float) -> None:
        if self._state is None:
            self._state = np.array([value, 0.0])
            return
        expected = self._step @ self._state
        variance = self._step @ self._variance @ self._step.T + self._noise
        gain = variance[:, 0] / (variance[0, 0] + 1.0)
        self._state = expected + gain * (value - expected[0])
        self._variance = variance - np.outer(gain, variance[0])

    def ahead(self, steps: int) -> float:
        if self._state is None:
            return math.nan
        level, slope = self._state
        return float(level + slope * sum(self._damping**step for step in range(1, steps + 1)))

    def relevel(self, value: float) -> None:  # noqa: ARG002 - what comes tells more than what is known by now
        self._state, self._variance = None, _UNSURE


def season_of(seconds: float | None, period_s: float, setting: str) -> int:
    """In periods of a forecast; 0 for None. Raises ConfigError, by the setting and the one of the pace that stands
    beside it, if these are fewer than two."""
    periods = 0 if seconds is None else round(seconds / period_s)
    if seconds is not None and periods < 2:
        raise ConfigError(
            f"{setting} {seconds:g}: it is two periods of the forecast at the least, and one is {period_s:g} s; lower "
            f"{setting.replace('season', 'interval')}",
            param="season",
        )
    return periods


Maker = Callable[[], Forecast]
"""Makes a forecast that has seen nothing."""

_LEAST = 10
_TRIED = (0.05, 0.2, 0.5, 0.8)


def maker(name: str, season: int = 0, warm: Iterable[float] = ()) -> Maker:
    """Of forecasts by name, with the weights, or of arima the orders, that would have foreseen the series `warm` best
    one interval ahead; those of the class if it has fewer than ten values. Raises ConfigError for an unknown name, a
    season for one that knows none, and prophet where it is not installed."""
    if name not in NAMES:
        raise ConfigError(f"no forecast is called {name!r}; there are {', '.join(NAMES)}", param="forecast")
    if season and name not in SEASONAL:
        raise ConfigError(f"the forecast {name} knows no season: take {' or '.join(SEASONAL)}", param="season")
    series = [*warm]
    if name == "constant":
        return Constant
    if name == "prophet":
        check_installed()
        return partial(Prophet, season)
    if name == "arima":
        return _best(Arima, series[-MEMORY:], {"p": (1, 2), "d": (0, 1), "q": (0, 1)})
    if name == "kalman":
        return _best(Kalman, series, {"level": (0.02, 0.2, 1.0), "slope": (0.001, 0.01, 0.1)})
    of_season = {"seasonal": _TRIED} if season else {}
    return _best(partial(HoltWinters, season), series, {"level": _TRIED, "trend": (0.05, 0.1, 0.3)} | of_season)


def _best(make: Callable[..., Forecast], series: list[float], weights: Mapping[str, tuple[float, ...]]) -> Maker:
    if len(series) < _LEAST:
        return make
    tried = [partial(make, **dict(zip(weights, values, strict=True))) for values in product(*weights.values())]
    return min(tried, key=lambda candidate: squared_error(candidate(), series))


def squared_error(forecast: Forecast, series: Iterable[float]) -> float:
    """Sum over the series of what was foreseen one interval ahead, against what came; from the second value on."""
    total = 0.0
    for number, value in enumerate(series):
        total += (forecast.ahead(1) - value) ** 2 if number else 0.0
        forecast.observe(value)
    return total
