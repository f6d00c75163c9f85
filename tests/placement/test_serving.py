"""The simulator of our own system: what it says of small cases, and that the native one says the same of any."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from placement import native
from placement.latency import Coefficients, Contention, Speculation
from placement.layout import Group, Layout, Link, Outage, Role
from placement.serving import Served, serve_plainly
from placement.workload import Workload
from tests.placement.layouts import PLAIN, STEP, apart, group, layouts
from tests.placement.pipelines import azure_like, workload


def serve(layout: Layout, prompts: list[int], outputs: list[int], at_ms: list[float] | None = None) -> Served:
    """`at_ms`: when the requests come; all at once if left out."""
    gaps = np.diff(at_ms or [0.0] * len(prompts), prepend=0.0) / 1000
    return serve_plainly(layout, workload(prompts, outputs, gaps.tolist()), 1.0)


def test_one_request_takes_the_sum_of_its_steps() -> None:
    served = serve(Layout((group(Role.BOTH),)), [100], [3])
    assert served.outcome.ttft_ms == pytest.approx([20.0])
    assert served.outcome.tpot_ms == pytest.approx([6.0])
    assert (served.end_ms, served.busy_ms.sum()) == pytest.approx((32.0, 32.0))


def test_a_prompt_goes_in_chunks_beside_those_who_decode() -> None:
    """The second prompt takes three steps of 10 + 0.1 · 49 + 6 ms at most; the first request gains a token in each."""
    layout = Layout((group(Role.BOTH, chunk_tokens=50, max_sequences=40),))
    served = serve(layout, [10, 140], [4, 1], [0.0, 11.0])
    assert served.outcome.ttft_ms == pytest.approx([11.0, 2 * (10 + 4.9 + 6) + 10 + 4.2 + 6])
    assert served.outcome.e2e_ms[0] == pytest.approx(11.0 + served.outcome.ttft_ms[1])


def test_a_prompt_that_joins_few_decodes_costs_their_step_less_than_one_that_joins_many() -> None:
    """Two requests decode in steps of 7 ms, of which 6 ms are the weights that the prompt's 20 read too."""
    sharing = replace(PLAIN, shared_ms=8.0, shared_rows=8.0)
    layout = Layout((group(Role.BOTH, latency=sharing),))
    served = serve(layout, [100, 100, 100], [50, 50, 1], [0.0, 0.0, 30.0 + 7 * 2])
    assert served.outcome.ttft_ms[2] == pytest.approx(20.0 + 7.0 - 6.0)
    assert sharing.step_ms(100, 0.0, 800.0, 8, 8) == pytest.approx(20.0 + 13.0)
    assert sharing.step_ms(1, 0.0, 100.0, 1, 1) == pytest.approx(10.1)  # no less than the prompt alone


def test_a_chunk_is_as_long_as_one_of_its_size() -> None:
    """From 100 tokens in a step on a token takes twice as long."""
    latency = replace(PLAIN, large_prompt=Coefficients(0.0, 0.2, 0.0), large_tokens=100)
    layout = Layout((group(Role.BOTH, chunk_tokens=512, latency=latency),))
    served = serve(layout, [99, 100], [1, 1], [0.0, 100.0])
    assert served.outcome.ttft_ms == pytest.approx([19.9, 20.0])
    assert Layout((group(Role.BOTH, latency=latency.times(2.0)),)).lanes[0].latency.prompt_ms(100, 0.0) == 40.0


def test_what_is_around_the_groups_is_before_the_first_token() -> None:
    served = serve(Layout((group(Role.BOTH),), overhead_ms=7.0), [100], [3])
    assert served.outcome.ttft_ms == pytest.approx([27.0])
    assert served.outcome.tpot_ms == pytest.approx([6.0])
    assert served.outcome.e2e_ms == pytest.approx([39.0])


def test_a_cached_prefix_is_not_computed() -> None:
    requests = workload([100], [1], [0.0])
    hit = replace(requests, cached_tokens=np.array([60], np.int32))
    layout = Layout((group(Role.BOTH),))
    assert serve_plainly(layout, hit, 1.0).outcome.ttft_ms == pytest.approx([14.0])


def test_kv_that_moves_delays_the_second_token_only() -> None:
    moved = serve(apart(link=Link(ms_per_token=0.5, latency_ms=3.0)), [100], [3]).outcome
    still = serve(apart(), [100], [3]).outcome
    assert moved.ttft_ms == pytest.approx(still.ttft_ms)
    assert moved.e2e_ms - still.e2e_ms == pytest.approx([53.0])


