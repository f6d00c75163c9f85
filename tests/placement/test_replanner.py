"""Replanning: what it does when traffic changes, and when it leaves a cluster alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from msgspec.structs import replace

from core.errors import ConfigError
from core.served import Served
from core.types import Role
from placement.arrangement import Arrangement
from placement.forecast import HoltWinters, maker
from placement.load import Load, RoleLoad
from placement.predictive import Outlook, better, fewest
from placement.reachable import arrangements
from placement.replanner import Change, Replanner
from placement.traffic import Expected, Period
from placement.workload import Workload
from tests.placement.replanned import Counted, Fed, settings
from tests.placement.served import served

FOUR = Arrangement(prefill=3, decode=1, both=0, chunk_tokens=512)


def fed(start: Arrangement = FOUR, **options: object) -> Fed:
    """Options of Fed, or else of the settings."""
    mine = {name: options.pop(name) for name in [*options] if name in Fed.__dataclass_fields__}
    return Fed(Replanner(settings(**options), Counted(), start), **mine)  # type: ignore[arg-type]


def triples(used: list):
    return zip(used, used[1:], used[2:], strict=False)


class Tallied(Counted):
    simulated = 0

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        self.simulated += 1
        return super().attainment(arrangement, workload, rate)


def expected(rate: float, prompt: float = 100.0, output: float = 10.0) -> Expected:
    lengths = np.full(50, prompt, np.int32), np.full(50, output, np.int32)
    return Expected(Workload(*lengths, np.ones(50)), rate)


def shifting(at: float, low: float, high: float):
    return lambda now: low if now < at else high


def test_workers_go_where_the_work_is_soon_after_it_has_shifted() -> None:
    """10 requests/s of 250 tokens and 8, then of 90 and 28: 2.5 workers for prompts and 0.8, then 0.9 and 2.8."""
    cluster = fed(prompt=shifting(120, 250.0, 90.0), output=shifting(120, 8.0, 28.0))
    assert cluster.run(120) == []
    (at_s, change), *more = cluster.run(120)
    assert (change.to, more) == (Arrangement(1, 3, 0, 512), [])
    assert at_s < 120 + 15
    assert (change.by, change.before, change.after) == (
        "predictive",
        pytest.approx(0.36, abs=0.05),
        pytest.approx(1.0, abs=0.03),
    )
    assert change.gain == pytest.approx(0.64 * 10 * 120, rel=0.15)
    assert change.why.startswith("other lengths come than before; attainment ")


def test_a_rate_that_jumps_is_answered_before_the_next_forecast_is_due() -> None:
    cluster = fed(Arrangement(1, 1, 0, 512), most_workers=8, predictive_s=60.0, rate=shifting(120, 5.0, 25.0))
    assert cluster.run(120) == []
    (at_s, change), *_ = cluster.run(60)
    assert at_s < 120 + 10
    assert change.to.workers > 2
    assert change.why.startswith("the rate is no longer ")


def test_a_shift_of_slow_traffic_is_noticed_too() -> None:
    """A request a second, and looks at the last four seconds."""
    pace = {"reactive_s": 1.0, "recent_s": 4.0, "predictive_s": 6.0, "settle_s": 3.0, "rate": lambda _: 1.0}
    cluster = fed(**pace, prompt=shifting(120, 2500.0, 900.0), output=shifting(120, 80.0, 280.0))
    cluster.run(120)
    before = cluster.replanner.arrangement
    changes = cluster.run(60)
    assert before == FOUR
    assert changes[-1][1].to == Arrangement(1, 3, 0, 512)
    assert changes[0][0] < 165


def test_nothing_is_decided_without_requests_to_tell() -> None:
    assert fed(prompt=lambda _: 900.0, rate=lambda _: 0.05).run(200) == []


def test_what_gains_less_than_the_margin_is_left() -> None:
    """3 workers for prompts of 3.15, or 4: 95 % of the goal are attained, or with the other arrangement 93 %."""
    assert fed(prompt=lambda _: 315.0, margin=0.1).run(300) == []


def test_what_costs_more_than_it_gains_is_left() -> None:
    """3 of 4 workers would change; each has a hundred requests, and in 10 s there are not so many to gain."""
    load = {"prompt": lambda _: 90.0, "output": lambda _: 28.0, "reactive_s": 1e3}
    assert fed(**load).run(60)
    assert fed(**load, horizon_s=10.0, busy=RoleLoad(running=400)).run(60) == []


def test_no_role_gets_fewer_workers_than_the_floor() -> None:
    start = Arrangement(prefill=4, decode=2, both=0, chunk_tokens=512)
    cluster = fed(start, least_workers=2, prompt=lambda _: 10.0, output=lambda _: 55.0)
    ((_, change),) = cluster.run(120)
    assert change.to in (Arrangement(2, 4, 0, 512), Arrangement(0, 0, 6, 512))
    assert all(change.to.of(role) in (0, *range(2, 7)) for role in Role)


def test_workers_are_added_as_far_as_the_goal_needs_and_the_ceiling_allows() -> None:
    """19 requests/s of 100 and 10 need 1.9 of either kind."""
    cluster = fed(Arrangement(1, 1, 0, 512), most_workers=6, rate=lambda _: 19.0)
    cluster.run(120)
    assert cluster.replanner.arrangement.workers == 4
    capped = fed(Arrangement(1, 1, 0, 512), most_workers=3, rate=lambda _: 40.0)
    capped.run(120)
    assert capped.replanner.arrangement.workers == 3


def test_the_number_of_workers_stays_without_a_ceiling() -> None:
    for rate in (1.0, 100.0):
        cluster = fed(rate=lambda _, rate=rate: rate)
        cluster.run(300)
        assert cluster.replanner.arrangement.workers == 4


def test_new_workers_have_to_pay_for_their_start() -> None:
    cluster = fed(Arrangement(1, 1, 0, 512), most_workers=6, rate=lambda _: 20.0, startup_s=120.0, horizon_s=100.0)
    assert cluster.run(120) == []


def test_a_worker_is_given_up_only_if_the_rest_stands_more_than_comes() -> None:
    """4 requests/s need 0.4 workers of either kind, 14 need 1.4: with spare 1.68."""
    idle = fed(Arrangement(2, 2, 0, 512), most_workers=4, rate=lambda _: 4.0)
    assert [change.to.workers for _, change in idle.run(300)] == [3, 2, 1]
    needed = fed(Arrangement(2, 2, 0, 512), most_workers=4, rate=lambda _: 14.0, spare=1.3)
    needed.run(300)
    assert needed.replanner.arrangement.workers == 4


def test_workers_are_given_up_when_traffic_ends() -> None:
    cluster = fed(Arrangement(2, 2, 0, 512), most_workers=4, rate=lambda now: 15.0 if now < 120 else 0.0)
    assert cluster.run(120) == []
    assert [change.to.workers for _, change in cluster.run(300)] == [3, 2, 1]


@pytest.mark.parametrize("quiet", [0.0, 0.02])
def test_workers_are_given_up_though_it_has_long_been_too_quiet_to_tell_what_comes(quiet: float) -> None:
    """There are fewer requests in a window than tell of lengths by the time that the horizon allows another change."""
    few = fed(Arrangement(0, 0, 4, 512), most_workers=4, rate=shifting(240.0, 20.0, quiet), window_s=60.0)
    few.run(3600.0)
    assert few.replanner.arrangement.workers == 1


def test_between_two_changes_there_is_time_to_settle() -> None:
    lengths = {
        "prompt": lambda now: 250.0 if now // 60 % 2 else 60.0,
        "output": lambda now: 8.0 if now // 60 % 2 else 30.0,
    }
    changes = fed(**lengths, settle_s=40.0).run(1200)
    assert len(changes) >= 10
    assert all(later - earlier >= 40.0 for (earlier, _), (later, _) in pairwise(changes))


def test_load_that_wavers_on_the_boundary_between_two_arrangements_flaps_nothing() -> None:
    """2 + 2 workers and 3 + 1 are as good at 10 requests/s of 200 and 13; every half minute it is one or the other."""

    def wavering(low: float, high: float):
        return lambda now: low if now // 30 % 2 else high

    cluster = fed(Arrangement(2, 2, 0, 512), prompt=wavering(195.0, 215.0), output=wavering(12.0, 14.0))
    assert len(cluster.run(1800)) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_what_was_just_left_is_not_gone_back_to_on_noise(seed: int) -> None:
    """A request a second, of lengths that vary as much as their mean, for which 2 + 2 workers are as good as 3 + 1; and
    the last minute is looked at every six seconds. Chance says now this, now that."""
    rng = np.random.default_rng(seed)
    pace = {"reactive_s": 1.0, "recent_s": 4.0, "predictive_s": 6.0, "settle_s": 3.0, "window_s": 60.0}
    cluster = fed(
        Arrangement(2, 2, 0, 512),
        **pace,
        rate=lambda _: 1.0,
        prompt=lambda _: 1 + 1970 * rng.exponential(),
        output=lambda _: 1 + 130 * rng.exponential(),
        rng=np.random.default_rng(seed),
    )
    used = [(0.0, Arrangement(2, 2, 0, 512), ""), *((at_s, one.to, one.why) for at_s, one in cluster.run(600))]
    back = [(after[0] - left, after[2]) for (_, was, _), (left, _, _), after in triples(used) if after[1] == was]
    assert back
    assert all(away >= 120.0 or "than before" in why for away, why in back)


def test_a_worker_is_given_up_again_though_the_horizon_is_long() -> None:
    """18 requests/s need 1.8 workers of either kind, and then 7, so slowly that no change is told."""
    start = Arrangement(0, 0, 2, 512)
    pace = {"reactive_s": 1.0, "recent_s": 4.0, "predictive_s": 6.0, "settle_s": 3.0, "window_s": 60.0}
    cluster = fed(start, most_workers=4, horizon_s=3600.0, rate=lambda now: max(7.0, 18.0 - now / 40), **pace)
    assert [change.to.workers for _, change in cluster.run(60)][-1] > 2
    cluster.run(400)
    assert start in [change.to for _, change in cluster.changes]


@pytest.mark.parametrize(("like", "away_s"), [(served(), 120.0), (served(ttft_ms=5000.0), 30.0)])
def test_what_was_left_is_gone_back_to_after_the_horizon_or_once_requests_do_worse_than_was_foretold(
    like: Served, away_s: float
) -> None:
    """Of both arrangements half of the requests were foretold to miss a target, and of the other one in ten."""

    class Fickle(Counted):
        likes = Arrangement(1, 3, 0, 512)

        def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
            return 0.9 if arrangement == self.likes else 0.5

    start = Arrangement(2, 2, 0, 512)
    predictor = Fickle()
    cluster = Fed(Replanner(settings(reactive_s=1e3), predictor, start))
    ((left_s, change),) = cluster.run(31)
    assert change.to == predictor.likes
    predictor.likes, cluster.like = start, like
    (back_s, change), *_ = cluster.run(200)
    assert change.to == start
    assert away_s <= back_s - left_s <= away_s + 30.0


def test_of_many_arrangements_few_are_simulated_and_the_best_of_all_is_found() -> None:
    """64 workers, and 128 at the most. 400 requests/s of 100 tokens and 10 need 40 of either kind."""
    all_of_it = settings(most_workers=128, chunk_tokens=(256, 512), startup_s=0.0)
    outlook = Outlook(all_of_it, counting := Tallied(), expected(rate=400.0))
    change = better(outlook, Arrangement(10, 54, 0, 512), Load(roles={}, in_flight=0))
    assert change is not None
    assert change.after >= 0.9
    assert change.to.workers == 72
    assert counting.simulated < 400
    for workers, prompt in ((8, 4.0), (16, 1.5), (64, 0.5), (64, 30.0)):
        few = Outlook(settings(), counting, expected(rate=workers * 50.0 / prompt, prompt=10 * prompt))
        alike = [*arrangements(workers, 1, (512,))]
        found = few.merits(workers, few.attainment)
        assert max(found.values()) == max(map(few.attainment, alike))
        assert len(found) <= 23


@pytest.mark.parametrize("most", [1, 2, 5, 64])
def test_the_fewest_workers_that_do_are_found_without_asking_of_all(most: int) -> None:
    for enough in range(1, most + 2):
        asked: list[int] = []
        assert fewest(1, most, lambda count, enough=enough, asked=asked: asked.append(count) or count >= enough) == min(
            most, enough
        )
        assert len(asked) == len(set(asked)) <= 2 * most.bit_length() + 1


def test_noise_changes_nothing() -> None:
    assert (
        fed(Arrangement(2, 2, 0, 512), rate=lambda _: 9.0, prompt=lambda _: 180.0, output=lambda _: 18.0).run(1800)
        == []
    )


def test_while_workers_are_missing_nothing_is_decided_and_then_they_are_given_up_on() -> None:
    cluster = fed(prompt=lambda _: 90.0, output=lambda _: 28.0, startup_s=60.0)
    for second in range(1, 90):
        cluster.replanner.record([served(prompt=90, output=28)] * 10)
        change = cluster.replanner.decide(float(second), cluster.load(prefill=2, decode=1))
        if change is not None:
            break
    assert second == 62
    assert change is not None
    assert change.to.workers == 3


def test_without_any_worker_nothing_is_decided() -> None:
    cluster = fed(startup_s=1.0)
    for second in range(100):
        cluster.replanner.record([served(prompt=900)] * 10)
        assert cluster.replanner.decide(float(second), Load(roles={}, in_flight=0)) is None


def test_advice_that_nobody_takes_is_repeated_once_it_would_have_settled() -> None:
    cluster = fed(prompt=lambda _: 90.0, output=lambda _: 28.0, advisory=True, settle_s=20.0)
    changes = cluster.run(200)
    assert {change.to for _, change in changes} == {Arrangement(1, 3, 0, 512)}
    assert all(later - earlier >= 20.0 for (earlier, _), (later, _) in pairwise(changes))
    assert cluster.replanner.arrangement == FOUR


def test_an_arrangement_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 prefill, steps of 512 tokens: nobody decodes"):
        Replanner(settings(), Counted(), Arrangement(2, 0, 0, 512))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, 0.0)
            for name in ("reactive_s", "recent_s", "predictive_s", "window_s", "horizon_s", "spare", "margin")
        ),
        *(("horizon_s", float("inf")), ("settle_s", -1.0), ("startup_s", -1.0), ("margin", 1.0), ("most_workers", -1)),
        *(("least_workers", 0), ("chunk_tokens", ()), ("chunk_tokens", (512, 256))),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"replan: {field} is "):
        settings(**{field: value})


# --- the fast loop ---------------------------------------------------------------------------------------------------


def step(
    start: Arrangement, busy: dict[Role, RoleLoad], like=None, looks: int = 2, predictor=None, **options: object
) -> Change | None:
    """What the fast loop does by itself after some looks; the slow one is not asked."""
    told = settings(predictive_s=1e6, chunk_tokens=(256, 512, 1024), **options)
    replanner = Replanner(told, predictor or Counted(), start)
    replanner.decide(0.0, Load(roles={}, in_flight=0))
    roles = {role: replace(busy.get(role, RoleLoad()), workers=start.of(role)) for role in Role}
    replanner._predictive_s = 1e6
    changes = []
    for look in range(1, looks + 1):
        replanner.record([like or served()] * 30)
        changes.append(replanner.decide(5.0 * look, Load(roles=roles, in_flight=0)))
    assert not any(changes[:-1])
    return changes[-1]


WAITING = {Role.PREFILL: RoleLoad(waiting_prompt_tokens=9000, waiting_requests=9), Role.DECODE: RoleLoad(running=4)}
CROWDED = {Role.DECODE: RoleLoad(running=16)}
TWO = Arrangement(2, 2, 0, 512)


def test_prompts_that_wait_get_a_worker_from_those_that_have_room() -> None:
    change = step(TWO, WAITING)
    assert change is not None
    assert (change.to, change.by) == (Arrangement(3, 1, 0, 512), "reactive")
    assert change.why.startswith("prompts wait 4500 ms for 9000 tokens before them; with one worker fewer a token")


def test_sequences_that_crowd_get_a_worker_from_prompts() -> None:
    change = step(TWO, CROWDED)
    assert change is not None
    assert change.to == Arrangement(1, 3, 0, 512)
    assert change.why.startswith("a token takes 80 ms with 16 sequences; with one worker fewer prompts wait 0 ms")


@pytest.mark.parametrize(
    ("like", "to"),
    [(served(ttft_ms=5000.0), Arrangement(3, 1, 0, 512)), (served(tpot_ms=500.0), Arrangement(1, 3, 0, 512))],
)
def test_what_was_missed_counts_whatever_the_queues_say(like, to: Arrangement) -> None:
    change = step(TWO, {}, like)
    assert change is not None
    assert change.to == to
    assert "30 of the last" in change.why or "60 of the last 60 requests got" in change.why


@pytest.mark.parametrize(
    ("start", "busy", "like"),
    [
        (TWO, {}, None),
        (TWO, WAITING | CROWDED, None),
        (TWO, {}, served(ttft_ms=5000.0, tpot_ms=500.0)),
        (TWO, {Role.PREFILL: WAITING[Role.PREFILL], Role.DECODE: RoleLoad(running=8)}, None),
        (TWO, CROWDED | {Role.PREFILL: RoleLoad(waiting_prompt_tokens=1500)}, None),
        (Arrangement(3, 1, 0, 512), WAITING, None),
        (Arrangement(0, 0, 2, 1024), {}, served(ttft_ms=5000.0)),
        (Arrangement(0, 0, 2, 256), {}, served(tpot_ms=500.0)),
    ],
    ids=[
        "no need",
        "both need",
        "both missed",
        "no room to decode",
        "no room for prompts",
        "floor",
        "longest",
        "least",
    ],
)
def test_nothing_is_moved(start: Arrangement, busy: dict[Role, RoleLoad], like) -> None:
    assert step(start, busy, like) is None


class Pooled(Counted):
    """Workers that do both put their time where it is needed."""

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        if not arrangement.both:
            return super().attainment(arrangement, workload, rate)
        seconds = workload.prompt_tokens.mean() / 1000 + workload.output_tokens.mean() / 100
        return float(min(1.0, arrangement.both / (rate * seconds)))


SPLIT = Arrangement(1, 1, 0, 512)


@pytest.mark.parametrize(
    ("busy", "like", "why"),
    [
        (
            CROWDED,
            served(output=28),
            "a token takes 160 ms with 16 sequences; of those that prefill none can be spared",
        ),
        (
            {Role.PREFILL: WAITING[Role.PREFILL]},
            served(prompt=280, output=1),
            "prompts wait 9000 ms for 9000 tokens before them; of those that decode none can be spared",
        ),
    ],
    ids=["sequences crowd", "prompts wait"],
)
def test_where_none_can_be_spared_all_come_to_do_both(busy: dict[Role, RoleLoad], like, why: str) -> None:
    change = step(SPLIT, busy, like, predictor=Pooled())
    assert change is not None
    assert (change.to, change.by) == (Arrangement(0, 0, 2, 512), "reactive")
    assert change.why.startswith(why)


def test_what_is_gained_by_doing_both_has_to_be_foretold() -> None:
    """The same load, to workers of which one that does both is half of either."""
    assert step(SPLIT, CROWDED, served(output=28)) is None


def test_one_look_is_not_enough() -> None:
    assert step(TWO, WAITING, looks=1) is None


def test_the_simulator_may_object() -> None:
    """60 requests in 10 s, of 100 and 35 tokens: they need 2.1 workers that decode."""
    assert step(TWO, WAITING, served(output=35)) is None


@pytest.mark.parametrize(("like", "chunk"), [(served(ttft_ms=5000.0), 1024), (served(tpot_ms=500.0), 256)])
def test_where_all_do_both_steps_change_in_length(like, chunk: int) -> None:
    change = step(Arrangement(0, 0, 2, 512), {}, like)
    assert change is not None
    assert change.to == Arrangement(0, 0, 2, chunk)


def test_what_came_before_a_change_is_not_held_against_it() -> None:
    replanner = Replanner(settings(predictive_s=1e6), Counted(), TWO)
    cluster = Fed(replanner, like=served(ttft_ms=30_000.0), rate=lambda _: 2.0)
    replanner._predictive_s = 1e6
    changes = cluster.run(60)
    assert len(changes) == 1


# --- forecasts -------------------------------------------------------------------------------------------------------


def test_a_rise_is_met_before_it_has_come() -> None:
    """The rate rises by 1/s every 30 s; with a trend the workers for it are asked for sooner."""

    def first_change(forecast) -> float:
        replanner = Replanner(settings(most_workers=9, horizon_s=240.0), Counted(), TWO, forecast)
        changes = Fed(replanner, rate=lambda now: 5.0 + now / 30).run(900)
        return next(at_s for at_s, change in changes if change.to.workers > 4)

    assert first_change(lambda: HoltWinters(damping=1.0)) < first_change(maker("constant")) - 20


def test_a_forecast_begins_with_what_came_earlier() -> None:
    """Last time it was ten times as much from here on."""
    before = [Period(5.0, 100.0, 10.0)] * 8 + [Period(50.0, 100.0, 10.0)] * 8
    for known in ([], before * 2):
        forecast = maker("holt-winters", season=16)
        replanner = Replanner(settings(most_workers=12), Counted(), Arrangement(1, 1, 0, 512), forecast, known)
        changes = Fed(replanner, rate=lambda _: 5.0).run(230)
        assert bool([change for _, change in changes if change.to.workers > 2]) is bool(known)
