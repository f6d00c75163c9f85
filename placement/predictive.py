"""The slow loop of replanning: of the arrangements within reach, the one that gains most over the horizon.

Where workers are many only some arrangements are simulated, so that a look takes seconds: of each number of workers and
size of steps MOST_TRIED and a few around the best; and of the numbers those that doubling and halving come by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
from msgspec.structs import replace

from core.types import Role
from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.change import Change
from placement.load import Load
from placement.moving import Way, way
from placement.reachable import AS_STARTED, arrangements, migration
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
    startup_s: float | None = None
    """Until a new worker serves; None: as the settings have it."""
    shapes_stay: bool = False
    """Workers of no shape give way to those of another for now."""
    _crowded: dict[tuple[Arrangement, float], float] = field(default_factory=dict, init=False)
    """Attainment of what serves while others change."""

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

    def merits(self, devices: int, merit: Callable[[Arrangement], float]) -> dict[Arrangement, float]:
        """Of all arrangements on so many devices, or where these are many of some, near the best of which are most."""
        alike = groupby(
            self._arrangements(devices), lambda found: (found.chunk_tokens, found.prefill_shape, found.decode_shape)
        )
        return {found: of for _, group in alike for found, of in _merits([*group], merit).items()}

    def _arrangements(self, devices: int) -> Iterator[Arrangement]:
        settings = self.settings
        return arrangements(devices, settings.least_workers, settings.chunk_tokens, settings.shapes or AS_STARTED)

    def way(self, now: Arrangement, to: Arrangement) -> Way | None:
        """From the shapes of the one to those of the other, on which somebody always serves; None: there is none, or
        none is to be taken."""
        if self.shapes_stay and now.reshaped_in(to):
            return None
        if not self.settings.shapes:
            return Way(int(to.workers > now.workers), 1.0)
        return way(now.of_shapes, to.of_shapes, max(self.settings.devices, now.devices))

    def change(self, now: Arrangement, to: Arrangement, load: Load, before: float, after: float) -> Change:
        """There has to be a way."""
        settings, rate = self.settings, self.expected.rate + self.backlog / self.settings.horizon_s
        prompt_ms, starts = self.predictor.prompt_ms(1.0, now), now.counts != to.counts
        moved = self.way(now, to) if settings.shapes and starts else None
        startup_s = settings.startup_s if self.startup_s is None else self.startup_s
        moving = migration(now, to, load, prompt_ms, startup_s, moved, self._ending_s(now, load))
        more_each_s = (after - before) * rate
        gain, cost = more_each_s * settings.horizon_s, moving.disturbed + max(0.0, more_each_s) * moving.delay_s
        why = (
            f"attainment {before:.0%} -> {after:.0%} expected at {self.expected}: {gain:+.0f} requests within targets "
            f"in {settings.horizon_s:g} s"
        )
        if moved is not None and moved.share < 1.0:
            during = self._during(now, moved.share)
            cost += max(0.0, before - during) * rate * moving.delay_s
            why += f", {during:.0%} for {moving.delay_s:.0f} s while workers of other shapes start"
        why += f", less {cost:.0f} for the change at the most"
        return Change(to=to, by="predictive", why=why, gain=gain, cost=cost, before=before, after=after)

    def _ending_s(self, now: Arrangement, load: Load) -> float:
        """Until a worker that gets nothing more has ended what it has: whole answers at the most."""
        used = [role for role in Role if now.of(role)]
        token_ms = max((self.predictor.token_ms(load.of(role), now.of(role), now) for role in used), default=0.0)
        return min(self.settings.ending_s, float(self.expected.workload.output_tokens.mean()) * token_ms / 1e3)

    def _during(self, now: Arrangement, share: float) -> float:
        """Attainment if this share of the devices has all the work: as much for each of them as if more came."""
        if (now, share) not in self._crowded:
            self._crowded[now, share] = self.attainment(now, 1 / share)
        return self._crowded[now, share]


def better(outlook: Outlook, now: Arrangement, load: Load) -> Change | None:
    """The change that gains most over what it costs, and the margin at least; to more workers only if the goal is
    missed without. Of several about as good the one that stands `spare` times the rate best."""
    settings, before = outlook.settings, outlook.attainment(now)
    seen: dict[Arrangement, Change] = {}

    def net(to: Arrangement) -> float:
        if outlook.way(now, to) is None:
            return -math.inf
        seen[to] = outlook.change(now, to, load, before, outlook.attainment(to))
        return _net(seen[to])

    def attains(devices: int) -> bool:
        return any(to in seen and seen[to].after >= settings.goal.share for to in outlook.merits(devices, net))

    least, most = settings.devices_of(now.devices)
    enough = fewest(least, least if before >= settings.goal.share else most, attains)
    found = sorted((change for change in seen.values() if change.to != now and change.to.devices <= enough), key=_net)
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
    """With one worker fewer, if that attains the goal at `spare` times the expected rate, or where there are shapes one
    device or a few; None where the number of workers is not to change."""
    settings = outlook.settings
    if not settings.most_workers:
        return None

    def merit(to: Arrangement) -> float:
        return 0.0 if outlook.way(now, to) is None else outlook.attainment(to, settings.spare)

    tried = outlook.merits(now.devices - 1, merit)
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