def test_chunks_leave_while_later_ones_are_computed() -> None:
    """Of two chunks of 50 tokens only the second's transfer is waited for."""
    groups = (group(Role.PREFILL, chunk_tokens=50, max_sequences=40), group(Role.DECODE))
    layout = apart(link=Link(0.1), groups=groups)
    assert serve(layout, [100], [2]).outcome.tpot_ms == pytest.approx([50 * 0.1 + 6.0])


def test_transfers_share_a_link() -> None:
    served = serve(apart(prefill=2, decode=2, link=Link(1.0)), [100, 100], [2, 2])
    assert sorted(served.outcome.tpot_ms) == pytest.approx([100 + 6, 200 + 6])
    own = apart(prefill=2, decode=2, links=(Link(1.0),) * 2, paths={(0, 2): 0, (1, 3): 1})
    assert serve(own, [100, 100], [2, 2]).outcome.tpot_ms == pytest.approx([106, 106])


def test_kv_is_handed_over_within_an_island() -> None:
    """The second decode group has no prefill group of its own, and does its prompts itself."""
    groups = (group(Role.PREFILL), group(Role.DECODE), group(Role.DECODE, island=1))
    layout = Layout(groups, (Link(1.0),), {(0, 1): 0, (0, 2): 0})
    assert serve(layout, [100, 100], [2, 2]).outcome.tpot_ms == pytest.approx([106.0, 6.0])


def test_short_prompts_are_prefilled_where_they_are_decoded() -> None:
    layout = apart(link=Link(1.0), handoff_min_tokens=100)
    assert serve(layout, [99], [2]).outcome.tpot_ms == pytest.approx([6.0])
    assert serve(layout, [100], [2]).outcome.tpot_ms == pytest.approx([106.0])


@pytest.mark.parametrize(
    ("at_ms", "report_ms", "ttft_ms"), [(41.0, 0.0, 20.0), (41.0, 250.0, 21.0), (251.0, 250.0, 20.0)]
)
def test_the_router_knows_which_prompts_groups_have_reported(at_ms: float, report_ms: float, ttft_ms: float) -> None:
    """The first group has computed its long prompt after 40 ms, the second its two short ones after 42. Until they say
    so the second has fewer tokens to compute, and the prompt that comes at 41 waits there."""
    layout = Layout((group(Role.PREFILL), group(Role.PREFILL), group(Role.DECODE)), report_ms=report_ms)
    served = serve(layout, [300, 100, 100, 100], [1] * 4, [0.0, 1.0, 22.0, at_ms])
    assert served.outcome.ttft_ms[3] == pytest.approx(ttft_ms)


@pytest.mark.parametrize("report_ms", [0.0, 250.0])
def test_the_router_knows_at_once_which_requests_have_ended(report_ms: float) -> None:
    """The first group decodes, the second is idle after 21 ms, and has reported neither."""
    layout = Layout((group(Role.BOTH),) * 2, report_ms=report_ms)
    served = serve(layout, [100, 100, 100], [50, 1, 1], [0.0, 1.0, 30.0])
    assert served.outcome.ttft_ms[2] == pytest.approx(20.0)


def test_the_router_knows_what_it_has_sent_since() -> None:
    layout = Layout((group(Role.BOTH),) * 3, report_ms=1e6)
    assert serve(layout, [100] * 6, [1] * 6).outcome.ttft_ms == pytest.approx([30.0] * 6)


def test_requests_go_where_there_is_memory_for_their_prompt() -> None:
    """The first group has two short requests, the second a long one, and is full."""
    layout = Layout((group(Role.BOTH, kv_tokens=1000),) * 2, report_ms=0.0)
    served = serve(layout, [50, 900, 50, 150], [60, 60, 60, 1], [0.0, 1.0, 2.0, 150.0])
    assert served.outcome.ttft_ms[3] < 50.0


def test_of_groups_with_as_many_requests_the_one_with_most_memory_is_asked() -> None:
    layout = Layout((group(Role.BOTH, kv_tokens=1000), group(Role.BOTH, kv_tokens=2000)))
    assert serve(layout, [100], [1]).busy_ms.tolist() == [0.0, 20.0]


def test_prompts_sent_since_the_last_report_are_reckoned_to_take_memory() -> None:
    """Groups with memory for three prompts and for one get as many, though neither has reported meanwhile."""
    layout = Layout((group(Role.BOTH, kv_tokens=2000), group(Role.BOTH, kv_tokens=1000)), report_ms=1e6)
    assert serve(layout, [600] * 4, [1] * 4).busy_ms.tolist() == [190.0, 70.0]


def test_a_group_that_comes_back_reports_at_once() -> None:
    layout = Layout((group(Role.BOTH),) * 2, outages=(Outage(0, 5.0, 10.0),), report_ms=1e6)
    served = serve(layout, [100, 100], [1, 1], [0.0, 16.0])
    assert served.outcome.ttft_ms == pytest.approx([25.0, 20.0])


