"""How long a step takes, fitted on the machine that runs it: T(k) of SmartSpec (arXiv:2406.14066), in two parts.

    plain = a0 + a1 sequences + a2 context + c(rows)
    added = b (draft tokens x mean context) + c'(rows with draft) - c'(rows without)
            + for each drafter that drafts: d0 + d1 sequences + d2 draft tokens

c is convex and piecewise linear: on a CPU the first rows are nearly free, for the weights are read anyway. Nothing has
a negative coefficient, so more never takes less. `added` is what a step took beyond `plain` at the same load, drafter
and rule included. Least squares of errors relative to `plain`, older steps forgotten; a step that took far longer than
expected, because the machine did something else, counts for little (Huber's weights).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.warm_up import RowTime
from speculation.rounds import Load

FORGETTING = 0.99
"""Weight of a step relative to the next: the last 100 count."""
KNOTS = np.array([0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
"""Rows at which a further one may begin to cost more."""
OUTLIER = 2.0
"""An error counts as if it was at most this many times the usual one."""
HICCUP = 1.5
"""Times as long as expected: what takes longer is not for what was asked of the step."""
RIDGE = 1e-3
"""Keeps at zero what was never varied."""
LEAST_USUAL = 0.03
"""Of errors: on a machine that is never early nor late a slower step would count for nothing."""
MIN_PLAIN, MIN_ADDED = 12, 4
"""Steps before a prediction is worth something."""
MIN_ALIKE = 3
"""Plain ones of about as many sequences, before what is foretold of them is; for prompts tell little of them."""
SURPRISES = 3
"""Errors of that kind in a row, all above what was expected or all below: then it is no hiccup."""
MUCH, SELDOM = 0.25, 8
"""An error of so much of what was expected is learned from at once, others every few steps: it takes time."""
DOUBT = 0.1
"""What was seen before counts so much less with each further one."""
UNKNOWN = 0.5
"""Of a plain step: taken for what speculation costs beyond it until that was seen."""
_SEQUENCES, _ROWS, _CONTEXT = 8.0, 16.0, 4096.0
"""Units that bring features to sizes around one."""


class Fit:
    """Non-negative least squares of a number by some features, both of sizes around one."""

    def __init__(self, size: int, min_steps: int) -> None:
        self._min_steps = min_steps
        self._xx = RIDGE * np.eye(size)
        self._ridge = (1 - FORGETTING) * self._xx
        self._xy = np.zeros(size)
        self._weights = np.zeros(size)
        self._usual_error = 1.0
        self._count = 0
        self._surprises = 0
        """In a row. Negative: less than was expected."""
        self._agreed = 0.0
        """The least of those errors: what one of them has beyond may be a hiccup."""

    @property
    def known(self) -> bool:
        return self._count >= self._min_steps

    @property
    def is_surprised(self) -> bool:
        """By what was observed last."""
        return self._surprises != 0

    @property
    def is_wrong(self) -> bool:
        """By the last few together."""
        return abs(self._surprises) >= SURPRISES

    def predict(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """[...] for features [..., size]."""
        predicted: NDArray[np.float64] = features @ self._weights
        return predicted

    def observe(self, features: NDArray[np.float64], value: float, *, surprising: bool = True) -> None:
        """`surprising`: whether an error may be one, and not of a kind that this model always makes."""
        more = value - float(self.predict(features))
        error = abs(more)
        counted = min(error, OUTLIER * max(self._usual_error, LEAST_USUAL))
        far = self.known and counted < error
        if surprising:
            self._surprises = _in_a_row(self._surprises, more) if far else 0
            self._agreed = error if abs(self._surprises) <= 1 else min(error, self._agreed)
        wrong = surprising and self.is_wrong
        weight = counted / error if far and not wrong else 1.0
        self._usual_error += 0.2 * (counted - self._usual_error)
        if wrong:
            value += math.copysign(self._agreed, more) - more
            self._xx *= DOUBT
            self._xy *= DOUBT
        self._xx *= FORGETTING
        self._xx += weight * np.outer(features, features)
        self._xx += self._ridge
        self._xy = FORGETTING * self._xy + weight * value * features
        self._count += 1
        if wrong or error > MUCH or self._count < 4 * SELDOM or self._count % SELDOM == 0:
            self._weights = _non_negative(self._xx, self._xy, self._weights)


def _in_a_row(before: int, more: float) -> int:
    """Surprises, with one that was above 0 or below."""
    sign = 1 if more > 0 else -1
    return before + sign if before * sign > 0 else sign


def _non_negative(xx: NDArray[np.float64], xy: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """The w >= 0 that makes w xx w - 2 w xy least, by pivoting blocks: solve for those that are free, fix the negative
    ones at zero, free those whose gradient says so. Few rounds do; what is negative after the last is cut off."""
    free, weights = start > 0, start
    for _ in range(6):
        weights = np.zeros_like(xy)
        weights[free] = np.linalg.solve(xx[np.ix_(free, free)], xy[free])
        wrong = np.where(free, weights < 0, xy - xx @ weights > 1e-9)
        if not wrong.any():
            break
        free = free ^ wrong
    return weights.clip(min=0.0)


@dataclass(frozen=True, slots=True)
class Speculation:
    """What is drafted in a step, or in each of several it might be: [...] leading dimensions."""

    tokens: NDArray[np.float64]
    """[..., drafters] draft tokens."""
    sequences: NDArray[np.float64]
    """[..., drafters] that they are for."""


class StepTime:
    """Seconds of a step. Drafters are known by number."""

    def __init__(self, num_drafters: int) -> None:
        self.num_drafters = num_drafters
        self._plain = Fit(3 + len(KNOTS), 1)
        self._added = Fit(1 + len(KNOTS) + 3 * num_drafters, MIN_ADDED)
        self._unit = 0.0  # what a step usually takes: predictions are in these
        self._most = 0.0
        self._first: list[tuple[Load, float]] = []  # and seconds
        self._alike: Counter[int] = Counter()  # plain steps by `_size`

    @property
    def known(self) -> bool:
        """Whether `plain` is."""
        return len(self._first) == MIN_PLAIN

    def knows_plain(self, load: Load) -> bool:
        """Whether `plain` was seen with about as many sequences, and was no surprise the last time."""
        return self.known and self._alike[_size(load)] >= MIN_ALIKE and not self._plain.is_surprised

    @property
    def plain_was_wrong(self) -> bool:
        """What was foretold of plain steps until now."""
        return self._plain.is_wrong

    @property
    def added_known(self) -> bool:
        return self._added.known

    def plain(self, load: Load) -> float:
        return self._unit * float(self._plain.predict(_plain_features(load)))

    def added(self, load: Load, speculation: Speculation) -> NDArray[np.float64]:
        """[...] beyond `plain`; 0 where nothing is drafted."""
        if self._added.known:
            found = self._unit * self._added.predict(_added_features(load, speculation))
        else:
            found = np.array(UNKNOWN * self.plain(load))
        return np.where(speculation.tokens.sum(-1) > 0, found, 0.0)

    @property
    def horizon(self) -> int:
        """Draft tokens in a step up to which `added` may be trusted: twice what was lately seen."""
        return 2 * math.ceil(self._most)

    def rehearse(self, timed: RowTime) -> None:
        """A step whose drafts are nobody's."""
        load = Load([""], np.array([timed.context]), np.zeros(1, np.int64))
        if timed.rows == 1:
            self.record_plain(load, timed.seconds)
        elif self.known:
            features, plain = _rows_features(load, np.array(timed.rows - 1.0)), self.plain(load)
            nobody = np.zeros(3 * self.num_drafters)
            features = np.concatenate([features, nobody]) * self._unit / plain
            self._observe_added(features, timed.rows - 1, (timed.seconds - plain) / plain)

    def record_plain(self, load: Load, seconds: float) -> float | None:
        """The first few are kept until there is something to tell a hiccup by. Returns what was expected, if anything
        was."""
        if not load.other_tokens:
            self._alike[_size(load)] += 1
        if self.known:
            expected = self.plain(load)
            self._observe_plain(load, seconds, expected)
            return expected
        self._first.append((load, seconds))
        if self.known:
            self._unit = float(np.median([seconds for _, seconds in self._first]))
            for load, seconds in self._first:
                if seconds < 2 * self._unit:
                    self._observe_plain(load, seconds, self._unit)
        return None

    def _observe_plain(self, load: Load, seconds: float, expected: float) -> None:
        """Errors are relative to what was expected. A chunk of a prompt reads more the longer the prompt, which is not
        modelled."""
        features = _plain_features(load) * (self._unit / expected)
        self._plain.observe(features, seconds / expected, surprising=not load.other_tokens)

    def record(self, load: Load, speculation: Speculation, seconds: float) -> tuple[float, float]:
        """Of a step that speculated, once `plain` is known. Returns what a plain one would have taken, and `seconds`,
        but of a step in which the machine did something else for long no more than is likely."""
        plain, added = self.plain(load), UNKNOWN
        if speculation.tokens.any():
            features = _added_features(load, speculation) * self._unit / plain
            added = float(self._added.predict(features)) if self._added.known else UNKNOWN
            self._observe_added(features, float(speculation.tokens.sum()), (seconds - plain) / plain)
        return plain, min(seconds, HICCUP * (1 + added) * plain)

    def _observe_added(self, features: NDArray[np.float64], tokens: float, added: float) -> None:
        self._most = max(FORGETTING * self._most, tokens)
        self._added.observe(features, added)


