"""A replay: workers change their roles in the middle of a simulated run, and what comes of it."""

from __future__ import annotations

import time
from dataclasses import replace as with_
from xml.etree import ElementTree as Xml

import numpy as np
import pytest

from core.errors import ConfigError
from placement.arranged import Simulated, simulated
from placement.arrangement import Arrangement
from placement.goodput import Goal
from placement.latency import Coefficients, StepLatency
from placement.layout import Layout, Link, Role
from placement.load import Load, RoleLoad
from placement.native import serve
from placement.outcome import Targets
from placement.profile import Setting
from placement.replanner import Change, Replanner, ReplanSettings
from placement.replay import Replayed, replay
from placement.replay_shown import svg, table
from placement.replay_start import start_of
from placement.serving import World, serve_plainly
from placement.shapes import Limits
from placement.topology import of_device
from placement.traces import Trace
from placement.traffic import history
from placement.workload import Workload
from tests.placement.layouts import PLAIN, STEP, apart, group
from tests.placement.pipelines import azure_like, workload
from tests.placement.profiles import profile

TARGETS = Targets(ttft_ms=1500.0, tpot_ms=30.0)
WORKERS = Simulated(
    group(Role.BOTH, latency=STEP, kv_tokens=40_000, max_sequences=32), TARGETS, 4096, inside=Link(0.01)
)
START = Arrangement(prefill=3, decode=1, both=0, chunk_tokens=512)


def shifting(each: int = 1200) -> Workload:
    """15 requests/s of long prompts and short outputs, then of the opposite; 3 of 4 workers are needed for these."""
    rng = np.random.default_rng(0)
    parts = [(1500, 20, 15.0), (150, 300, 15.0)]
    columns = [(rng.poisson(p, each), rng.poisson(o, each) + 1, rng.exponential(1 / r, each)) for p, o, r in parts]
    prompts, outputs, gaps = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Workload(prompts.astype(np.int32), outputs.astype(np.int32), gaps)


def replanner(start: Arrangement = START, **changes: object) -> Replanner:
    options = {"goal": Goal(TARGETS), "chunk_tokens": (512,), "horizon_s": 60.0} | changes
    return Replanner(ReplanSettings(**options), WORKERS, start)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shifted() -> Replayed:
    return replay(shifting(), 1.0, WORKERS, replanner())


def test_attainment_recovers_within_a_minute_of_a_shift_and_not_without_replanning(shifted: Replayed) -> None:
    shift_s = float(shifting().arrivals_ms(1.0)[1200] / 1e3)
    later = [interval for interval in shifted.intervals if interval.at_s > shift_s + 30 and interval.requests]
    assert len(later) > 5
    assert min(interval.attainment or 0.0 for interval in later) > 0.9
    assert max(interval.without or 0.0 for interval in later) < 0.1
    assert shifted.attainment > shifted.without + 0.25


def test_a_replay_says_what_was_changed_and_why(shifted: Replayed) -> None:
    (changed, *_), text = shifted.changes, table(shifted)
    assert changed.change.to.decode + changed.change.to.both >= 3
    assert changed.change.why in text
    assert f"at {changed.at_s:.0f} s predictive: {changed.change.to}" in text
    assert f"{100 * shifted.without:.1f} % without" in text
    assert shifted.workers == 4.0


def test_a_replay_is_drawn_with_two_lines_and_every_change(shifted: Replayed) -> None:
    root = Xml.fromstring(svg(shifted))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points", "").split() for line in root.iter(f"{space}polyline")]
    known = [interval for interval in shifted.intervals if interval.requests]
    assert [len(line) for line in lines] == [len(known)] * 2
    dashed = [line for line in root.iter(f"{space}line") if line.get("stroke-dasharray")]
    assert len(dashed) == len(shifted.changes)


