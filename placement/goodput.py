"""The highest rate at which a layout meets the targets, how sure that is, and whether the run was long enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from placement.layout import Layout
from placement.native import Limits, Window, serve_unless_missed
from placement.outcome import Targets
from placement.workload import Times, Workload

RATE_STEP = 1.01
"""RATES are the powers of this: goodput of a layout does not depend on where it was looked for."""
_PER_OCTAVE = 70
BELOW = 10
"""RATES next to one that counts, which attain the goal too."""
UNLOADED = 1e-3
"""Requests/s, so few that they do not meet."""
WARM_UP = 0.1
"""The part of a run that is left out: it begins with empty queues."""
REPLICATIONS = 5
_T_95 = 2.776
"""Student's t for a two-sided 95 % interval of REPLICATIONS values."""


@dataclass(frozen=True)
class Goal:
    """`share` of the requests meet all targets, of those without a share of their own; and of a target that has one so
    many meet that."""

    targets: Targets
    share: float = 0.9

    @property
    def demands(self) -> dict[tuple[str, ...], float]:
        """Which targets so large a share of the requests has to meet together."""
        return self.targets.demands(self.share)

    @property
    def least(self) -> float:
        """Of these shares the smallest."""
        return min(self.demands.values())

    def share_of(self, metric: str) -> float:
        """Of requests, that are to meet its target."""
        return dict(self.targets.shares).get(metric, self.share)

    def with_misses(self, times: float) -> Goal:
        """So many times as many requests may miss."""
        shares = tuple((metric, 1 - times * (1 - share)) for metric, share in self.targets.shares)
        return Goal(replace(self.targets, shares=shares), 1 - times * (1 - self.share))

    def told(self) -> str:
        """`ttft=200 ms and tpot=50 ms for 90 % of requests`."""
        parts = (
            " and ".join(f"{metric}={self.targets.of(metric):g} ms" for metric in metrics)
            + f" for {100 * share:g} % of requests"
            for metrics, share in self.demands.items()
        )
        return ", ".join(parts)


@dataclass(frozen=True)
class Interval:
    """Of goodput, in requests/s, over runs with other requests and gaps: mean, and the 95 % interval of it."""

    mean: float
    low: float
    high: float


def attains(layout: Layout, workload: Workload, rate: float, goal: Goal) -> bool:
    """Whether the share meets the targets, after warm-up, and in the second half too: if queues still grow there, the
    run is not in a steady state and a longer one would fail."""
    return serve_unless_missed(layout, workload, rate, limits_of(len(workload), goal)) is not None


def limits_of(requests: int, goal: Goal) -> Limits:
    """What a run of so many may miss."""
    windows = tuple(
        Window(metrics, start, _allowed(share, requests - start))
        for metrics, share in goal.demands.items()
        for start in (int(requests * WARM_UP), requests // 2)
    )
    return Limits(goal.targets, windows)


def _allowed(share: float, requests: int) -> int:
    """That miss."""
    return math.floor((1 - share) * requests + 1e-9)


def goodput(layout: Layout, workload: Workload, goal: Goal, *, ceiling: float, floor: float = 0.0) -> float:
    """The highest of the RATES up to `ceiling` that attains the goal, if it is attained without load and at the BELOW
    RATES next to it as well. 0 if that is less than `floor`, or than about a thousandth of the ceiling.

    Attainment is not monotone in the rate, least of all where a target is at the edge of reach, so that what a
    bisection finds hangs on where it begins. This does not: a rate that fails rules out all that would need it, and
    mostly one is all that it takes to rule out a layout."""
    if ceiling <= 0.0:
        return 0.0
    known: dict[int, bool] = {}

    def able(place: int) -> bool:
        if place not in known:
            known[place] = attains(layout, workload, _rate(place), goal)
        return known[place]

    def unloaded() -> bool:
        return attains(layout, workload, UNLOADED, goal)

    high = _place(ceiling)
    low = max(high - 10 * _PER_OCTAVE, _place(floor) if floor > 0.0 else -(2**31))
    if floor == 0.0 and not unloaded():
        return 0.0
    while high >= low:
        failing = _failing(able, max(high - BELOW, low), high)
        if failing is None:  # what is below `low` only if it matters
            failing = _failing(able, high - BELOW, high)
        if failing is None:
            return _rate(high) if floor == 0.0 or unloaded() else 0.0
        high = failing - 1
    return 0.0


def _failing(able: Callable[[int], bool], low: int, high: int) -> int | None:
    """One of the places from `low` to `high`, a low one if there are many; None if all are able."""
    if not able(low):
        return low
    if able(high):
        return next((place for place in range(high - 1, low, -1) if not able(place)), None)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if able(middle) else (low, middle)
    return high


def goodput_near(layout: Layout, workload: Workload, goal: Goal, near: float) -> float:
    """A rate about as high as goodput, the sooner the closer it is to `near`: next to it is one that does not attain
    the goal, but there may be others below. 0 if less than about a thousandth of `near` attains; no more than about
    four times as much, as a short run may attain the goal at any rate."""
    low, step = _place(near), 1
    least, most = low - 10 * _PER_OCTAVE, low + 2 * _PER_OCTAVE
    if attains(layout, workload, _rate(low), goal):
        while low < most and attains(layout, workload, _rate(min(low + step, most)), goal):
            low, step = min(low + step, most), 2 * step
        high = min(low + step, most + 1)
    else:
        high, low = low, low - step
        while not attains(layout, workload, _rate(low), goal):
            if low < least:
                return 0.0
            step = 2 * step
            high, low = low, low - step
    return _between(layout, workload, goal, low, high)


def _between(layout: Layout, workload: Workload, goal: Goal, low: int, high: int) -> float:
    """The highest of the RATES that attains the goal, of places of which `low` does and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        if attains(layout, workload, _rate(middle), goal):
            low = middle
        else:
            high = middle
    return _rate(low)


def next_rate(above: float) -> float:
    """The lowest of the RATES above one."""
    return _rate(_place(above) + 1)


def _rate(place: int) -> float:
    return RATE_STEP**place


def _place(rate: float) -> int:
    """Of the highest of the RATES that is not above `rate`."""
    return math.floor(math.log(rate) / math.log(RATE_STEP) + 1e-9)


def interval(layout: Layout, workload: Workload, goal: Goal, *, near: float, seed: int = 0) -> Interval:
    """Goodput, about `near`, over REPLICATIONS runs of as many requests, drawn from the workload by `seed`."""
    found = np.array([goodput_near(layout, drawn, goal, near) for drawn in draws(workload, seed)])
    half = half_width(found)
    return Interval(float(found.mean()), float(max(0.0, found.mean() - half)), float(found.mean() + half))


def draws(workload: Workload, seed: int = 0) -> Iterator[Workload]:
    """REPLICATIONS others of as many requests, the same for every layout."""
    for run in range(REPLICATIONS):
        yield workload.resampled(len(workload), np.random.default_rng((seed, run)))


def half_width(found: Times) -> float:
    """Of the 95 % interval of the mean, from REPLICATIONS values."""
    return float(_T_95 * found.std(ddof=1) / math.sqrt(REPLICATIONS))
