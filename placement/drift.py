"""Whether traffic has changed since a plan was made for it.

The rate is watched by Page's CUSUM (1954), which notices a lasting change soonest of all tests that are wrong as rarely
(Lorden, 1971). So are prompts as they come and outputs as they grow, against laws that are longer or shorter: a few
requests of quite another kind are enough, before the first of them ends. The lengths of prompts and outputs together
are compared by their energy distance (Székely and Rizzo, 2004), which is zero for equal laws only, with a permutation
test: it is wrong exactly as often as asked for, whatever the law; it takes more requests, that have ended, and tells
other changes too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.arrived import Arrived
from placement.live_log import Ended, LiveLog
from placement.survival import Survival
from placement.traces import served_workload
from placement.workload import Times, Workload

KNOWN_S, KNOWN = 300.0, 1000
"""The last seconds, or requests if these are fewer, that changes are told against, whatever the pace of plans."""
LOOK_S, LATELY_S = 5.0, 20.0
"""Between two looks at lengths, and of which they take what has ended, whatever the pace of plans."""
MOST_COMPARED = 200
"""Requests of either sample: distances are between all pairs."""
LEAST_COMPARED = 20
_LEAST_LATELY = 2 * LEAST_COMPARED
"""Requests that a look takes, also of slow traffic."""
SLIGHT = 0.03
"""About as far as lengths are apart that vary as much as their mean, and of which one is half as long again."""
_LIKELY = math.log(20)
_AT_ONCE = 20
"""Permutations that are tried together."""


@dataclass
class _Sum:
    """Page's, and for how long it has been above zero: since the change, if there was one."""

    value: float = 0.0
    seconds: float = 0.0

    def add(self, value: float, seconds: float) -> None:
        self.value += value
        self.seconds += seconds
        if self.value <= 0.0:
            self.value = self.seconds = 0.0


class RateWatch:
    """Two CUSUMs of log-likelihood ratios: that the rate is `factor` times what it was, and that it is as many times
    less. On a steady Poisson process a false alarm comes once in `mean_requests` at the most often: with a threshold h,
    exp(h) requests pass on average before one (Lorden), and here are two sums. Burstier arrivals, by the shape of their
    gamma gaps, count for as much less. A rate that was learnt from some requests is known within a range, of three
    standard errors; the sums start from its ends."""

    def __init__(self, *, factor: float = 1.5, mean_requests: float = 1e5) -> None:
        self._factor = factor
        self._threshold = math.log(2 * mean_requests)
        self._more, self._less = _Sum(), _Sum()

    @property
    def suspects_s(self) -> float:
        """For how long the rate has likely been another: by chance such a sum stands at one moment in 20."""
        return self._surest.seconds if self._surest.value > _LIKELY else 0.0

    def expect(self, rate: float, requests: float = math.inf, burstiness: float = 1.0) -> None:
        """From now on; known from so many requests."""
        self.rate, self._weight = rate, min(1.0, burstiness)
        self._off = min(0.9, 3 / math.sqrt(requests * self._weight))

    def tell(self, arrived: int, seconds: float) -> float | None:
        """How many requests came in the next `seconds`. If the rate has changed, for how many seconds it has."""
        expected, each = self.rate * seconds, math.log(self._factor)
        most, least = expected * (1 + self._off), expected * (1 - self._off)
        self._more.add(self._weight * (each * arrived - (self._factor - 1) * most), seconds)
        self._less.add(self._weight * ((1 - 1 / self._factor) * least - each * arrived), seconds)
        return self._surest.seconds if self._surest.value > self._threshold else None

    @property
    def _surest(self) -> _Sum:
        return max(self._more, self._less, key=lambda side: side.value)


