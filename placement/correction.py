"""Correcting a profile by what is served. A pure decider: requests that have ended come in, factors go out.

The requests that came lately are simulated as they came, with the workers as they are used and the factors so far, and
the median TTFT of these that nobody has judged yet is compared with what it was, and the median TPOT. The one tells how
prompts are off, the other how decodes are. Only what is off in several such looks in a row moves a factor, and by half
of what it is off at the least: one odd look moves nothing, queues that a factor makes much longer settle, and a factor
is never beyond what some look has found. Steps take as long whatever the roles are, so a change of these leaves the
factors as they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.drift import LEAST_COMPARED
from placement.live_log import Ended
from placement.load import Drafted
from placement.seen import Seen
from placement.traces import served_workload
from placement.workload import Times

LOOKS = 3
"""In a row that have to agree."""
TOLERANCE = 0.05
"""By which a prediction may be off."""
PART = 0.5
"""Of the way that is gone at once."""
MOST = 2.0
"""Times as long, or as short: a profile that is further off is of another machine."""
TOLD_WITHIN_S = 2.0
"""Gateways report every second, and are heard every second."""
HALF_STEPS = 2000.0
"""Of sequences, after which what drafts brought before counts for half."""


class Factor:
    """1 until looks agree that it is another, and never above MOST or below 1 / MOST."""

    def __init__(self) -> None:
        self.value = 1.0
        self._found: deque[float] = deque(maxlen=LOOKS)
        """Logarithms of what it should be, by the last looks."""

    def tell(self, measured: float, predicted: float) -> None:
        """Both above 0, and the latter with the factor as it is."""
        now = math.log(self.value)
        self._found.append(now + math.log(measured / predicted))
        off = [found - now for found in self._found]
        if len(off) == LOOKS and (min(off) > math.log1p(TOLERANCE) or max(off) < -math.log1p(TOLERANCE)):
            most = math.log(MOST)
            self.value = math.exp(min(max(-most, now + PART * min(off, key=abs)), most))


class Correction:
    """Of a cluster whose workers are alike."""

    def __init__(self) -> None:
        self._prompts, self._decodes = Factor(), Factor()
        self._drafted = Drafted()
        self._judged_s = -math.inf
        """Who came up to then."""

    @property
    def seen(self) -> Seen:
        return Seen(self._prompts.value, self._decodes.value, self._drafted)

    def drafts(self, lately: Drafted) -> None:
        """What was drafted since the last call."""
        before = 0.5 ** (lately.steps / HALF_STEPS)
        self._drafted = Drafted(
            steps=before * self._drafted.steps + lately.steps,
            tokens=before * self._drafted.tokens + lately.tokens,
            accepted=before * self._drafted.accepted + lately.accepted,
        )

    def look(self, profiled: Predictor, used: Arrangement, came: Sequence[Ended], since_s: float = -math.inf) -> None:
        """All who `came` while workers were `used` so, in order, and have ended; those who came before `since_s` are
        not judged. With too few to judge it waits for more."""
        fresh = [place for place, one in enumerate(came) if one.came_s > max(since_s, self._judged_s)]
        if len(fresh) < LEAST_COMPARED:
            return
        self._judged_s = came[-1].came_s
        at_s = _came_at(came)
        order = np.argsort(at_s, kind="stable")
        gaps = np.diff(at_s[order], prepend=at_s.min())
        workload = served_workload(came[place].served for place in order).with_gaps(gaps)
        predicted = profiled.as_seen(self.seen).outcome(used, workload, 1.0)
        if predicted is None:
            return
        served, judged = [came[place].served for place in fresh], np.argsort(order)[fresh]
        _compare(self._prompts, [one.ttft_ms for one in served], predicted.ttft_ms[judged])
        _compare(self._decodes, [one.tpot_ms for one in served], predicted.tpot_ms[judged])


def _came_at(came: Sequence[Ended]) -> Times:
    """By the clock of a gateway, as far as that agrees with when requests were told of, which is some seconds apart:
    they would come in bunches otherwise. # [requests]"""
    told, clock = np.array([one.came_s for one in came]), np.array([one.served.arrived_s for one in came])
    at_s: Times = np.clip(clock + np.median(told - clock), told - TOLD_WITHIN_S, told + TOLD_WITHIN_S)
    return at_s


def _compare(factor: Factor, measured: list[float | None], predicted: Times) -> None:
    known = [place for place, ms in enumerate(measured) if ms is not None]
    if len(known) < LEAST_COMPARED:
        return
    medians = np.median([measured[place] or 0.0 for place in known]), np.median(predicted[known])
    if min(medians) > 0.0:
        factor.tell(*map(float, medians))
