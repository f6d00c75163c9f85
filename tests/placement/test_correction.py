"""A profile that is off is corrected by what is served, and one that is right is left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import ConfigError
from placement.arranged import Simulated
from placement.arrangement import Arrangement
from placement.correction import LOOKS, MOST, TOLERANCE, Correction, Factor
from placement.drift import LEAST_COMPARED
from placement.goodput import Goal
from placement.latency import Speculation
from placement.live_log import Ended
from placement.load import Drafted
from placement.native import serve
from placement.outcome import Outcome
from placement.replanner import Replanner, ReplanSettings
from placement.replay import replay
from placement.seen import PROFILED_STEPS, Seen
from placement.workload import Workload
from tests.placement.replanned import Counted
from tests.placement.served import served
from tests.placement.test_replay import TARGETS, WORKERS

DRAFTS = Speculation(2.0, 4, 1.0, 0.5)
DRAFTING = replace(WORKERS, group=replace(WORKERS.group, speculation=DRAFTS))
APART = Arrangement(3, 1, 0, 512)
factors = st.floats(1 / MOST, MOST)


def told(looks: list[float], factor: Factor | None = None) -> Factor:
    """With what each look finds the factor should be."""
    factor = factor or Factor()
    for right in looks:
        factor.tell(100.0 * right, 100.0 * factor.value)
    return factor


@given(st.floats(0.1, 10.0))
@example(1.0)
@example(1 + 2 * TOLERANCE)
def test_a_factor_finds_the_true_one_within_the_tolerance_or_the_bound(right: float) -> None:
    found = told([right] * 20).value
    assert max(found / np.clip(right, 1 / MOST, MOST), np.clip(right, 1 / MOST, MOST) / found) <= 1.001 + TOLERANCE


@given(st.lists(st.floats(0.01, 100.0), max_size=50), st.floats(0.5, 2.0))
def test_a_factor_is_never_beyond_what_was_found_nor_its_bounds(looks: list[float], right: float) -> None:
    factor = told([right] * 20)
    known = [factor.value, right, *looks]
    found = told(looks, factor).value
    assert max(1 / MOST, min(known)) * 0.999 <= found <= min(MOST, max(known)) * 1.001


@given(factors, st.integers(0, LOOKS - 1))
def test_what_is_not_found_several_times_in_a_row_moves_nothing(right: float, times: int) -> None:
    assert told(([right] * times + [1.0]) * 10).value == 1.0


@given(factors, st.integers(0, 2**32))
def test_looks_that_are_off_by_chance_leave_it_near_the_true_one(right: float, seed: int) -> None:
    looks = right * np.exp(np.random.default_rng(seed).normal(0.0, 0.08, 60))
    assert abs(np.log(told([*map(float, looks)]).value / right)) < 0.16


def traffic(seconds: float, rate: float, seed: int = 0) -> Workload:
    rng, count = np.random.default_rng(seed), int(rate * seconds)
    prompts = np.clip(rng.lognormal(6.0, 0.5, count), 1, 3000).astype(np.int32)
    return Workload(prompts, (rng.poisson(60, count) + 1).astype(np.int32), rng.exponential(1 / rate, count))


def after_serving(true: Simulated, start: Arrangement = APART) -> Replanner:
    """A replanner that has gone by WORKERS while others served for six minutes. It changed nothing."""
    settings = ReplanSettings(goal=Goal(TARGETS), chunk_tokens=(512,), margin=0.99)
    replanner = Replanner(settings, WORKERS, start)
    assert replay(traffic(360, 4.0), 1.0, true, replanner).changes == []
    return replanner


def errors(predicted: Outcome, measured: Outcome) -> list[float]:
    """Of the medians of TTFT and TPOT."""
    pairs = (predicted.ttft_ms, measured.ttft_ms), (predicted.tpot_ms, measured.tpot_ms)
    return [abs(float(np.median(one) / np.median(other)) - 1) for one, other in pairs]


@pytest.mark.parametrize("start", [APART, Arrangement(0, 0, 3, 512)])
@pytest.mark.parametrize("seen", [Seen(1.5, 1.0), Seen(1.3, 0.7)])
def test_predictions_become_true_where_the_profile_is_wrong(start: Arrangement, seen: Seen) -> None:
    """Of requests that were not there when it was corrected."""
    true, others = WORKERS.as_seen(seen), traffic(300, 4.0, seed=1)
    replanner = after_serving(true, start)
    measured = serve(true.layout(start), others, 1.0).outcome
    before, after = WORKERS.outcome(start, others, 1.0), replanner.predictor.outcome(start, others, 1.0)
    assert before is not None
    assert after is not None
    assert max(errors(before, measured)) > 0.2
    assert max(errors(after, measured)) < 0.08
    assert (replanner.seen.prompts, replanner.seen.decodes) == pytest.approx((seen.prompts, seen.decodes), rel=0.08)


def test_a_profile_that_is_right_stays_as_it_is() -> None:
    assert after_serving(WORKERS).seen == Seen()


class Slow(Counted):
    """Every first token takes 100 ms and every further one 10. What it was asked of is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[Arrangement, int]] = []

    def outcome(self, arrangement: Arrangement, workload: Workload, rate: float) -> Outcome | None:
        self.asked.append((arrangement, len(workload)))
        return Outcome(np.full(len(workload), 100.0), np.full(len(workload), 10.0), np.full(len(workload), 500.0))