class Listening(Replanner):
    """Keeps what it is told."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.loads: list[Load] = []

    def decide(self, now_s: float, load: Load) -> Change | None:
        self.loads.append(load)
        return super().decide(now_s, load)


def test_of_requests_under_way_as_much_is_known_as_a_gateway_would_know() -> None:
    """When they came, the prompt, and the tokens so far; of cached ones only with the first of these."""
    gaps = np.array([0.5, 0.1, 0.1, 9.0])
    lengths = (np.full(4, tokens, np.int32) for tokens in (400, 300))
    options = {"goal": Goal(TARGETS), "chunk_tokens": (512,)}
    listening = Listening(ReplanSettings(**options), WORKERS, Arrangement(1, 1, 0, 512))  # type: ignore[arg-type]
    replay(Workload(*lengths, gaps, np.full(4, 64, np.int32)), 1.0, WORKERS, listening)
    first, *later = listening.loads
    assert [one.prompt_tokens for one in first.under_way] == [400] * first.in_flight == [400] * 3
    assert [one.for_s for one in first.under_way] == pytest.approx([0.5, 0.4, 0.3])
    assert all(one.cached_tokens == (64 if one.output_tokens else 0) for load in later for one in load.under_way)
    tokens = [max((one.output_tokens for one in load.under_way), default=0) for load in listening.loads]
    assert 0 <= tokens[0] < tokens[1] < 300
    assert listening.loads[-1].under_way == []


def test_without_a_change_a_replay_is_the_plain_simulation() -> None:
    same = azure_like(300)
    result = replay(same, 2.0, WORKERS, replanner(margin=0.99))
    assert result.changes == []
    assert result.attainment == result.without
    assert result.without == serve(WORKERS.layout(START), same, 2.0).outcome.attainment(TARGETS)
    assert sum(interval.requests for interval in result.intervals) == result.requests == 300


def test_new_workers_serve_once_they_have_started() -> None:
    """Of one worker's load too many come; the others are there after 20 s."""
    many = Workload(np.full(1500, 400, np.int32), np.full(1500, 40, np.int32), np.full(1500, 0.05))
    alone = replanner(Arrangement(0, 0, 1, 512), most_workers=4, startup_s=20.0)
    result = replay(many, 1.0, WORKERS, alone)
    at_s = next(changed.at_s for changed in result.changes if changed.change.to.workers > 1)
    before = [interval.attainment for interval in result.intervals if 10 < interval.at_s < at_s + 15]
    assert max(share or 0.0 for share in before) < 0.5
    assert (result.intervals[-1].attainment or 0.0) > 0.9
    assert 1 < result.workers < 4


def test_workers_that_are_given_up_end_what_they_have() -> None:
    few = Workload(np.full(400, 50, np.int32), np.full(400, 100, np.int32), np.full(400, 0.5))
    idle = replanner(Arrangement(0, 0, 3, 512), most_workers=3)
    result = replay(few, 1.0, WORKERS, idle)
    assert [changed.change.to.workers for changed in result.changes] == [2, 1]
    assert result.attainment == 1.0


def test_a_lane_goes_on_with_what_it_has_and_takes_new_work_by_its_new_role() -> None:
    """At 5 ms the first prompt is being computed where prompts are; its lane decodes from then on, and the other takes
    prompts. The second goes to the other, the first is decoded where it was to be."""
    requests = workload([100, 100], [3, 3], [0.0, 1.0])
    world = World(apart(), requests)

    def swap() -> None:
        prefills, decodes = world.lanes
        specs = prefills.spec, decodes.spec
        world.use(prefills, specs[0]._replace(role=Role.DECODE))
        world.use(decodes, specs[1]._replace(role=Role.PREFILL))

    world.call(5.0, swap)
    world.run(requests.arrivals_ms(1.0))
    assert [(request.p, request.d) for request in world.requests] == [(0, 1), (1, 0)]
    assert world.ended == world.requests
    assert world.last.tolist() == pytest.approx([32.0, 1032.0])


