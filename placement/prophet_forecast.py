"""Prophet (Taylor and Letham, 2018): a trend of straight pieces and, with a season, a periodic part, fitted together to
the last values. The package is an extra of its own, `pip install 'slipstream[prophet]'`."""

from __future__ import annotations

import logging
import math
from collections import deque
from importlib.util import find_spec

import numpy as np

from core.errors import ConfigError

_INTERVAL_S = 30
"""Between two values, as Prophet's time has it: only the distances matter."""
_LEAST = 10
"""Values; the mean of the last three is foreseen until there are as many."""


def check_installed() -> None:
    """Raises ConfigError without the package."""
    if find_spec("prophet") is None:
        raise ConfigError(
            "the forecast prophet needs the prophet package; pip install 'slipstream[prophet]'", param="forecast"
        )


class Prophet:
    """Fitted anew at the first forecast after a value; never below 0. `season`: intervals after
    which the series repeats itself, 0 for none."""

    def __init__(self, season: int = 0, *, memory: int = 240) -> None:
        self._season = season
        self._last: deque[float] = deque(maxlen=max(memory, 3 * season))
        self._foreseen: list[float] = []

    def observe(self, value: float) -> None:
        self._last.append(value)
        self._foreseen = []

    def ahead(self, steps: int) -> float:
        if len(self._last) < max(_LEAST, 2 * self._season):
            return float(np.mean([*self._last][-3:])) if self._last else math.nan
        if len(self._foreseen) < steps:
            self._foreseen = self._fitted(steps)
        return self._foreseen[steps - 1]

    def relevel(self, value: float) -> None:
        """As if all had been on the new level."""
        if self._last:
            further = value - self.ahead(1)
            self._last = deque((one + further for one in self._last), maxlen=self._last.maxlen)
            self._foreseen = []

    def _fitted(self, steps: int) -> list[float]:
        """The next values."""
        import pandas
        import prophet

        logging.getLogger("cmdstanpy").setLevel(logging.WARNING)
        model = prophet.Prophet(
            daily_seasonality=False, weekly_seasonality=False, yearly_seasonality=False, uncertainty_samples=0
        )
        if self._season > 1:
            days = self._season * _INTERVAL_S / 86_400
            model.add_seasonality("season", period=days, fourier_order=min(5, self._season // 2))
        times = pandas.date_range("2000-01-01", periods=len(self._last) + steps, freq=f"{_INTERVAL_S}s")
        model.fit(pandas.DataFrame({"ds": times[: len(self._last)], "y": [*self._last]}))
        told = model.predict(pandas.DataFrame({"ds": times[len(self._last) :]}))["yhat"]
        return [max(0.0, float(value)) for value in told]
