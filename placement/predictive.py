"""The slow loop of replanning: of the arrangements within reach, the one that gains most over the horizon.

Where workers are many only some arrangements are simulated, so that a look takes seconds: of each number of workers and
size of steps MOST_TRIED and a few around the best; and of the numbers those that doubling and halving come by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from msgspec.structs import replace

from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.change import Change
from placement.load import Load
from placement.reachable import arrangements, migration
from placement.replan_settings import ReplanSettings
from placement.traffic import Expected

_LEAST_SIMULATED, _MOST_SIMULATED = 200, 2000
"""Requests; of those that wait already no more than the latter are simulated besides."""
MOST_TRIED = 16
"""Arrangements of a number of workers with steps of one size that are simulated, evenly among all; then up to six
around the best of them, and again ever nearer to it."""


@dataclass(frozen=True, eq=False)
class Outlook:
    """What arrangements would do with what is expected: every one meets the same requests."""

    settings: ReplanSettings
    predictor: Predictor
    expected: Expected
    backlog: int = 0
    """Requests that wait already."""

    def attainment(self, arrangement: Arrangement, times: float = 1.0) -> float:
        """At so many times the expected rate, over the horizon, of those that wait too; 0 of what can't be."""
        if self.predictor.why_not(arrangement) is not None:
            return 0.0
        rate = self.expected.rate * times
        count = int(np.clip(rate * self.settings.horizon_s, _LEAST_SIMULATED, _MOST_SIMULATED))
        waiting = min(self.backlog, _MOST_SIMULATED)
        drawn = self.expected.workload.resampled(waiting + count, np.random.default_rng(0))
        gaps = drawn.gaps.copy()
        gaps[:waiting] = 0.0
        return self.predictor.attainment(arrangement, drawn.with_gaps(gaps), rate)

    def within_reach(self, workers: int) -> Iterator[Arrangement]:
        for found in self._arrangements(workers):
            if self.predictor.why_not(found) is None:
                yield found

    def merits(self, workers: int, merit: Callable[[Arrangement], float]) -> dict[Arrangement, float]:
        """Of all arrangements of so many workers, or where these are many of some, near the best of which are most."""
        sizes = groupby(self._arrangements(workers), lambda found: found.chunk_tokens)
        return {found: of for _, group in sizes for found, of in _merits([*group], merit).items()}

    def _arrangements(self, workers: int) -> Iterator[Arrangement]:
        return arrangements(workers, self.settings.least_workers, self.settings.chunk_tokens)

    def change(self, now: Arrangement, to: Arrangement, load: Load, before: float, after: float) -> Change:
        settings = self.settings
        prompt_ms = self.predictor.prompt_ms(1.0, now.chunk_tokens)
        moving = migration(now, to, load, prompt_ms, settings.startup_s)
        more_each_s = (after - before) * (self.expected.rate + self.backlog / settings.horizon_s)
        gain, cost = more_each_s * settings.horizon_s, moving.disturbed + max(0.0, more_each_s) * moving.delay_s
        why = (
            f"attainment {before:.0%} -> {after:.0%} expected at {self.expected}: {gain:+.0f} requests within targets "
            f"in {settings.horizon_s:g} s, less {cost:.0f} for the change at the most"
        )
        return Change(to=to, by="predictive", why=why, gain=gain, cost=cost, before=before, after=after)


def better(outlook: Outlook, now: Arrangement, load: Load) -> Change | None:
    """The change that gains most over what it costs, and the margin at least; to more workers only if the goal is
    missed without. Of several about as good the one that stands `spare` times the rate best."""
    settings, before = outlook.settings, outlook.attainment(now)
    seen: dict[Arrangement, Change] = {}

    def net(to: Arrangement) -> float:
        seen[to] = outlook.change(now, to, load, before, outlook.attainment(to))
        return _net(seen[to])

    def attains(workers: int) -> bool:
        return any(seen[to].after >= settings.goal.share for to in outlook.merits(workers, net))

    most = now.workers if before >= settings.goal.share else max(now.workers, settings.most_workers)
    enough = fewest(now.workers, most, attains)
    found = sorted((change for change in seen.values() if change.to != now and change.to.workers <= enough), key=_net)
    if not found or (best := found[-1]).after - before < settings.margin or best.gain <= best.cost:
        return None
    good = [change for change in found if _net(best) - _net(change) < settings.margin / 2 * best.gain]
    return max(good[-MOST_TRIED:], key=lambda change: (outlook.attainment(change.to, settings.spare), _net(change)))


def _net(change: Change) -> float:
    return change.gain - change.cost


def fewest(least: int, most: int, attains: Callable[[int], bool]) -> int:
    """The smallest number that attains, if any above it does too; `most` if none does."""
    lacking, enough, step = least - 1, least, 1
    while not attains(enough):
        if enough == most:
            return most
        lacking, enough, step = enough, min(most, enough + step), 2 * step
    while enough - lacking > 1:
        middle = (lacking + enough) // 2
        lacking, enough = (lacking, middle) if attains(middle) else (middle, enough)
    return enough


def leaner(outlook: Outlook, now: Arrangement, load: Load) -> Change | None:
    """With one worker fewer, if that attains the goal at `spare` times the expected rate; None where the number of
    workers is not to change."""
    settings = outlook.settings
    if not settings.most_workers:
        return None
    tried = outlook.merits(now.workers - 1, lambda to: outlook.attainment(to, settings.spare))
    to, attained = max(tried.items(), key=itemgetter(1), default=(now, 0.0))
    if attained < settings.goal.share:
        return None
    change = outlook.change(now, to, load, outlook.attainment(now), outlook.attainment(to))
    spare = f"a worker is spared: without it {attained:.0%} at {settings.spare:g} times the rate; "
    return replace(change, why=spare + change.why)


def _merits(of: Sequence[Arrangement], merit: Callable[[Arrangement], float]) -> dict[Arrangement, float]:
    """Neighbours are taken to be about as good."""
    apart = math.ceil(len(of) / MOST_TRIED)
    found = {place: merit(of[place]) for place in range(0, len(of), apart)}
    while apart > 1:
        best = max(found, key=found.__getitem__)
        apart = math.ceil(apart / 4)
        near = range(best - 3 * apart, best + 3 * apart + 1, apart)
        found |= {place: merit(of[place]) for place in near if 0 <= place < len(of) and place not in found}
    return {of[place]: value for place, value in found.items()}
