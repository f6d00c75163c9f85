"""From measured steps to a latency model, by least squares on relative errors.

Coefficients are 0 or more: a step can't take less for having more in it. With so few of them that is solved exactly, by
trying which of them are 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import msgspec
import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from placement.bounded import Many
from placement.latency import Coefficients, Contention, DistServeLatency, StepLatency
from placement.workload import Times

LEAST_POINTS = 3
"""As many as a part of the model has coefficients."""


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that was measured, or reckoned: what StepLatency.step_ms takes, and the time it took. `longest` is the
    longest sequence in it, in tokens, with those that it computes."""

    tokens: Many
    squares: Many
    context: Many
    sequences: Many
    rows: Many
    longest: Many
    ms: float

    @staticmethod
    def of(prompts: Sequence[tuple[int, int]], sequences: int, context: int, rows: int, ms: float) -> Point:
        """`prompts` are chunks as (tokens before it, tokens); each of the `sequences` that decode has `context` tokens
        before it and `rows` rows."""
        reach = [past + tokens for past, tokens in prompts] + ([context + rows] if sequences else [])
        return Point(
            tokens=sum(tokens for _, tokens in prompts),
            squares=sum((past + tokens) ** 2 - past**2 for past, tokens in prompts),
            context=sequences * context,
            sequences=sequences,
            rows=sequences * rows,
            longest=max(reach),
            ms=ms,
        )

    @property
    def told(self) -> str:
        parts = [f"{self.tokens} tokens of prompts"] if self.tokens else []
        parts += [f"{self.sequences} sequences that decode {self.rows} rows"] if self.sequences else []
        return f"a step of {' and '.join(parts)} which took {self.ms:.3g} ms"

    def predicted_ms(self, latency: StepLatency) -> float:
        return latency.step_ms(self.tokens, self.squares, self.context, self.sequences, self.rows)

    def error(self, latency: StepLatency) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_ms(latency) / self.ms - 1.0


def fit(points: Sequence[Point]) -> StepLatency:
    """The model with the least squares of relative errors: of prompts alone on either side of the best `large_tokens`,
    of decodes alone on either side of the best `large_rows`, and then what steps with both save. Raises ConfigError if
    there are too few points."""
    prompts = [point for point in points if not point.sequences]
    decodes = [point for point in points if not point.tokens]
    both = [point for point in points if point.tokens and point.sequences]
    for name, some in (("only prompts", prompts), ("only decodes", decodes)):
        _check_enough(name, some)
    prompt, large_prompt, large_tokens = _in_two(prompts, _solve_prompts, lambda point: point.tokens)
    decode, large_decode, large_rows = _in_two(decodes, _solve_decodes, lambda point: point.rows)
    alone = StepLatency(prompt, decode, large_decode, large_rows, large_prompt=large_prompt, large_tokens=large_tokens)
    return _sharing(alone, both)


def fit_contention(
    alone: Sequence[Point], beside_prompts: Sequence[Point], beside_decodes: Sequence[Point], others: int
) -> Contention:
    """What one of `others` workers adds, from the same steps alone and beside them."""
    prompts, decodes = _ratios(alone, beside_prompts, others), _ratios(alone, beside_decodes, others)
    return Contention(prompt=(prompts[0], decodes[0]), decode=(prompts[1], decodes[1]))