def _size(load: Load) -> int:
    """The same for numbers of sequences that differ by less than about 1.4 times."""
    return round(2 * math.log2(len(load.classes)))


def _rows(load: Load) -> float:
    return len(load.classes) + load.other_tokens


def _plain_features(load: Load) -> NDArray[np.float64]:
    context = load.context_tokens.sum() / _CONTEXT
    return np.array([1.0, len(load.classes) / _SEQUENCES, context, *_bends(np.array(_rows(load)))])


def _added_features(load: Load, speculation: Speculation) -> NDArray[np.float64]:
    """[..., features]"""
    tokens, sequences = speculation.tokens, speculation.sequences
    drafts = (tokens > 0, sequences / _SEQUENCES, tokens / _ROWS)
    return np.concatenate([_rows_features(load, tokens.sum(-1)), *drafts], axis=-1)


def _rows_features(load: Load, added: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., features] of `added` [...] draft tokens, whoever drafted them."""
    rows = _rows(load)
    reading = added * load.context_tokens.mean() / (_ROWS * _CONTEXT)
    return np.concatenate([reading[..., None], _bends(rows + added) - _bends(np.array(rows))], axis=-1)


def _bends(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., knots]"""
    bends: NDArray[np.float64] = np.maximum(rows[..., None] - KNOTS, 0.0) / _ROWS
    return bends
