"""The slow loop of replanning: of all arrangements within reach, the one that gains most over the horizon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
        drawn = self.expected.workload.resampled(self.backlog + count, np.random.default_rng(0))
        gaps = drawn.gaps.copy()
        gaps[: self.backlog] = 0.0
        return self.predictor.attainment(arrangement, drawn.with_gaps(gaps), rate)

    def within_reach(self, workers: int) -> Iterator[Arrangement]:
        for found in arrangements(workers, self.settings.least_workers, self.settings.chunk_tokens):
            if self.predictor.why_not(found) is None:
                yield found

    def change(self, now: Arrangement, to: Arrangement, load: Load, before: float, after: float) -> Change:
        settings = self.settings
        prompt_ms = self.predictor.prompt_ms(1.0, now.chunk_tokens)
        moving = migration(now, to, load, prompt_ms, settings.startup_s)
        more_each_s = (after - before) * (self.expected.rate + self.backlog / settings.horizon_s)
        gain, cost = more_each_s * settings.horizon_s, moving.disturbed + max(0.0, more_each_s) * moving.delay_s
        why = (
            f"attainment {before:.0%} -> {after:.0%} expected at {self.expected}: {gain:+.0f} requests within targets "
            f"in {settings.horizon_s:g} s, and {cost:.0f} at most without for the change"
        )
        return Change(to=to, by="predictive", why=why, gain=gain, cost=cost, before=before, after=after)


def better(outlook: Outlook, now: Arrangement, load: Load) -> Change | None:
    """The change that gains most over what it costs, and the margin at least; to more workers only if the goal is
    missed without. Of several about as good the one that stands `spare` times the rate best."""
    settings, before = outlook.settings, outlook.attainment(now)
    found: list[Change] = []
    for workers in range(now.workers, max(now.workers, settings.most_workers) + 1):
        others = [to for to in outlook.within_reach(workers) if to != now]
        found += [outlook.change(now, to, load, before, outlook.attainment(to)) for to in others]
        if max([before, *(change.after for change in found)]) >= settings.goal.share:
            break
    best = max(found, key=_net, default=None)
    if best is None or best.after - before < settings.margin or best.gain <= best.cost:
        return None
    good = [change for change in found if _net(best) - _net(change) < settings.margin / 2 * best.gain]
    return max(good, key=lambda change: (outlook.attainment(change.to, settings.spare), _net(change)))


def _net(change: Change) -> float:
    return change.gain - change.cost


def leaner(outlook: Outlook, now: Arrangement, load: Load) -> Change | None:
    """With one worker fewer, if that attains the goal at `spare` times the expected rate; None where the number of
    workers is not to change."""
    settings = outlook.settings
    if not settings.most_workers:
        return None
    tried = [(outlook.attainment(to, settings.spare), to) for to in outlook.within_reach(now.workers - 1)]
    attained, to = max(tried, key=lambda entry: entry[0], default=(0.0, now))
    if attained < settings.goal.share:
        return None
    change = outlook.change(now, to, load, outlook.attainment(now), outlook.attainment(to))
    spare = f"a worker is spared: without it {attained:.0%} at {settings.spare:g} times the rate; "
    return replace(change, why=spare + change.why)