class LengthWatch:
    """Whether lengths are no longer what they were: those of what has ended lately against those expected. Where these
    are few, what has ended since and is not so lately any more makes them up to KNOWN."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self.expect(-math.inf, ())

    def expect(self, now_s: float, like: Iterable[Ended], came_s: float = -math.inf) -> None:
        """From now on, of those that came at `came_s` or later. With too few to tell it waits to be told again: those
        that end next are the short ones of them."""
        self._looked_s, self._before, self._came_s = now_s, list(like), came_s
        self._lately: list[Ended] = []

    @property
    def ready(self) -> bool:
        return len(self._before) >= LEAST_COMPARED

    def look(self, now_s: float, log: LiveLog) -> float | None:
        """If lengths have changed, when the first request came that has others. Looks every LOOK_S, if asked as often
        or oftener."""
        if now_s - self._looked_s < LOOK_S or not self.ready:
            return None
        ended = (one for one in log.ended(self._looked_s) if one.came_s >= self._came_s)
        told = [*self._lately, *sorted(ended, key=lambda one: one.told_s)]
        self._looked_s = now_s
        recent = sum(one.told_s > now_s - LATELY_S for one in told)
        older = max(0, len(told) - max(recent, _LEAST_LATELY))
        self._before += told[:older][: max(0, KNOWN - len(self._before))]
        self._lately = told[older:]
        if len(self._lately) < LEAST_COMPARED:
            return None
        lately = sorted(self._lately, key=lambda one: one.came_s)
        before, now = (served_workload(one.served for one in of) for of in (self._before, lately))
        return lately[changed_at(now)].came_s if lengths_differ(before, now, rng=self._rng) else None


_POWERS = np.array([1 / 16, 1 / 4, 1 / 2, 2.0, 4.0, 16.0])
"""Of S, the share above a length. Lengths that vary as much as their mean are then as many times as short; those that
are less than about 1.4 times as long or as short are nearer to what they were."""


class SizeWatch:
    """CUSUMs of log-likelihood ratios over requests in the order in which they came, those that are under way among
    them: that since one of them prompts, or outputs, follow the law S ** power instead of S, for each of _POWERS. What
    has not ended is weighed as what it is known to be, so that each sum is a martingale as outputs grow (as in Biswas
    and Kalbfleisch, A risk-adjusted CUSUM in continuous time, 2008). As long as nothing changes a false alarm comes
    once in `mean_requests` at the most often (Lorden), if lengths of requests have nothing to do with each other."""

    def __init__(self, *, mean_requests: float = 1e5) -> None:
        self._threshold = math.log(2 * len(_POWERS) * mean_requests)
        self._likely = math.log(2 * len(_POWERS)) + _LIKELY
        self.suspects_s = math.inf
        """Since whom lengths are likely others: by chance there is somebody at one moment in 20."""

    def expect(self, since_s: float, before: Arrived) -> None:
        """Of those who come at `since_s` or later."""
        self._since_s, self._before, self.suspects_s = since_s, before, math.inf
        self._prompts = Survival(before.prompts, np.ones(len(before), np.bool_))
        self._outputs = Survival(before.outputs, before.ended)

    def look(self, now_s: float, log: LiveLog) -> float | None:
        """If lengths have changed, when the first request came that has others. Who came a while ago is what is
        expected too from then on, up to KNOWN, unless a change is likely."""
        came = log.arrived(self._since_s)
        if not len(came):
            return None
        prompts = _since(self._prompts.likelier(came.prompts, np.ones(len(came), np.bool_), _POWERS))
        outputs = _since(self._outputs.likelier(came.outputs, came.ended, _POWERS))
        most = max(prompts.max(), outputs.max())
        place = int((prompts + outputs).argmax())  # by both: outputs of the last before the change are still open
        since_s = float(came.came_s[place])
        self.suspects_s = since_s if most > self._likely else math.inf
        if most > self._threshold:
            return since_s
        older = min(int(np.searchsorted(came.came_s, now_s - LATELY_S)), len(came) - _LEAST_LATELY)
        if older > 0 and math.isinf(self.suspects_s) and len(self._before) < KNOWN:
            self.expect(float(came.came_s[older]), self._before.followed_by(came[:older]))
        return None


def _since(ratios: Times) -> Times:
    """Of the sums from each request on, [powers, requests], the largest."""
    found: Times = ratios[:, ::-1].cumsum(axis=1).max(axis=0)[::-1]
    return found


def lengths_differ(
    before: Workload, now: Workload, *, rng: np.random.Generator, false_alarms: float = 0.001, slight: float = SLIGHT
) -> bool:
    """Whether prompt and output lengths follow another law now. If they do not, the answer is True in no more than the
    share `false_alarms` of the calls; nor is it if they do and the laws are no more than `slight` apart, of 1 for such
    as have nothing in common. False with fewer than LEAST_COMPARED requests on a side."""
    if min(len(before), len(now)) < LEAST_COMPARED:
        return False
    one, other = _sample(before, rng), _sample(now, rng)
    points = np.concatenate([one, other])
    distances = np.linalg.norm(points[:, None] - points[None, :], axis=2)  # [points, points]
    sides = np.concatenate([np.full(len(one), 1 / len(one)), np.full(len(other), -1 / len(other))])
    found = _energy(sides[None], distances)[0]
    by_chance = (1 / len(one) + 1 / len(other)) / 2
    if found < (slight + by_chance) * 2 * distances[: len(one), len(one) :].mean():
        return False
    left = math.ceil(1 / false_alarms) - 1
    while left > 0:  # one that is as far apart by chance suffices, and mostly comes soon
        tried = min(left, _AT_ONCE)
        shuffled = rng.permuted(np.broadcast_to(sides, (tried, len(sides))), axis=1)
        if (_energy(shuffled, distances) >= found - 1e-12).any():
            return False
        left -= tried
    return True


def changed_at(workload: Workload) -> int:
    """Place of the first request after a change of lengths, if there was one: where the logarithms before and after are
    most apart, by the sum of squares between the two (Vostrikova, 1981)."""
    points = _logarithms(workload)
    count, sums = len(points), np.cumsum(points, axis=0)
    before = np.arange(1, count)[:, None]
    apart = sums[:-1] / before - (sums[-1] - sums[:-1]) / (count - before)  # [splits, 2]
    between = (before * (count - before))[:, 0] * (apart**2).sum(axis=1)
    return int(between.argmax()) + 1


def _energy(sides: NDArray[np.float64], distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| for each way to take sides, which are 1/n for the n of the first sample and
    -1/m for the m of the second. # [ways]"""
    energies: NDArray[np.float64] = -((sides @ distances) * sides).sum(axis=1)
    return energies


def _sample(workload: Workload, rng: np.random.Generator) -> NDArray[np.float64]:
    """# [requests, 2]"""
    count = min(len(workload), MOST_COMPARED)
    chosen = rng.choice(len(workload), count, replace=False)
    return _logarithms(workload)[chosen]


def _logarithms(workload: Workload) -> NDArray[np.float64]:
    """That a prompt is twice as long counts the same for short and long ones. # [requests, 2]"""
    return np.log(np.stack([workload.prompt_tokens, workload.output_tokens], axis=1))
