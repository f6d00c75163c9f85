"""Replanning TP and PP: another shape is chosen if it gains more over the horizon than it costs to get there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from core.served import Served
from core.types import Role
from placement.arrangement import Arrangement
from placement.live_log import Met
from placement.load import Load, RoleLoad
from placement.outcome import Outcome
from placement.predictive import Outlook, better
from placement.reachable import arrangements
from placement.reactive import Look
from placement.replanner import Replanner, ReplanSettings
from placement.seen import Seen
from placement.startups import Startups
from placement.traffic import Expected
from placement.worker_shape import WorkerShape
from placement.workload import Workload
from tests.placement.pipelines import workload
from tests.placement.replanned import Fed, settings
from tests.placement.served import served

ONE, TWO, STAGES = WorkerShape(1, 1), WorkerShape(2, 1), WorkerShape(1, 2)
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def both(workers: int, shape: WorkerShape) -> Arrangement:
    return Arrangement(0, 0, workers, 512, shape, shape)


FOUR, PAIR = both(4, ONE), both(2, TWO)


class Powers:
    """A worker of each shape serves so many requests/s within the targets."""

    def __init__(self, **powers: float) -> None:
        self.powers = {ONE: powers["one"], TWO: powers["two"]}

    def why_not(self, arrangement: Arrangement) -> str | None:
        return None

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        able = sum(self.powers[shape] * count for shape, count in arrangement.counts.items() if shape is not None)
        return min(1.0, able / rate)

    def outcome(self, arrangement: Arrangement, workload: Workload, rate: float) -> Outcome | None:
        return None

    def as_seen(self, seen: Seen) -> Powers:
        return self

    def prompt_ms(self, tokens: float, used: Arrangement) -> float:
        return tokens

    def token_ms(self, load: RoleLoad, workers: int, used: Arrangement) -> float:
        return 10.0


def outlook(rate: float, powers: Powers, startup_s: float = 10.0, **changes: Any) -> Outlook:
    given = settings(**{"shapes": (ONE, TWO), "devices": 4, "horizon_s": 100.0, "ending_s": 0.0} | changes)
    some = workload([100] * 100, [10] * 100, [1 / rate] * 100)
    return Outlook(given, powers, Expected(some, rate), startup_s=startup_s)


IDLE = Load(roles={}, in_flight=0)
TWICE = Powers(one=1.0, two=4.0)
"""Two devices together do twice what they do apart: all four serve 4 requests/s, or 8."""


def test_workers_of_another_shape_take_all_devices_and_roles_may_have_unlike_ones() -> None:
    found = set(arrangements(5, 1, (512,), (ONE, TWO)))
    assert {
        both(5, ONE),
        both(2, TWO),
        Arrangement(1, 2, 0, 512, ONE, TWO),
        Arrangement(1, 3, 0, 512, TWO, ONE),
    } < found
    assert all(4 <= to.devices <= 5 for to in found)
    assert Arrangement(2, 1, 0, 512, ONE, TWO) not in found, "a third would have room"
    assert set(arrangements(4, 1, (512,))) == {Arrangement(0, 0, 4, 512)} | {
        Arrangement(n, 4 - n, 0, 512) for n in (1, 2, 3)
    }


def test_an_arrangement_says_its_shapes() -> None:
    apart = Arrangement(1, 1, 0, 512, TWO, ONE)
    assert (str(apart), apart.devices) == ("1 prefill (2x1) + 1 decode (1x1), steps of 512 tokens", 3)
    assert apart.counts == {TWO: 1, ONE: 1}
    assert (str(PAIR), PAIR.devices) == ("2 of both roles (2x1), steps of 512 tokens", 4)
    assert str(Arrangement(1, 1, 0, 512)) == "1 prefill + 1 decode, steps of 512 tokens"


def test_the_change_to_another_shape_is_chosen_when_it_gains_more_than_it_costs() -> None:
    """From half attained to all at 8/s: 400 requests in 100 s. On the way, twice 10 s long, half of the devices serve
    2/s less, and 4/s more do not come yet."""
    change = better(outlook(8.0, TWICE), FOUR, IDLE)
    assert change is not None
    assert (change.to, change.gain) == (PAIR, pytest.approx(400.0))
    assert change.cost == pytest.approx(20 * 4 + 20 * 2)
    assert "50% -> 100%" in change.why
    assert "25% for 20 s while workers of other shapes start, less 120 for the change" in change.why


@pytest.mark.parametrize(
    "asked",
    [
        {"startup_s": 60.0},
        {"horizon_s": 15.0},
        {"ending_s": 60.0, "predictor": True},
    ],
    ids=["workers start slowly", "a short horizon", "answers are long"],
)
def test_the_same_change_is_not_worth_it_when(asked: dict[str, Any]) -> None:
    powers = TWICE
    if asked.pop("predictor", False):
        powers = Powers(one=1.0, two=4.0)
        powers.token_ms = lambda *_: 6000.0  # type: ignore[method-assign]  # ten tokens in 60 s
    assert better(outlook(8.0, powers, **asked), FOUR, IDLE) is None


def test_where_the_whole_costs_too_much_a_part_may_be_worth_it() -> None:
    """A single start: 40 s without 2/s, and as long without 2/s more, against 200 requests."""
    change = better(outlook(8.0, TWICE, startup_s=40.0), FOUR, IDLE)
    assert change is not None
    assert change.to.counts == {ONE: 2, TWO: 1}
    assert (change.gain, change.cost) == (pytest.approx(200.0), pytest.approx(160.0))


def test_a_shape_is_left_as_it_is_while_it_does() -> None:
    assert better(outlook(4.0, TWICE), FOUR, IDLE) is None
    assert better(outlook(8.0, Powers(one=1.0, two=2.0)), FOUR, IDLE) is None


def test_where_somebody_would_not_always_serve_shapes_stay() -> None:
    assert better(outlook(8.0, TWICE, devices=2), both(2, ONE), IDLE) is None
    assert better(outlook(8.0, TWICE, devices=3), both(2, ONE), IDLE) is not None, "there is a device to go by"


def test_with_more_workers_allowed_shapes_are_changed_too_and_devices_given_up() -> None:
    grown = better(outlook(8.0, TWICE, devices=8, most_workers=8), both(2, ONE), IDLE)
    assert grown is not None
    assert grown.to == PAIR


def fed(**changes: Any) -> Fed:
    given = settings(**{"shapes": (ONE, TWO), "devices": 4, "startup_s": 20.0, "ending_s": 5.0} | changes)
    return Fed(Replanner(given, TWICE, FOUR), rate=lambda _: 8.0)


def of_shapes(**roles: dict[WorkerShape, int]) -> Load:
    there = {Role(name): RoleLoad(workers=sum(of.values()), shapes=of) for name, of in roles.items()}
    return Load(roles=there, in_flight=0)


def following(cluster: Fed) -> Fed:
    """Whose workers are as arranged."""

    def load(**_: int) -> Load:
        now = cluster.replanner.arrangement
        return of_shapes(**{r.value: {now.shape(r): now.of(r)} for r in Role if now.of(r)})  # type: ignore[dict-item]

    cluster.load = load  # type: ignore[method-assign]
    return cluster


def proposed(cluster: Fed) -> Arrangement | None:
    changes = following(cluster).run(90)
    return changes[0][1].to if changes else None


def test_traffic_that_another_shape_serves_better_changes_the_shape_and_once() -> None:
    cluster = fed()
    assert proposed(cluster) == PAIR
    assert cluster.run(200) == []


class Fickle(Powers):
    """Finds another shape the best every ten seconds."""

    def __init__(self) -> None:
        super().__init__(one=1.0, two=1.0)
        self.best = ONE

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        return 0.97 if arrangement.counts.keys() == {self.best} else 0.6


def reshaped(like: Served, horizon_s: float, interval_s: float = 0.5) -> list[float]:
    """When shapes are changed in two minutes by one who looks every half second."""
    pace = ReplanSettings.paced(
        interval_s,
        goal=settings().goal,
        chunk_tokens=(512,),
        horizon_s=horizon_s,
        least_workers=1,
        most_workers=0,
        shapes=(ONE, TWO, STAGES),
        devices=4,
        ending_s=0.0,
    )
    predictor = Fickle()
    replanner = Replanner(pace, predictor, FOUR)
    replanner.started(0.5)
    cluster = following(Fed(replanner, rate=lambda _: 8.0, like=like))
    for second in range(0, 120, 10):
        predictor.best = (ONE, TWO, STAGES)[second // 10 % 3]
        cluster.run(10, step=0.5)
    return [at_s for at_s, _ in cluster.changes]


def test_a_change_of_shape_is_followed_by_another_only_once_it_has_paid_or_targets_are_missed() -> None:
    """However short the times between looks are."""
    calm = reshaped(served(), horizon_s=50.0)
    assert 2 <= len(calm) <= 3
    assert all(later - earlier >= 50.0 for earlier, later in pairwise(calm))
    assert len(reshaped(served(ttft_ms=5000.0), horizon_s=50.0)) > 6


def test_roles_change_while_shapes_stay() -> None:
    stay = Outlook(settings(shapes=(ONE, TWO), devices=4), TWICE, outlook(8.0, TWICE).expected, shapes_stay=True)
    assert better(stay, FOUR, IDLE) is None
    apart = Arrangement(2, 2, 0, 512, ONE, ONE)
    assert stay.way(FOUR, apart) is not None
    assert stay.way(both(3, ONE), FOUR) is not None, "one more displaces nobody"
    assert not apart.reshaped_in(FOUR)
    assert FOUR.reshaped_in(PAIR)
    assert FOUR.reshaped_in(Arrangement(2, 1, 0, 512, ONE, TWO))


def test_starts_that_were_seen_decide_instead_of_those_foretold() -> None:
    slow = fed()
    slow.replanner.started(100.0)
    assert proposed(slow) is None
    fast = fed(startup_s=100.0)
    fast.replanner.started(2.0)
    assert proposed(fast) == PAIR
    assert proposed(fed(startup_s=100.0)) is None


def test_the_slowest_of_the_last_starts_is_reckoned_with() -> None:
    startups = Startups()
    assert startups.longest_s == 0.0
    for seconds in (50.0, 3.0, 2.0, 4.0):
        startups.tell(seconds)
    assert startups.longest_s == 50.0
    startups.tell(2.0)
    startups.tell(2.0)
    assert startups.longest_s == 4.0


def test_nothing_is_decided_while_shapes_change_and_what_is_there_in_the_end_is_planned_with() -> None:
    cluster = fed()
    assert proposed(cluster) == PAIR
    now, replanner = cluster.now, cluster.replanner
    halfway = of_shapes(both={ONE: 2})
    one_up = of_shapes(both={ONE: 2, TWO: 1})
    for at_s, there in ((20, halfway), (40, halfway), (60, one_up), (80, one_up)):
        assert replanner.decide(now + at_s, there) is None
    assert replanner.arrangement == PAIR, "one has come after 20 s, and 25 s are given to each"
    replanner.decide(now + 90, one_up)
    assert replanner.arrangement == both(2, ONE)


def test_shapes_that_stand_in_for_others_are_not_taken_for_the_plan() -> None:
    cluster = fed()
    replanner = cluster.replanner
    planned = Arrangement(1, 1, 0, 512, ONE, TWO)
    replanner.adopt(planned, 0.0)
    for at_s in (20.0, 100.0):
        replanner.decide(at_s, of_shapes(prefill={ONE: 1}, decode={ONE: 2}))
    assert replanner.arrangement == Arrangement(1, 2, 0, 512, ONE, ONE)


@pytest.mark.parametrize(
    ("shape", "to"), [(ONE, Arrangement(0, 0, 2, 512, ONE, ONE)), (TWO, None)], ids=["alike", "of unlike shapes"]
)
def test_the_fast_loop_changes_no_shape(shape: WorkerShape, to: Arrangement | None) -> None:
    """First tokens are late, and the only decode worker can't be spared."""
    late = Met(judged=20, missed=20, late=20, slow=0)
    now = Arrangement(1, 1, 0, 512, ONE, shape)
    step = Look(settings(shapes=(ONE, TWO), devices=4), TWICE, now, IDLE, late).step()
    assert (step[0] if step else None) == to
