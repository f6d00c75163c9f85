"""What forecasts are called, for who need not import NumPy to read a configuration."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

ForecastName: TypeAlias = Literal["constant", "holt-winters", "kalman", "arima", "prophet"]

SEASONAL: tuple[ForecastName, ...] = ("holt-winters", "prophet")
"""Those that can learn a season."""

NAMES: tuple[ForecastName, ...] = get_args(ForecastName)
