"""A change is noticed as soon, and as rarely by mistake, whatever the pace of replanning is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from core.served import Served, UnderWay
from placement.drift import LOOK_S
from placement.forecast import Constant, Forecast, HoltWinters
from placement.goodput import Goal
from placement.outcome import Targets
from placement.replan_settings import ReplanSettings
from placement.traffic import Expected, Period, Traffic
from placement.workload import Workload
from tests.placement.served import served

INTERVALS_S = (0.5, 5.0, 60.0)
AT_S = 400
"""By when every interval has had a plan: the longest makes its first after 360 s."""
REQUESTS = Workload(np.full(50, 100, np.int32), np.full(50, 10, np.int32), np.ones(50))
TPOT_S = 0.1

PERIOD_S, DAY = 30, 20
"""Of forecasts, and in such periods of what repeats itself."""

Second = tuple[list[Served], int, list[UnderWay]]
"""Requests that ended in it, how many are under way at its end, and these, as far as they are told of."""


def told(interval_s: float, rate: float, seconds: list[Second]) -> list[tuple[int, str]]:
    """When it is told of a change, by the second, with plans at the pace of `interval_s`, and what has changed."""
    settings = ReplanSettings.paced(
        interval_s,
        goal=Goal(Targets(1000.0, 50.0)),
        chunk_tokens=(512,),
        horizon_s=120.0,
        least_workers=1,
        most_workers=0,
    )
    traffic, due_s, found = Traffic(settings, Constant), settings.predictive_s, []
    for now, second in enumerate(seconds, 1):
        if changed := traffic.tell(now, *second):
            found.append((now, changed))
        if changed or now >= due_s:
            traffic.planned(now, Expected(REQUESTS, rate), anew=False)
            due_s = now + settings.predictive_s
    return found


def coming(rate: Callable[[int], float], seconds: int, seed: int = 0) -> list[Second]:
    """None of them ends."""
    rng = np.random.default_rng(seed)
    return [([], int(came), []) for came in np.cumsum([rng.poisson(rate(now)) for now in range(1, seconds)])]


def ending(
    rate: float, seconds: int, after: tuple[float, float] = (1.0, 1.0), rate_after: float | None = None, seed: int = 0
) -> list[Second]:
    """Prompts of 300 tokens on average and outputs of 100, which take TPOT_S each; those that come after AT_S are as
    many times as long as `after` says, and come at the other rate."""
    rng = np.random.default_rng(seed)
    came = np.cumsum(rng.exponential(1 / rate, int(1.2 * rate * seconds)))
    came = np.where(came > AT_S, AT_S + (came - AT_S) * rate / (rate_after or rate), came)
    times = np.where((came > AT_S)[:, None], after, 1.0)
    prompts, outputs = (1 + rng.exponential((300.0, 100.0) * times)).astype(int).T
    ended = np.ceil(came + outputs * TPOT_S)
    return [
        (
            [
                served(0.0, int(prompts[one]), int(outputs[one]), 100.0, TPOT_S * 1e3)
                for one in np.flatnonzero(ended == now)
            ],
            len(left := np.flatnonzero((came <= now) & (ended > now))),
            [
                UnderWay(
                    now - came[one], int(prompts[one]), 0, min(int(outputs[one]) - 1, int((now - came[one]) / TPOT_S))
                )
                for one in left
            ],
        )
        for now in range(1, seconds)
    ]


@pytest.mark.parametrize(("before", "after", "within_s"), [(10.0, 20.0, 10), (10.0, 5.0, 25), (1.0, 3.0, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_a_shift_of_the_rate_is_noticed_within_the_same_seconds_at_every_interval(
    before: float, after: float, within_s: int, seed: int
) -> None:
    seconds = coming(lambda now: before if now < AT_S else after, AT_S + 60, seed)
    noticed = [told(each, before, seconds) for each in INTERVALS_S]
    assert [len(each) for each in noticed] == [1] * len(INTERVALS_S)
    (first, *_, last) = sorted(at_s - AT_S for ((at_s, _),) in noticed)
    assert 0 <= first <= last <= within_s
    assert last - first <= 5


@pytest.mark.parametrize(
    ("rate", "after", "within_s"), [(10.0, (0.25, 1.0), 10), (10.0, (1.0, 4.0), 20), (1.0, (4.0, 0.25), 30)]
)
def test_a_shift_of_lengths_is_noticed_within_the_same_seconds_at_every_interval(
    rate: float, after: tuple[float, float], within_s: int
) -> None:
    seconds = ending(rate, AT_S + 80, after)
    noticed = [[at_s for at_s, _ in told(each, rate, seconds) if at_s > AT_S] for each in INTERVALS_S]
    assert all(noticed)
    (first, *_, last) = sorted(each[0] - AT_S for each in noticed)
    assert 0 <= first <= last <= within_s
    assert last - first <= 2 * LOOK_S


@pytest.mark.parametrize("after", [(0.1, 5.0), (10.0, 0.5), (1.0, 5.0)], ids=["answers", "prompts", "answers alone"])
@pytest.mark.parametrize("seed", range(3))
def test_a_shift_to_few_and_long_requests_is_noticed_before_they_end(after: tuple[float, float], seed: int) -> None:
    """Of 10 requests/s 1.5 are left, and an answer of 500 tokens takes 50 s."""
    noticed = [at_s for at_s, what in told(5.0, 10.0, ending(10.0, AT_S + 30, after, 1.5, seed)) if "lengths" in what]
    assert noticed
    assert AT_S < noticed[0] <= AT_S + (20 if after == (1.0, 5.0) else 10)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_expected_after_a_shift_to_long_outputs_is_known_before_they_end(seed: int) -> None:
    """Of 1.5 requests/s of 500 tokens, of 50 s each, a third have ended 20 s after the shift. Two that came right
    before it, with ten times as long prompts, may be taken for such."""
    seconds = ending(10.0, AT_S + 22, (0.1, 5.0), 1.5, seed)
    traffic = Traffic(ReplanSettings(goal=Goal(Targets(1000.0, 50.0)), chunk_tokens=(512,)), Constant)
    for now, second in enumerate(seconds, 1):
        if traffic.tell(now, *second) or now % PERIOD_S == 0:
            traffic.planned(now, Expected(REQUESTS, 10.0), anew=False)
    found = traffic.expected(float(AT_S + 21))
    assert found is not None
    assert 20.0 < found.workload.prompt_tokens.mean() < 60.0
    assert 150.0 < found.workload.output_tokens.mean() < 1000.0, (
        "more than the 100 before; longer than 20 s were none yet"
    )


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_an_hour_of_a_steady_rate_is_no_change(interval_s: float) -> None:
    assert told(interval_s, 10.0, coming(lambda _: 10.0, 3600)) == []


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_that_requests_take_long_is_no_change_of_their_lengths(interval_s: float) -> None:
    """Those that came last and have ended are the short ones."""
    assert [at_s for at_s, _ in told(interval_s, 10.0, ending(10.0, 900)) if at_s > AT_S] == []


class Forgetful(HoltWinters):
    def relevel(self, value: float) -> None:
        super().__init__(DAY)


def daily(now: float) -> float:
    """Requests/s: by day four times as many as by night, and from the middle of a day on ten more."""
    more = 10.0 if now >= DAY * PERIOD_S / 2 else 0.0
    return 10 + 6 * math.sin(2 * math.pi * now / (DAY * PERIOD_S)) + more


def lived(make: Callable[[], Forecast], rate: Callable[[float], float], periods: int) -> tuple[Traffic, list[float]]:
    """After two days like the first half of this one; what was expected after each period, until the middle of the
    horizon, less what comes then."""
    goal = Goal(Targets(1000.0, 50.0))
    settings = ReplanSettings(goal=goal, chunk_tokens=(512,), predictive_s=PERIOD_S)
    before = [Period(rate((place % DAY - DAY) * PERIOD_S), 100.0, 10.0) for place in range(2 * DAY)]
    traffic, step, rng, off = Traffic(settings, make, before), PERIOD_S // 3, np.random.default_rng(0), []
    traffic.tell(0, [], 0)
    for now in range(step, periods * PERIOD_S + 1, step):
        came = rng.poisson(rate(now - step / 2) * step)
        changed = traffic.tell(now, [served(0.0, 100, 10, 100.0, 10.0)] * came, 0)
        if changed or now % PERIOD_S == 0:
            expected = traffic.expected(now)
            assert expected is not None
            traffic.planned(now, expected, anew=False)
            off.append(expected.rate - rate(now + settings.horizon_s / 2))
    return traffic, off


def test_a_season_is_foreseen_after_the_rate_has_changed_too() -> None:
    """The day goes on around another level."""
    (_, known), (_, forgotten) = (lived(make, daily, 2 * DAY) for make in (lambda: HoltWinters(DAY), Forgetful))
    of_known, of_forgotten = (np.square(off[DAY // 2 + 2 :]).mean() for off in (known, forgotten))
    assert of_known < 0.7 * of_forgotten


def test_a_season_goes_on_while_nobody_comes() -> None:
    """By night. What follows is the morning, of 20 requests/s."""

    def rate(now: float) -> float:
        return 0.0 if now // PERIOD_S % DAY >= DAY / 2 else 20.0

    traffic, _ = lived(lambda: HoltWinters(DAY), rate, DAY - 1)
    morning = traffic.expected(PERIOD_S * (DAY - 1))
    assert morning is not None
    assert morning.rate == pytest.approx(20.0, rel=0.2)
