"""Goodput of a layout: the rate is found, runs that have not settled don't count, and bounds hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement import native
from placement.bounds import Demand, most_rate
from placement.goodput import Goal, attains, goodput, goodput_near, interval, next_rate
from placement.latency import Coefficients, Speculation
from placement.layout import Layout, Link, Role
from placement.native import Limits, Window, serve, serve_unless_missed
from placement.outcome import Outcome, Targets
from placement.pools import most_each
from placement.serving import serve_plainly
from placement.slo import parse_slo
from placement.workload import Workload
from tests.placement.layouts import STEP, apart, group
from tests.placement.pipelines import azure_like

GOAL = Goal(Targets(500.0, 60.0), 0.9)
BOTH = group(Role.BOTH, latency=STEP, kv_tokens=60_000)
REQUESTS = azure_like(2000)


def test_goodput_is_where_attainment_ends() -> None:
    layout = Layout((BOTH,))
    found = goodput(layout, REQUESTS, GOAL, ceiling=20.0)
    assert 1.0 < found < 20.0
    assert attains(layout, REQUESTS, found, GOAL)
    assert not attains(layout, REQUESTS, next_rate(found), GOAL)


def test_goodput_does_not_depend_on_where_it_is_looked_for() -> None:
    layout = Layout((BOTH,))
    found = goodput(layout, REQUESTS, GOAL, ceiling=20.0)
    assert found == goodput(layout, REQUESTS, GOAL, ceiling=11.0)
    assert found == goodput(layout, REQUESTS, GOAL, ceiling=20.0, floor=next_rate(found / 2))


def test_goodput_is_nothing_where_targets_cannot_be_met() -> None:
    assert goodput(Layout((BOTH,)), REQUESTS, Goal(Targets(1.0, 60.0)), ceiling=20.0) == 0.0


def test_a_rate_above_the_ceiling_is_not_tried() -> None:
    assert goodput(Layout((BOTH,)), REQUESTS, GOAL, ceiling=0.5) == pytest.approx(0.5, rel=0.01)


def test_a_run_whose_queues_still_grow_does_not_count() -> None:
    """The targets are met by 90 % of all, because those who came late are few; a longer run would fail."""
    ramp = REQUESTS.with_gaps(np.where(np.arange(2000) < 1850, 1.0, 1e-3))
    met = serve(Layout((BOTH,)), ramp, 2.0).outcome.attained(GOAL.targets)
    assert met[200:].mean() > 0.9 > met[1000:].mean()
    assert not attains(Layout((BOTH,)), ramp, 2.0, GOAL)


def test_the_interval_is_over_other_draws_of_the_same_requests() -> None:
    layout = Layout((BOTH,))
    spread = interval(layout, REQUESTS, GOAL, near=5.0)
    assert spread.low < spread.mean < spread.high < 1.5 * spread.mean
    assert spread == interval(layout, REQUESTS, GOAL, near=5.0)


def test_resampled_requests_keep_the_mean_gap_and_their_neighbours() -> None:
    drawn = REQUESTS.resampled(1000, np.random.default_rng(1))
    assert len(drawn) == 1000
    assert drawn.gaps.mean() == pytest.approx(REQUESTS.gaps.mean())
    start = int(np.flatnonzero(REQUESTS.prompt_tokens == drawn.prompt_tokens[0])[0])
    assert drawn.output_tokens[:3].tolist() in (
        REQUESTS.output_tokens[np.arange(first, first + 3) % 2000].tolist() for first in range(start, 2000)
    )


def limits_of(targets: Targets, *windows: tuple[int, int]) -> Limits:
    return Limits(targets, tuple(Window(targets.metrics, *window) for window in windows))


@pytest.mark.parametrize("late", [(200, 100), (200, 3), (0, 25)])
@pytest.mark.parametrize("allowed", [0, 20, 150, 200])
def test_a_run_that_misses_too_much_is_given_up_with_the_same_verdict(allowed: int, late: tuple[int, int]) -> None:
    layout = Layout((BOTH,), overhead_ms=100.0)
    for rate in (2.0, 6.0, 12.0):
        limits = limits_of(GOAL.targets, (100, allowed), late)
        kept = limits.kept(serve_plainly(layout, azure_like(300), rate).outcome)
        assert (serve_unless_missed(layout, azure_like(300), rate, limits) is not None) == kept


@pytest.mark.parametrize("alone", [("ttft",), ("tpot",), ("e2e",), ("ttft", "e2e")])
@pytest.mark.parametrize("allowed", [0, 3, 30, 150])
def test_so_it_is_with_all_of_a_request_and_with_targets_of_their_own(alone: tuple[str, ...], allowed: int) -> None:
    """Three windows, of which each counts a request once whatever targets it misses."""
    layout = Layout((BOTH,), overhead_ms=100.0)
    targets = Targets(1000.0, 60.0, 12_000.0)
    verdicts = set()
    for rate in (0.01, 2.0, 4.0, 12.0):
        served = serve_plainly(layout, azure_like(300), rate).outcome
        for rest in (150, 300):
            windows = Window(alone, 30, allowed), Window(alone, 150, 75), Window(targets.metrics, 0, rest)
            limits = Limits(targets, windows)
            verdicts.add(limits.kept(served))
            assert (serve_unless_missed(layout, azure_like(300), rate, limits) is not None) == limits.kept(served)
    assert len(verdicts) == 2


def test_a_target_with_a_share_of_its_own_counts_by_itself() -> None:
    """The last 100 of 200 requests, of which the first 30 are late, the next 12 slow, and the last 4 long."""
    numbers = np.arange(200) - 100
    late, slow = (numbers >= 0) & (numbers < 30), (numbers >= 30) & (numbers < 42)
    outcome = Outcome(np.where(late, 900.0, 100.0), np.where(slow, 90.0, 9.0), np.where(numbers >= 96, 9e3, 1e3))
    for targets, met in (
        (Targets(500.0, 50.0), False),
        (Targets(500.0, 50.0, shares=(("ttft", 0.7),)), False),
        (Targets(500.0, 50.0, shares=(("ttft", 0.7), ("tpot", 0.85))), True),
        (Targets(500.0, 50.0, shares=(("ttft", 0.75), ("tpot", 0.85))), False),
        (Targets(500.0, 50.0, 5e3, shares=(("ttft", 0.7), ("tpot", 0.85))), True),
        (Targets(500.0, 50.0, 5e3, shares=(("ttft", 0.7), ("tpot", 0.85), ("e2e", 0.97))), False),
        (Targets(500.0, 50.0, 5e3, shares=(("ttft", 0.7),)), False),
    ):
        goal = Goal(targets, 0.9)
        limits = Limits(targets, tuple(Window(of, 100, round((1 - part) * 100)) for of, part in goal.demands.items()))
        assert limits.kept(outcome) == met, goal.told()


def test_stricter_shares_cost_goodput_and_laxer_ones_bring_it() -> None:
    found = {
        text: goodput(Layout((BOTH,)), REQUESTS, Goal(parse_slo(text)), ceiling=20.0)
        for text in (
            "ttft=500,tpot=60",
            "ttft=500@p99,tpot=60",
            "ttft=500@p70,tpot=60@p70",
            "ttft=500,tpot=60,e2e=3000",
        )
    }
    alike, strict, lax, short = found.values()
    assert 0 < strict < alike < lax
    assert short < alike


def test_without_a_compiler_the_verdict_is_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    limits = limits_of(GOAL.targets, (0, 0), (0, 60))
    assert serve_unless_missed(Layout((BOTH,)), azure_like(60), 30.0, limits) is None
    assert serve_unless_missed(Layout((BOTH,)), azure_like(60), 0.1, limits) is not None


CHEAP = replace(
    BOTH,
    latency=replace(STEP, large_prompt=Coefficients(20.0, 0.03, 0.0), large_tokens=300, shared_ms=26.0),
)
LAYOUTS = {
    "colocated": ([BOTH], Layout((BOTH,))),
    "two stages": ([replace(BOTH, stages=2)], Layout((replace(BOTH, stages=2),))),
    "speculating": (
        [replace(BOTH, speculation=Speculation(2.2, 4, 1.0))],
        Layout((replace(BOTH, speculation=Speculation(2.2, 4, 1.0)),)),
    ),
    "apart": (
        [replace(BOTH, role=Role.PREFILL), replace(BOTH, role=Role.DECODE)],
        apart(groups=(replace(BOTH, role=Role.PREFILL), replace(BOTH, role=Role.DECODE)), link=Link(0.01)),
    ),
    "cheap in large steps": ([CHEAP], Layout((CHEAP,))),
    "cheap and apart": (
        [replace(CHEAP, role=Role.PREFILL), replace(CHEAP, role=Role.DECODE)],
        apart(groups=(replace(CHEAP, role=Role.PREFILL), replace(CHEAP, role=Role.DECODE)), link=Link(0.01)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("targets", [Targets(300.0, 30.0), Targets(1000.0, 100.0), Targets(5000.0, 20.0)])
def test_no_layout_does_better_than_its_bounds(name: str, targets: Targets) -> None:
    groups, layout = LAYOUTS[name]
    goal = Goal(targets, 0.9)
    found = goodput(layout, REQUESTS, goal, ceiling=50.0)
    closed = min(most_rate(group, Demand.of(REQUESTS, 0), goal) for group in groups)
    simulated = min(most_each(group, 1, REQUESTS, 0, goal) for group in groups)
    assert found <= simulated <= closed


def test_prompts_that_are_not_handed_over_cost_prefill_groups_nothing() -> None:
    some, none = Demand.of(REQUESTS, 0), Demand.of(REQUESTS, 10_000)
    assert some.handed_tokens == pytest.approx(some.prompt_tokens, rel=0.02)
    assert (none.handed_tokens, none.kv_tokens) == (0.0, 0.0)
    assert most_rate(replace(BOTH, role=Role.PREFILL), none, GOAL) == float("inf")


@pytest.mark.parametrize("role", [Role.BOTH, Role.DECODE])
def test_answers_of_one_token_wait_for_no_decode_however_long_one_takes(role: Role) -> None:
    short = replace(REQUESTS, output_tokens=np.ones_like(REQUESTS.output_tokens))
    goal = Goal(Targets(5000.0, 1e-3), 0.9)
    rate = most_rate(replace(BOTH, role=role), Demand.of(short, 0), goal)
    assert rate == (float("inf") if role is Role.DECODE else most_rate(BOTH, Demand.of(short, 0), GOAL))


def test_a_cached_prefix_is_no_work() -> None:
    cached = Workload(REQUESTS.prompt_tokens, REQUESTS.output_tokens, REQUESTS.gaps, REQUESTS.prompt_tokens - 1)
    assert Demand.of(cached, 0).prompt_tokens == 1.0


@pytest.mark.parametrize("factor", [0.01, 0.5, 0.99, 1.0, 1.01, 3.0])
def test_goodput_is_the_same_wherever_it_is_looked_for(factor: float) -> None:
    layout = Layout((BOTH,))
    found = goodput(layout, REQUESTS, GOAL, ceiling=20.0)
    assert goodput_near(layout, REQUESTS, GOAL, found * factor) == (
        found if factor >= 0.25 else pytest.approx(found * 4 * factor, rel=0.03)
    )


def test_a_goal_that_any_rate_attains_ends_the_search_at_a_few_times_the_guess() -> None:
    lax = Goal(Targets(1e9, 1e9))
    assert goodput_near(Layout((BOTH,)), REQUESTS, lax, 5.0) == pytest.approx(20.0, rel=0.05)
    assert goodput_near(Layout((BOTH,)), REQUESTS, Goal(Targets(1.0, 60.0)), 5.0) == 0.0
