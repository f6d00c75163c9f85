"""ARIMA(p, d, q) (Box and Jenkins, 1970): of a series, differenced `d` times, each value is a weighted sum of the last
`p` and of the last `q` surprises, and a surprise.

Weights are fitted anew to the last values at each forecast, by least squares in two steps (Hannan and Rissanen, 1982):
a longer regression on values alone tells what the surprises were, and then one on both has the weights. Differenced
series have no mean, so that what is foreseen far ahead does not drift away; others have that of the last values.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

MEMORY = 240
"""Values that weights are fitted to: two hours of half minutes."""
_EACH = 8
"""Values for each weight, at the least; the mean of the last three is foreseen until there are as many."""
_EDGE = 0.98
"""Of weights by which the effect of a value would not fade, all are made smaller until it does, to this a step."""


class Arima:
    def __init__(self, p: int = 1, d: int = 1, q: int = 1, *, memory: int = MEMORY) -> None:
        """`d`: 0 or 1."""
        self._p, self._d, self._q = p, d, q
        self._last: deque[float] = deque(maxlen=memory)
        self._foreseen: tuple[Values, Values, Values] | None = None
        """Values and surprises so far, and the weights; None until it is asked for."""

    def observe(self, value: float) -> None:
        self._last.append(value)
        self._foreseen = None

    def ahead(self, steps: int) -> float:
        if len(self._last) <= _EACH * (self._p + self._q) + self._d:
            return float(np.mean([*self._last][-3:])) if self._last else math.nan
        if self._foreseen is None:
            self._foreseen = self._fitted()
        values, surprises, weights = self._foreseen
        known, told = values[len(values) - self._p :].tolist(), surprises[len(surprises) - self._q :].tolist()
        level = self._last[-1] if self._d else float(np.mean(self._last))
        found: list[float] = []
        for _ in range(steps):
            found.append(float(np.dot(weights, [*reversed(known), *reversed(told)])))
            known, told = [*known, found[-1]][1:], [*told, 0.0][1:]
        return level + (sum(found) if self._d else found[-1])

    def relevel(self, value: float) -> None:
        """As if all had been on the new level."""
        if self._last:
            further = value - self.ahead(1)
            self._last = deque((one + further for one in self._last), maxlen=self._last.maxlen)
            self._foreseen = None

    @property
    def weights(self) -> tuple[list[float], list[float]]:
        """Of values and of surprises, the last one first; for a series that is long enough."""
        weights = self._fitted()[2].tolist()
        return weights[: self._p], weights[self._p :]

    def _fitted(self) -> tuple[Values, Values, Values]:
        series = np.array(self._last)
        values: Values = np.diff(series) if self._d else series - series.mean()
        long = self._p + 2 * self._q + 1 if self._q else 0
        first = _regressed(values, [_lagged(values, lag) for lag in range(1, long + 1)], long)
        rough = values - _summed(values, np.zeros(len(values)), first, np.empty(0)) if self._q else values
        rough[:long] = 0.0
        lags = [_lagged(values, lag) for lag in range(1, self._p + 1)]
        lags += [_lagged(rough, lag) for lag in range(1, self._q + 1)]
        found = _regressed(values, lags, long + max(self._p, self._q))
        phi, theta = _fading(found[: self._p]), -_fading(-found[self._p :])
        return values, _surprises(values, phi, theta), np.concatenate([phi, theta])


def _lagged(values: Values, lag: int) -> Values:
    return np.concatenate([np.zeros(lag), values[:-lag]])


def _regressed(values: Values, lags: list[Values], start: int) -> Values:
    """Weights of the lags, from a place on."""
    if not lags:
        return np.empty(0)
    found: Values = np.linalg.lstsq(np.stack(lags, axis=1)[start:], values[start:], rcond=None)[0].astype(np.float64)
    return found


def _summed(values: Values, surprises: Values, phi: Values, theta: Values) -> Values:
    """What was to be expected of each value."""
    found = np.zeros(len(values))
    for series, weights in ((values, phi), (surprises, theta)):
        for lag, weight in enumerate(weights.tolist(), 1):
            found += weight * _lagged(series, lag)
    return found


def _surprises(values: Values, phi: Values, theta: Values) -> Values:
    """One after the other, as each hangs on those before it."""
    rest = values - _summed(values, values, phi, np.empty(0))
    found: list[float] = []
    for number, value in enumerate(rest.tolist()):
        before = found[max(0, number - len(theta)) :][::-1]
        found.append(value - sum(weight * one for weight, one in zip(theta.tolist(), before, strict=False)))
    return np.array(found)


def _fading(weights: Values) -> Values:
    """Such that x[t] = Σ weights[i] · x[t - 1 - i] fades: the largest root of it is no more than _EDGE."""
    if not len(weights):
        return weights
    companion = np.eye(len(weights), k=-1)
    companion[0] = weights
    largest = float(np.abs(np.linalg.eigvals(companion)).max())
    if largest <= _EDGE:
        return weights
    smaller: Values = weights * (_EDGE / largest) ** np.arange(1, len(weights) + 1)
    return smaller
