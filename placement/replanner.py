"""Replanning: when to look at what, and when to leave a cluster alone. A pure decider: times and loads come in, changes
go out.

Two loops share the traffic's log. The fast one (reactive.py) looks every few seconds at queues and attainment; the slow
one (predictive.py) simulates what is expected, at its pace or as soon as traffic has changed (drift.py). After a change
nothing is decided until it has settled, nor while workers are missing, so neither loop acts on what it has caused.
What was left is not gone back to for as long as leaving it was to pay, the horizon, unless there is new evidence:
traffic has changed since, or requests do worse than was foretold. Giving up a worker is held back by `spare` instead.
Other shapes of workers are paid for with all that is not served while these start, so as long as that is to pay shapes
stay as they have become, unless targets are missed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from core.errors import ConfigError
from core.served import Served
from core.types import Role
from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.change import Change
from placement.correction import Correction
from placement.drift import LEAST_COMPARED
from placement.forecast import Constant, Maker
from placement.live_log import MOST_REQUESTS
from placement.load import Load, RoleLoad
from placement.predictive import Outlook, better, leaner
from placement.reactive import Look
from placement.replan_settings import ReplanSettings
from placement.seen import Seen
from placement.startups import Startups
from placement.traffic import Expected, Period, Traffic
from placement.worker_shape import WorkerShape

__all__ = ["Arrangement", "Change", "Load", "ReplanSettings", "Replanner", "RoleLoad"]

PATIENCE = 2
"""Looks in a row that have to agree before one step is taken, or a worker given up."""


class Replanner:
    """`arrangement` is what the workers are to be used as. Tell it what has ended by `record`, whenever; ask `decide`
    every `reactive_s` or sooner. A Change is a proposal: once it is being carried out say so by `adopt`. One that
    is not, as in advisory mode, is proposed again after `settle_s` if it still holds."""

    def __init__(
        self,
        settings: ReplanSettings,
        predictor: Predictor,
        arrangement: Arrangement,
        forecast: Maker = Constant,
        before: Iterable[Period] = (),
    ) -> None:
        """`before`: what has come earlier, for the forecast to begin with. Raises ConfigError for an arrangement that
        can't be."""
        if (why := predictor.why_not(arrangement)) is not None:
            raise ConfigError(f"replan: {arrangement}: {why}", param="arrangement")
        self.settings, self.predictor, self.arrangement = settings, predictor, arrangement
        self._profiled, self._correction = predictor, Correction()
        self.traffic = Traffic(settings, forecast, before)
        self._startups = Startups()
        self._ended: deque[Served] = deque(maxlen=MOST_REQUESTS)
        self._changed: str | None = None
        """What has changed in traffic and was not planned for yet."""
        self._settled_s = self._reactive_s = self._predictive_s = -math.inf
        """When each may be looked at next."""
        self._adopted_s = -math.inf
        self._reshaped_s = self._whole_s = -math.inf
        """When workers were last given other shapes, and since when all of them are there and have settled."""
        self._missing_s: float | None = None
        """Since when workers are, and none of them comes."""
        self._coming: list[dict[WorkerShape, int]] = []
        """By role, while shapes change, who was there at the last look."""
        self._proposed: Change | None = None
        self._left: dict[Arrangement, float] = {}
        """When each was, since traffic has changed."""
        self._step, self._spare = _InARow(), _InARow()

    def record(self, served: Sequence[Served]) -> None:
        """Requests that have ended."""
        self._ended.extend(served)

    def started(self, seconds: float) -> None:
        """A worker has taken so long until it served."""
        self._startups.tell(seconds)

    @property
    def startup_s(self) -> float:
        """That a new worker is reckoned to take until it serves."""
        return self._startups.longest_s or self.settings.startup_s

    def adopt(self, arrangement: Arrangement, now_s: float) -> None:
        """The workers are being used so from now on, by a Change or by hand."""
        if self._proposed is not None and arrangement == self._proposed.to:
            self._left[self.arrangement] = now_s
        if self.arrangement.reshaped_in(arrangement):
            self._reshaped_s, self._whole_s = now_s, math.inf
        self.arrangement, self._adopted_s = arrangement, now_s
        self._settle(now_s)

    def decide(self, now_s: float, load: Load) -> Change | None:
        """Raises nothing: without enough requests to tell it decides nothing."""
        if math.isinf(self._predictive_s):  # what came in a moment tells no rate
            self._predictive_s = now_s + self.settings.predictive_s
        changed = self.traffic.tell(now_s, self._ended, load.in_flight, load.under_way, load.told_by)
        if changed is not None:
            self._changed = changed if self._changed is None else f"{self._changed} and {changed}"
            self._left.clear()
        self._ended.clear()
        self._correction.drafts(load.drafted)
        if now_s < self._settled_s or self._missing(now_s, load):
            return None
        self._whole_s = min(self._whole_s, now_s)
        change = self._predict(now_s, load) or self._react(now_s, load)
        if change is not None:
            self._proposed = change
            self._settle(now_s)
        return change

    def _goes_back(self, change: Change | None, now_s: float) -> bool:
        """Whether it undoes what is still to pay, on no other evidence than there was."""
        if change is None or now_s - self._left.get(change.to, -math.inf) >= self.settings.horizon_s:
            return False
        assert self._proposed is not None, "it was left for another"
        met = self.traffic.met_since(self._adopted_s)
        missed = min(1.0, 1 - min(self._proposed.before, self._proposed.after) + self.settings.margin)
        by_chance = 2 * math.sqrt(missed * (1 - missed) * met.judged)
        return met.judged < LEAST_COMPARED or met.missed <= missed * met.judged + by_chance

    def _shapes_stay(self, now_s: float) -> bool:
        """Whether the last change of shapes is still to pay, and targets are met: of those who came when all workers
        were there and had settled no more miss them than the goal allows, or than can be chance."""
        if now_s - self._reshaped_s >= self.settings.horizon_s:
            return False
        met, allowed = self.traffic.met_since(self._whole_s), 1 - self.settings.goal.share
        by_chance = 2 * math.sqrt(allowed * (1 - allowed) * met.judged)
        return met.judged < LEAST_COMPARED or met.missed <= allowed * met.judged + by_chance

    def _settle(self, now_s: float) -> None:
        self._settled_s = now_s + self.settings.settle_s
        self._step, self._spare = _InARow(), _InARow()

    def _missing(self, now_s: float, load: Load) -> bool:
        """Whether workers are under way to their roles, to replace one that died, or those of other shapes. When they
        should have come and have not, those that are there are what there is."""
        there = _there(self.arrangement, load)
        if there == self.arrangement:
            self._missing_s = None
            return False
        coming = [load.of(role).shapes for role in Role]
        if self._missing_s is None or coming != self._coming:
            self._missing_s, self._coming = now_s, coming
        if not there.workers or now_s - self._missing_s <= self._patience_s:
            return True
        self.arrangement, self._missing_s = there, None
        return False

    @property
    def _patience_s(self) -> float:
        """With workers that start; where shapes change others end what they have first."""
        patience_s = max(self.settings.startup_s, 2 * self._startups.longest_s)
        return patience_s + self.settings.ending_s if self.settings.shapes else patience_s

    @property
    def seen(self) -> Seen:
        """By which what the profile says is corrected."""
        return self._correction.seen

    def _correct(self, now_s: float) -> None:
        """After a change only by those who came when it had settled."""
        came = self.traffic.came_since(self._adopted_s, now_s)
        self._correction.look(self._profiled, self.arrangement, came, self._adopted_s + self.settings.settle_s)
        self.predictor = self._profiled.as_seen(self.seen)

    def _predict(self, now_s: float, load: Load) -> Change | None:
        if self._changed is None and now_s < self._predictive_s:
            return None
        if (expected := self.traffic.expected(now_s)) is None:
            return None
        self._correct(now_s)
        outlook = self._outlook(expected, load, shapes_stay=self._shapes_stay(now_s))
        change = better(outlook, self.arrangement, load)
        if self._goes_back(change, now_s):
            change = None
        if self._changed is not None:
            self._spare = _InARow()
        elif change is None:
            fewer = leaner(outlook, self.arrangement, load)
            change = fewer if self._spare.often(None if fewer is None else fewer.to) else None
        self.traffic.planned(now_s, expected, anew=change is not None)
        changed, self._changed = self._changed, None
        self._predictive_s = now_s + (self.settings.settle_s if expected.unsettled else self.settings.predictive_s)
        return change if change is None or changed is None else replace(change, why=f"{changed}; {change.why}")

    def _outlook(self, expected: Expected, load: Load, *, shapes_stay: bool = False) -> Outlook:
        return Outlook(self.settings, self.predictor, expected, load.waiting_requests, self.startup_s, shapes_stay)

    def _react(self, now_s: float, load: Load) -> Change | None:
        if now_s < self._reactive_s:
            return None
        self._reactive_s = now_s + self.settings.reactive_s
        look = Look(self.settings, self.predictor, self.arrangement, load, self.traffic.met(now_s, self._adopted_s))
        to, why = look.step() or (None, "")
        recent = self.traffic.recent(now_s)
        if not self._step.often(to) or to is None or recent is None or self.predictor.why_not(to) is not None:
            return None
        outlook = self._outlook(recent, load)
        before, after = outlook.attainment(self.arrangement), outlook.attainment(to)
        if after < before + (self.settings.margin if to.both > self.arrangement.both else 0.0):
            return None
        change = outlook.change(self.arrangement, to, load, before, after)
        return None if self._goes_back(change, now_s) else replace(change, by="reactive", why=f"{why}; {change.why}")


