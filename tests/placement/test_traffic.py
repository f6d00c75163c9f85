"""A change of the rate is noticed as soon, and as rarely by mistake, whatever the pace of replanning is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from placement.forecast import Constant
from placement.goodput import Goal
from placement.outcome import Targets
from placement.replan_settings import ReplanSettings
from placement.traffic import Expected, Traffic
from placement.workload import Workload

INTERVALS_S = (0.5, 1.0, 5.0, 15.0)
AT_S = 400
REQUESTS = Workload(np.full(50, 100, np.int32), np.full(50, 10, np.int32), np.ones(50))


def told(interval_s: float, rate: Callable[[int], float], seconds: int, seed: int = 0) -> list[int]:
    """When it is told of a change of the rate, by the second, with plans at the pace of `interval_s`."""
    settings = ReplanSettings.paced(
        interval_s,
        goal=Goal(Targets(1000.0, 50.0)),
        chunk_tokens=(512,),
        horizon_s=120.0,
        least_workers=1,
        most_workers=0,
    )
    traffic, rng = Traffic(settings, Constant), np.random.default_rng(seed)
    under_way, due_s, found = 0, settings.predictive_s, []
    for now in range(1, seconds):
        under_way += int(rng.poisson(rate(now)))
        if changed := traffic.tell(now, [], under_way):
            found.append(now)
        if changed or now >= due_s:
            traffic.planned(now, Expected(REQUESTS, rate(now)), anew=False)
            due_s = now + settings.predictive_s
    return found


@pytest.mark.parametrize(("before", "after", "within_s"), [(10.0, 20.0, 10), (10.0, 5.0, 25), (1.0, 3.0, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_a_shift_is_noticed_within_the_same_seconds_at_every_interval(
    before: float, after: float, within_s: int, seed: int
) -> None:
    noticed = [told(each, lambda now: before if now < AT_S else after, AT_S + 60, seed) for each in INTERVALS_S]
    assert [len(each) for each in noticed] == [1] * len(INTERVALS_S)
    (first, *_, last) = sorted(each[0] - AT_S for each in noticed)
    assert 0 <= first <= last <= within_s
    assert last - first <= 5


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_an_hour_of_a_steady_rate_is_no_change(interval_s: float) -> None:
    assert told(interval_s, lambda _: 10.0, 3600) == []
