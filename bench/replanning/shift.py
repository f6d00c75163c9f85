"""Traffic that changes from one kind to another at once, at rates for which the change matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import ConfigError
from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.lengths import parse_lengths
from placement.workload import Workload

_SIMULATED = 600
_EASY = 0.6
"""Of the rate that the workers stand before the shift: this part of it they get."""
_LEAST_RATIO = 1.15
_RATES = np.geomspace(0.05, 200.0, 120)


@dataclass(frozen=True, eq=False)
class Phase:
    """Requests of one kind for a while. `workload` has as many as may come."""

    workload: Workload
    rate: float
    seconds: float

    def due(self) -> list[float]:
        """Seconds from its beginning at which its requests come."""
        times = self.workload.arrivals_ms(self.rate) / 1e3
        return [float(at) for at in times[times < self.seconds]]


@dataclass(frozen=True, eq=False)
class Shift:
    before: Phase
    after: Phase

    @property
    def seconds(self) -> float:
        return self.before.seconds + self.after.seconds

    def requests(self) -> list[tuple[float, int, int]]:
        """When each is due, in seconds from the beginning, and its prompt and output tokens."""
        found: list[tuple[float, int, int]] = []
        for phase, begins in ((self.before, 0.0), (self.after, self.before.seconds)):
            rows = zip(phase.due(), phase.workload.prompt_tokens, phase.workload.output_tokens, strict=False)
            found += [(begins + at, int(prompt), int(output)) for at, prompt, output in rows]
        return found


def kinds(before: str, after: str, seed: int) -> tuple[Workload, Workload]:
    """Lengths as `slipstream plan --lengths` has them, but for `cached`. Raises ConfigError."""
    found = parse_lengths(before, seed), parse_lengths(after, seed + 1)
    for name, work in zip(("before", "after"), found, strict=True):
        if work.cached_tokens.any():
            raise ConfigError(f"--{name}: prompts are random tokens here, of which no cache has any; leave cached out")
    return found


def best_split(predictor: Predictor, workload: Workload, workers: int, chunk_tokens: int, share: float) -> Arrangement:
    """The split into prefill and decode workers that stands the highest rate. Raises ConfigError if none stands any."""
    splits = [Arrangement(count, workers - count, 0, chunk_tokens) for count in range(1, workers)]
    return best_of(predictor, splits, workload, share)


def best_of(predictor: Predictor, arrangements: Sequence[Arrangement], workload: Workload, share: float) -> Arrangement:
    """The one that stands the highest rate. Raises ConfigError if there can be none."""
    able = [one for one in arrangements if predictor.why_not(one) is None]
    if not able:
        why = predictor.why_not(arrangements[0]) if arrangements else "give 2"
        raise ConfigError(f"the workers can't be arranged: {why}", param="workers")
    return max(able, key=lambda one: most_rate(predictor, one, workload, share))


def most_rate(predictor: Predictor, arrangement: Arrangement, workload: Workload, share: float) -> float:
    """Requests/s up to which `share` of them meet the targets; 0 if none."""
    drawn = workload.of_length(_SIMULATED)

    def attains(rate: float) -> bool:
        return predictor.attainment(arrangement, drawn, rate) >= share

    low, high = -1, len(_RATES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if attains(float(_RATES[middle])) else (low, middle)
    return float(_RATES[low]) if low >= 0 else 0.0


def rates_that_matter(
    stands: Callable[[Arrangement, int], float], now: Arrangement, others: list[Arrangement]
) -> tuple[float, float]:
    """Rates before the shift and after it: what `now` stands easily, and what it does not stand but the best of the
    others does. `stands` says what an arrangement does of phase 0 and 1. Raises ConfigError if none is like that."""
    before, still = stands(now, 0), stands(now, 1)
    best = max(stands(other, 1) for other in others)
    if not before or best < _LEAST_RATIO * still:
        raise ConfigError(
            f"{now} stands {before:.3g} requests/s before the shift and {still:.3g} after it, and the best arrangement "
            f"{best:.3g}: nothing is to be gained; choose other lengths or targets, or give --rates"
        )
    return _EASY * before, (still * best) ** 0.5 if still else _EASY * best