def _there(planned: Arrangement, load: Load) -> Arrangement:
    """What the workers that are there are used as. Of those of a role with unlike shapes, while these change, only the
    ones with the shape that has most devices count, if it is not all as planned."""
    counts = {role.value: load.of(role).workers for role in Role}
    if planned.decode_shape is None:
        return replace(planned, **counts)
    there = {role: {shape: n for shape, n in load.of(role).shapes.items() if n} for role in Role}
    wanted = {role: {planned.shape(role): planned.of(role)} if planned.of(role) else {} for role in Role}
    if there == wanted:
        return planned
    most = {role: max(shapes, key=lambda one: one.devices * shapes[one]) for role, shapes in there.items() if shapes}
    decode_shape = most.get(Role.BOTH) or most.get(Role.DECODE) or most.get(Role.PREFILL)
    return Arrangement(
        **{role.value: there[role][most[role]] if role in most else 0 for role in Role},
        chunk_tokens=planned.chunk_tokens,
        prefill_shape=most.get(Role.PREFILL) or decode_shape,
        decode_shape=decode_shape,
    )


class _InARow:
    """Whether looks agree."""

    def __init__(self) -> None:
        self._last: Arrangement | None = None
        self._times = 0

    def often(self, wanted: Arrangement | None) -> bool:
        """Whether something was wanted, and the same PATIENCE times in a row."""
        self._times = self._times + 1 if wanted == self._last else 1
        self._last = wanted
        return wanted is not None and self._times >= PATIENCE