def test_a_request_of_one_token_is_done_where_it_is_prefilled() -> None:
    served = serve(apart(link=Link(1.0)), [100, 100], [50, 1], [0.0, 30.0])
    assert served.outcome.ttft_ms == pytest.approx([20.0, 20.0])
    assert served.outcome.e2e_ms[1] == pytest.approx(20.0)


def test_speculation_gains_several_tokens_a_step_for_more_rows() -> None:
    speculation = Speculation(acceptance_length=2.0, rows=4, draft_ms=1.0)
    layout = Layout((group(Role.BOTH, chunk_tokens=2048, speculation=speculation),))
    assert serve(layout, [100], [9]).outcome.tpot_ms == pytest.approx([4 * (5 + 4 + 1) / 8])


def test_prefill_groups_need_room_for_prompts_only() -> None:
    layout = apart(groups=(group(Role.PREFILL, kv_tokens=101), group(Role.DECODE)))
    assert serve(layout, [100], [50]).outcome.ttft_ms == pytest.approx([20.0])
    with pytest.raises(ConfigError, match="group 0 has room for 101 tokens"):
        serve(replace(layout, outages=(Outage(1, 0.0, 1.0),)), [100], [50])


def test_a_request_waits_for_memory() -> None:
    layout = Layout((group(Role.BOTH, kv_tokens=300),))
    served = serve(layout, [200, 200], [2, 2])
    assert served.outcome.ttft_ms == pytest.approx([30.0, 30.0 + 6.0 + 30.0])


def test_who_came_last_gives_way_when_memory_runs_out_and_loses_no_token() -> None:
    layout = Layout((group(Role.BOTH, kv_tokens=215),))
    served = serve(layout, [100, 100], [20, 20])
    assert served.preemptions == 1
    assert served.outcome.e2e_ms[0] < served.outcome.e2e_ms[1]
    assert served.outcome.ttft_ms == pytest.approx([30.0, 30.0])


def test_kv_waits_on_the_prefill_side_until_there_is_room_to_decode() -> None:
    groups = (group(Role.PREFILL), group(Role.DECODE, kv_tokens=150))
    served = serve(Layout(groups), [100, 100], [11, 11])
    assert served.outcome.ttft_ms == pytest.approx([30.0, 30.0])
    assert served.outcome.e2e_ms == pytest.approx([90.0, 150.0])


def test_stages_have_a_step_each_in_flight() -> None:
    one = serve(Layout((group(Role.BOTH),)), [100, 100], [5, 5], [0.0, 1.0]).outcome
    two = serve(Layout((group(Role.BOTH, stages=2, hop_ms=1.0),)), [100, 100], [5, 5], [0.0, 1.0]).outcome
    assert one.ttft_ms[1] > 30
    assert two.ttft_ms == pytest.approx([21.0, 21.0])


def test_requests_of_a_failed_group_go_on_elsewhere() -> None:
    layout = Layout((group(Role.BOTH),) * 2, outages=(Outage(0, 23.0, 1000.0),))
    served = serve(layout, [100], [3])
    assert served.outcome.ttft_ms == pytest.approx([20.0])
    # One token was out; the prompt and that token are computed again, which gives the second.
    assert served.outcome.e2e_ms == pytest.approx([23.0 + 10.0 + 0.1 * 101 + 6.0])