def _ratios(alone: Sequence[Point], beside: Sequence[Point], others: int) -> tuple[float, float]:
    """Medians, of steps that are all prompts and of those that are all decodes."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for one, other in zip(alone, beside, strict=True):
        if not (one.tokens and one.sequences):
            ratios[bool(one.tokens)].append(other.ms / one.ms)
    prompt, decode = (max(1.0, 1.0 + (statistics.median(found) - 1.0) / others) for found in ratios.values())
    return prompt, decode


def _in_two(
    points: list[Point], solve: Callable[[list[Point]], tuple[Coefficients, float]], size: Callable[[Point], int]
) -> tuple[Coefficients, Coefficients, int]:
    """One fit for all, or two, with the border where they are best: the second from that size on."""
    best = solve(points)
    found = (best[0], best[0], 1)
    for border in sorted({size(point) for point in points}):
        small = [point for point in points if size(point) < border]
        large = [point for point in points if size(point) >= border]
        if min(len(small), len(large)) <= LEAST_POINTS:
            continue
        (below, error), (above, more) = solve(small), solve(large)
        if error + more < best[1]:
            best, found = (below, error + more), (below, above, border)
    return found


def _solve_prompts(points: list[Point]) -> tuple[Coefficients, float]:
    return _solve([(point.tokens, point.squares) for point in points], points)


def _solve_decodes(points: list[Point], fixed: Mapping[Point, float] | None = None) -> tuple[Coefficients, float]:
    return _solve([(point.context + point.sequences, point.rows) for point in points], points, fixed)


def fit_distserve(points: Sequence[Point]) -> DistServeLatency:
    """DistServe's form, of the steps that it knows: prompts alone, and decodes of a row each. Raises ConfigError if
    there are too few points."""
    prompts = [point for point in points if not point.sequences]
    decodes = [point for point in points if not point.tokens and point.rows == point.sequences]
    small = [point for point in decodes if point.sequences < DistServeLatency.large_batch]
    large = [point for point in decodes if point.sequences >= DistServeLatency.large_batch]
    for name, some in (("only prompts", prompts), ("only decodes", decodes)):
        _check_enough(name, some)
    none = DistServeLatency(Coefficients(0, 0, 0), Coefficients(0, 0, 0), Coefficients(0, 0, 0))
    fixed = {point: distserve_ms(none, point) for point in points}  # what the form adds to its coefficients
    prefill, _ = _solve([(point.tokens, point.squares) for point in prompts], prompts, fixed)
    decode, _ = _solve_decodes(small or large, fixed)
    return DistServeLatency(prefill, decode, _solve_decodes(large, fixed)[0] if len(large) >= LEAST_POINTS else decode)


def distserve_ms(latency: DistServeLatency, point: Point) -> float:
    """Of a step without a pipeline."""
    if point.tokens:
        return latency.prefill_stage_ms(point.tokens, point.squares, stages=1, first=True)
    return latency.decode_stage_ms(point.context, point.sequences, stages=1, first=True)


def _check_enough(name: str, points: list[Point]) -> None:
    if len(points) < LEAST_POINTS:
        raise ConfigError(f"a fit needs {LEAST_POINTS} steps with {name}, and there are {len(points)}")


def _solve(
    xy: list[tuple[int, int]], points: list[Point], fixed: Mapping[Point, float] | None = None
) -> tuple[Coefficients, float]:
    """a, b, c >= 0 with the least Σ((fixed + a + b·x + c·y) / ms - 1)², and that sum."""
    ms = np.array([point.ms for point in points])
    left = 1.0 - np.array([fixed[point] if fixed else 0.0 for point in points]) / ms
    terms = np.column_stack([np.ones(len(xy)), np.array(xy, float)]) / ms[:, None]  # [points, 3]
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-300)
    supports = [support for size in range(4) for support in combinations(range(3), size)]
    tried = [_least(terms / scale, left, support) for support in supports]
    error, solution = min((found for found in tried if found is not None), key=lambda found: found[0])
    return Coefficients(*(float(value) for value in solution / scale)), error


def _least(terms: NDArray[np.float64], left: Times, support: tuple[int, ...]) -> tuple[float, Times] | None:
    """Σ(terms·x - left)² and x, 0 outside of `support`; None if that has to be negative somewhere."""
    found, *_ = np.linalg.lstsq(terms[:, support], left)
    if (found < 0).any():
        return None
    solution = np.zeros(terms.shape[1])
    solution[list(support)] = found
    return float(((terms @ solution - left) ** 2).sum()), solution


def _sharing(latency: StepLatency, both: list[Point]) -> StepLatency:
    """What steps with prompts and decodes save, and with how many rows no more: of the numbers of rows that there are,
    or infinitely many, those that fit best."""
    excess = np.array([point.predicted_ms(latency) - point.ms for point in both])
    weights = np.array([point.ms for point in both]) ** -2.0
    rows = np.array([point.rows for point in both])
    tried = [latency]
    for most in [*sorted(set(rows.tolist()) - {min(rows, default=0)}), math.inf] if both else ():
        shares = np.maximum(0.0, 1.0 - rows / most)
        some = shares > 0.0
        saved = (excess * shares * weights).sum() / (shares * shares * weights).sum()
        able = (saved, *(excess[some] / shares[some]))  # the mean, unless some steps took as long as either alone
        tried += [replace(latency, shared_ms=max(0.0, float(ms)), shared_rows=float(most)) for ms in able]
    return min(tried, key=lambda one: sum(point.error(one) ** 2 for point in both))