def test_a_prompt_for_another_lane_is_no_victim_of_preemption_and_all_memory_comes_back() -> None:
    """The first is decoded on a lane that takes prompts from 50 ms on. It outgrows what the second, a prompt of 20
    steps that is to be decoded elsewhere and has room reserved there, leaves of the memory."""
    requests = workload([100, 2000], [300, 3], [0.0, 0.06])
    tight = {"kv_tokens": 2120, "chunk_tokens": 100, "max_sequences": 8}
    world = World(apart(groups=(group(Role.PREFILL, **tight), group(Role.DECODE, **tight))), requests)

    def swap() -> None:
        for lane, role in zip(world.lanes, (Role.DECODE, Role.PREFILL), strict=True):
            world.use(lane, lane.spec._replace(role=role))

    world.call(50.0, swap)
    world.run(requests.arrivals_ms(1.0))
    assert world.preemptions > 0
    assert [(lane.kv_used, lane.seats, lane.live, lane.pending) for lane in world.lanes] == [(0, 0, 0, 0)] * 2
    assert [(request.p, request.d) for request in world.requests] == [(1, 1), (1, 0)]


def test_a_lane_that_is_closed_gets_nothing_new() -> None:
    requests = workload([100] * 4, [3] * 4, [0.0, 0.0, 1.0, 1.0])
    world = World(Layout((group(Role.BOTH),) * 2), requests)
    world.call(500.0, lambda: world.use(world.lanes[0], world.lanes[0].spec, is_open=False))
    world.run(requests.arrivals_ms(1.0))
    assert [request.d for request in world.requests] == [0, 1, 1, 1]


def test_calls_that_change_nothing_change_nothing() -> None:
    requests, layout = azure_like(60), apart(prefill=1, decode=2, link=Link(0.05))
    world = World(layout, requests)
    for at_ms in range(0, 20_000, 500):
        world.call(float(at_ms), lambda: None)
    world.run(requests.arrivals_ms(4.0))
    plain = serve_plainly(layout, requests, 4.0)
    assert world.last.max() == plain.end_ms
    np.testing.assert_array_equal(world.busy_ms(), plain.busy_ms)


# --- the start, and what came before ---------------------------------------------------------------------------------


def start(text: str | None, workers: int = 4, **changes: object) -> Arrangement:
    options = {"goal": Goal(TARGETS), "chunk_tokens": (64, 512)} | changes
    return start_of(text, workers, ReplanSettings(**options), WORKERS, shifting(), 17.0)  # type: ignore[arg-type]


def test_the_best_arrangement_for_the_first_requests_is_the_start() -> None:
    assert start(None) == START


def test_roles_at_the_start_may_be_said() -> None:
    assert start("prefill=1,decode=3").decode == 3
    assert start("both=4").both == 4