def test_requests_wait_when_nobody_is_left() -> None:
    layout = Layout((group(Role.BOTH),), outages=(Outage(0, 5.0, 95.0),))
    assert serve(layout, [100], [1]).outcome.ttft_ms == pytest.approx([120.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout((group(Role.PREFILL),)), "no group that decodes"),
        (lambda: apart(paths={(0, 1): 3}), "link 3, but there are 0"),
        (lambda: Layout((group(Role.BOTH, chunk_tokens=256),)), "256 tokens leave no room .* 256 rows"),
        (lambda: Layout((group(Role.BOTH, speculation=Speculation(5.0, 4)),)), "acceptance length of 5 with 4 rows"),
        (lambda: Layout((group(Role.BOTH, stages=0),)), "stages is 0"),
        (lambda: apart(link=Link(-1.0)), "link 0: ms_per_token is -1: times are 0"),
        (lambda: Layout((group(Role.BOTH, latency=replace(PLAIN, prompt=Coefficients(1, -1, 0))),)), "prompt is .*-1"),
        (lambda: Layout((group(Role.BOTH, latency=replace(PLAIN, shared_ms=-1.0)),)), "shared_ms is -1.0"),
        (lambda: Layout((group(Role.BOTH, latency=replace(PLAIN, shared_rows=0.0)),)), "shared_rows 0.0: steps save"),
        (
            lambda: Layout((group(Role.BOTH, latency=replace(PLAIN, large_prompt=Coefficients(1, 1, -1))),)),
            "large_prompt is .*-1",
        ),
        (
            lambda: Layout((group(Role.BOTH),), outages=(Outage(1, 0.0, 1.0),)),
            "outage 0: there is no group 1, but 1 groups",
        ),
        (lambda: Layout((group(Role.BOTH),), report_ms=-1.0), "report_ms is -1: times are 0 or more"),
        (lambda: Layout((group(Role.BOTH),), overhead_ms=-3.0), "overhead_ms is -3: times are 0 or more, and finite"),
        (lambda: Layout((group(Role.BOTH),), overhead_ms=math.nan), "overhead_ms is nan"),
        (lambda: apart(link=Link(0.1, math.inf)), "link 0: latency_ms is inf"),
        (lambda: Layout((group(Role.BOTH),), outages=(Outage(0, math.inf, 1.0),)), "outage 0: at_ms is inf"),
        (lambda: Layout((group(Role.BOTH, hop_ms=-0.5),)), "group 0: hop_ms is -0.5"),
        (lambda: Layout((group(Role.BOTH, speculation=Speculation(2, 4, -1.0)),)), "group 0: draft_ms is -1"),
        (
            lambda: Layout((group(Role.BOTH, speculation=Speculation(2, 4, 0.0, math.nan)),)),
            "group 0: draft_sequence_ms is nan",
        ),
        (
            lambda: Layout((group(Role.BOTH, latency=replace(PLAIN, decode=Coefficients(1, math.nan, 0))),)),
            "decode is .*nan",
        ),
        (lambda: Layout((group(Role.BOTH, contention=Contention((1.0, math.nan))),)), "group 0: Contention.*nan"),
        (
            lambda: serve_plainly(Layout((group(Role.BOTH),)), workload([1], [1], [1.0]), math.nan),
            "at nan requests/s the last of 1 never comes",
        ),
        (
            lambda: serve_plainly(Layout((group(Role.BOTH),)), workload([1], [1], [1.0]), 1e-310),
            "at 1e-310 requests/s the last of 1",
        ),
        (lambda: serve(Layout((group(Role.BOTH, kv_tokens=100),)), [100], [9]), "room for 100 tokens .* needs 110"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.fixture
def library() -> None:
    if native.load() is None:
        pytest.skip("no native simulators here")


def assert_same(plain: Served, compiled: Served) -> None:
    assert plain.preemptions == compiled.preemptions
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        np.testing.assert_allclose(getattr(compiled.outcome, name), getattr(plain.outcome, name), rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(compiled.busy_ms, plain.busy_ms, rtol=1e-7, atol=1e-6)


@st.composite
def requests(draw: st.DrawFn) -> Workload:
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gaps = rng.exponential(size=count) * (rng.random(count) > 0.1)
    prompts = rng.integers(1, 500, count, np.int32)
    cached = (prompts * rng.choice([0.0, 0.0, 0.7], count)).astype(np.int32)
    outputs = rng.integers(1, draw(st.sampled_from([3, 60, 400])), count, np.int32)
    return Workload(prompts, outputs, gaps, cached)


@pytest.mark.usefixtures("library")
@settings(deadline=None, max_examples=80)
@given(layouts(), requests(), st.sampled_from([1.0, 10.0, 100.0]))
def test_the_native_simulator_says_the_same(layout: Layout, requests: Workload, rate: float) -> None:
    assert_same(serve_plainly(layout, requests, rate), native.serve(layout, requests, rate))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rate", [3.0, 7.0, 30.0])
@pytest.mark.parametrize("kv_tokens", [12_000, 100_000])
def test_the_native_simulator_says_the_same_under_load(rate: float, kv_tokens: int) -> None:
    pool = {"latency": STEP, "kv_tokens": kv_tokens}
    for layout in (
        Layout((group(Role.BOTH, **pool),) * 2),
        apart(groups=(group(Role.PREFILL, **pool), group(Role.DECODE, **pool)), link=Link(0.01, 0.4)),
    ):
        assert_same(serve_plainly(layout, azure_like(200), rate), native.serve(layout, azure_like(200), rate))


def test_a_group_is_simulated_as_it_is_given() -> None:
    """Two stages part memory and seats."""
    lanes = Layout((Group(Role.BOTH, STEP, 5001, max_sequences=9, stages=2, hop_ms=0.5),)).lanes
    assert [(lane.kv_tokens, lane.max_sequences, lane.every_step_ms) for lane in lanes] == [(2500, 4, 0.5)] * 2