def came(begin: int, end: int, ttft_ms: float | None = 100.0, tpot_ms: float | None = 10.0) -> list[Ended]:
    return [Ended(one + 1.0, float(one), served(float(one), 100, 20, ttft_ms, tpot_ms)) for one in range(begin, end)]


def test_a_request_is_judged_once_and_only_with_others() -> None:
    predictor, correction = Slow(), Correction()
    few = LEAST_COMPARED - 1
    correction.look(predictor, APART, came(0, few))
    assert predictor.asked == []
    correction.look(predictor, APART, came(0, few + 1))
    correction.look(predictor, APART, came(0, 2 * few + 1))
    assert predictor.asked == [(APART, few + 1)]
    correction.look(predictor, APART, came(0, 2 * few + 2))
    assert predictor.asked[1:] == [(APART, 2 * few + 2)]


def test_who_came_while_a_change_settled_is_simulated_but_not_judged() -> None:
    predictor, correction = Slow(), Correction()
    late = came(0, 30, ttft_ms=900.0)
    for end in range(60, 60 + 30 * LOOKS, 30):
        correction.look(predictor, APART, late + came(30, end), since_s=29.5)
    assert [count for _, count in predictor.asked] == list(range(60, 60 + 30 * LOOKS, 30))
    assert correction.seen == Seen()


def test_what_was_found_holds_when_roles_change() -> None:
    predictor, correction = Slow(), Correction()
    for look in range(LOOKS):
        correction.look(predictor, APART, came(30 * look, 30 * look + 30, ttft_ms=150.0, tpot_ms=8.0))
    found = correction.seen
    assert found.prompts > 1.2
    assert found.decodes < 0.9
    correction.look(predictor, Arrangement(1, 3, 0, 512), came(500, 505))
    assert correction.seen == found


def test_requests_of_one_token_tell_of_prompts_only() -> None:
    predictor, correction = Slow(), Correction()
    for look in range(LOOKS):
        correction.look(predictor, APART, came(30 * look, 30 * look + 30, ttft_ms=150.0, tpot_ms=None))
    assert correction.seen.prompts > 1.2
    assert correction.seen.decodes == 1.0


def test_an_arrangement_that_cannot_be_simulated_tells_nothing() -> None:
    correction = Correction()
    correction.look(Counted(), APART, came(0, 30, ttft_ms=1e4))
    assert correction.seen == Seen()


def test_drafts_are_as_profiled_until_many_were_seen_and_old_ones_are_forgotten() -> None:
    correction = Correction()
    assert correction.seen.of_drafts(DRAFTS) == DRAFTS
    assert correction.seen.acceptance_length is None
    correction.drafts(Drafted(steps=PROFILED_STEPS, tokens=PROFILED_STEPS, accepted=0))
    assert correction.seen.of_drafts(DRAFTS) == Speculation(1.5, 3, 1.0, 0.5)
    for _ in range(20):
        correction.drafts(Drafted(steps=1000, tokens=6000, accepted=2000))
    assert correction.seen.acceptance_length == pytest.approx(3.0, rel=0.01)
    assert correction.seen.of_drafts(DRAFTS).acceptance_length == pytest.approx(3.0, rel=0.05)
    assert correction.seen.of_drafts(DRAFTS).rows == 7


def test_a_replanner_predicts_with_the_acceptance_that_it_sees() -> None:
    """Drafts of which nothing is accepted cost, and bring nothing."""
    others = traffic(60, 4.0, seed=1)
    useless = DRAFTING.as_seen(Seen(drafted=Drafted(steps=1e6, tokens=1e6, accepted=0.0)))
    fast, slow = (one.outcome(APART, others, 1.0) for one in (DRAFTING, useless))
    assert fast is not None
    assert slow is not None
    assert np.median(slow.tpot_ms) > 1.5 * np.median(fast.tpot_ms)


def test_of_a_full_batch_no_more_is_drafted_than_there_is_room_for() -> None:
    """32 sequences in steps of 100 tokens: 3 rows each leave 4 for prompts."""
    eager = DRAFTING.as_seen(Seen(drafted=Drafted(steps=1e6, tokens=1e7, accepted=4e6)))
    drafts = eager.layout(Arrangement(3, 1, 0, 100)).groups[0].speculation
    assert drafts == Speculation(3.0, 3, 1.0, 0.5)
    with pytest.raises(ConfigError, match="leave no room for prompts"):
        eager.layout(Arrangement(3, 1, 0, 32))