@pytest.mark.parametrize(
    ("text", "workers", "message"),
    [
        ("prefill=1", 4, "--start: prefill=1 is 1 in all, and --workers 4"),
        ("prefill=2,both=2", 4, "is not either both, or prefill and decode"),
        ("prefill=4", 4, "is not either both, or prefill and decode"),
        ("learner=4", 4, "'learner=4' is no role and number: write --start prefill=1,decode=1"),
        ("both=-4", 4, "'both=-4' is no role and number"),
        (None, 1, "--workers 1: too few for --floor 2"),
    ],
)
def test_roles_that_cannot_be_are_refused(text: str | None, workers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(text, workers, least_workers=2)


def test_targets_out_of_reach_are_refused_with_what_is_reachable() -> None:
    strict = with_(WORKERS, targets=Targets(1.0, 1.0))
    settings = ReplanSettings(goal=Goal(Targets(1.0, 1.0)), chunk_tokens=(512,))
    with pytest.raises(ConfigError, match=r"out of reach for 90% of the first 200 requests: .* 0% attain them"):
        start_of(None, 2, settings, strict, shifting(), 17.0)


def test_what_is_reachable_is_told_for_the_share_that_is_asked_for() -> None:
    """A worker that has each prompt to itself takes 1 ms for each of its tokens, and prompts have 10 to 200."""
    step = StepLatency(*[Coefficients(0.0, 1.0, 0.0)] * 3, large_rows=10**6)
    worker = Simulated(group(Role.BOTH, latency=step), Targets(1.0, 1.0), 4096)
    asked = workload([10 * (1 + n) for n in range(20)], [2] * 20, [1000.0] * 20)
    for share, ttft in ((0.5, "TTFT 100 ms"), (0.9, "TTFT 180 ms")):
        settings = ReplanSettings(goal=Goal(Targets(1.0, 1.0), share), chunk_tokens=(512,))
        with pytest.raises(ConfigError, match=rf"attain them, and {share:.0%} have {ttft} and TPOT"):
            start_of(None, 2, settings, worker, asked, 1.0)


def test_the_past_is_counted_in_whole_periods() -> None:
    """Every 2 s, of which nobody comes in the second; the last period is not whole."""
    gaps = np.array([0.0, 1.0, 3.5, 0.5, 1.5])  # at 0, 1, 4.5, 5, 6.5
    trace = Trace(workload([10, 30, 50, 70, 90], [1, 3, 5, 7, 9], gaps.tolist()), 1.0)
    found = history(trace, 2.0)
    assert [(period.rate, period.prompt, period.output) for period in found] == [(1, 20, 2), (0, 20, 2), (1, 60, 6)]


def test_a_past_of_too_many_periods_is_refused_at_once() -> None:
    years = Trace(workload([10, 30], [1, 3], [0.0, 2.0]), 1e-300)
    with pytest.raises(ConfigError, match=r"of 1e\+300 times of 2 s, .* 100000 at the most: give the last part of it"):
        history(years, 2.0)


def test_a_long_past_is_counted_in_one_pass() -> None:
    """Looking for the requests of each period among all would take minutes."""
    count = 90_000
    trace = Trace(workload([10] * count, [1] * count, [0.0] + [1.0] * (count - 1)), 1.0)
    started = time.process_time()
    assert len(history(trace, 1.0)) == count - 1
    assert time.process_time() - started < 15.0


# --- what a worker is ------------------------------------------------------------------------------------------------


def test_workers_are_as_they_were_profiled() -> None:
    limits = Limits(chunk_tokens=(512,), max_sequences=16, kv_cache_bytes=10**9, overhead_ms=3.0)
    topology = of_device("H100", 2)
    facts = profile(setting=Setting(device="H100"))
    workers = simulated(facts, topology, limits, TARGETS)
    layout = workers.layout(Arrangement(1, 1, 0, 512))
    assert [one.role for one in layout.groups] == [Role.PREFILL, Role.DECODE]
    assert {one.kv_tokens for one in layout.groups} == {10**4}
    assert layout.overhead_ms == 3.0
    assert workers.longest == 4096
    assert workers.prompt_ms(1000.0, Arrangement(0, 0, 1, 100)) == pytest.approx(10 * 14.7 + 68.6, rel=0.01)


def test_a_token_takes_a_step_over_what_a_step_gains() -> None:
    """5 ms and 1 for each of 4 sequences; of 8 on two workers as many, and on one they have no seats, or no room."""
    workers = Simulated(group(Role.BOTH, latency=PLAIN, kv_tokens=1000, max_sequences=6), TARGETS, 4096)
    eight = RoleLoad(workers=2, running=8, free_kv_tokens=1200)
    assert workers.token_ms(eight, 2, START) == pytest.approx(9.0)
    assert workers.token_ms(eight, 1, START) == float("inf")
    assert workers.token_ms(RoleLoad(workers=2, running=4, free_kv_tokens=900), 1, START) == float("inf")
    assert workers.token_ms(RoleLoad(workers=1, free_kv_tokens=0), 1, START) == 0.0


def test_requests_that_no_worker_can_hold_are_left_out() -> None:
    fits, never = workload([100], [2], [0.0]), workload([5000], [2], [0.0])
    both = workload([100, 5000], [2, 2], [0.0, 1.0])
    assert [WORKERS.attainment(START, asked, 0.01) for asked in (fits, both, never)] == [1.0, 1.0, 0.0]


def test_steps_too_short_for_a_batch_are_known_not_to_do() -> None:
    assert WORKERS.why_not(Arrangement(0, 0, 1, 32)) is not None
    assert WORKERS.why_not(Arrangement(1, 0, 0, 512)) == "the layout has no group that decodes"
    assert WORKERS.why_not(START) is None


def test_the_mean_lengths_of_a_workload_are_scaled_within_its_longest() -> None:
    scaled = workload([10, 100], [4, 8], [0.0, 1.0]).scaled(2.0, 0.1)
    assert (scaled.prompt_tokens.tolist(), scaled.output_tokens.tolist()) == ([20, 100], [1, 1])
