"""The log of what was served: what it counts, what it forgets, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from core.types import FinishReason
from placement.arrivals import burstiness, gamma_gaps
from placement.live_log import MOST_REQUESTS, LiveLog
from placement.outcome import Targets
from placement.traces import read_trace, served_lines, served_workload
from tests.placement.served import served

TARGETS = Targets(ttft_ms=200.0, tpot_ms=20.0)


def test_what_arrives_is_counted_before_it_ends() -> None:
    """Of 5 under way 3 end, and 4 are left: 2 have come. Then nobody ends, and there are 3 more."""
    log = LiveLog(100.0)
    assert log.tell(10.0, [], in_flight=5) is None
    first, second = log.tell(12.0, [served()] * 3, in_flight=4), log.tell(13.0, [], in_flight=7)
    assert first is not None
    assert second is not None
    assert (first.arrived, first.seconds, second.arrived, second.seconds) == (2, 2.0, 3, 1.0)
    assert log.rate(since_s=10.0) == pytest.approx(5 / 3)
    assert log.rate(since_s=12.0) == pytest.approx(3.0)
    assert log.rate(since_s=13.0) is None


def test_what_is_told_twice_at_one_time_counts_to_the_next() -> None:
    log = LiveLog(100.0)
    log.tell(0.0, [], in_flight=0)
    assert log.tell(0.0, [served()] * 2, in_flight=9) is None
    tick = log.tell(1.0, [served()], in_flight=4)
    assert tick is not None
    assert tick.arrived == 7


def test_a_gateway_that_is_gone_does_not_make_the_rate_negative() -> None:
    log = LiveLog(100.0)
    log.tell(0.0, [], in_flight=50)
    tick = log.tell(1.0, [], in_flight=0)
    assert tick is not None
    assert tick.arrived == 0


def test_requests_of_a_gateway_that_tells_again_have_not_come_just_now() -> None:
    """One with 40 under way says nothing for a while; it is another baseline each time, and nothing is counted."""
    log, both, one = LiveLog(100.0), frozenset("gh"), frozenset("g")
    log.tell(0.0, [], in_flight=50, told_by=both)
    assert log.tell(1.0, [], in_flight=10, told_by=one) is None
    first = log.tell(2.0, [served()] * 2, in_flight=11, told_by=one)
    assert log.tell(3.0, [served()] * 9, in_flight=51, told_by=both) is None
    second = log.tell(4.0, [], in_flight=52, told_by=both)
    assert first is not None
    assert second is not None
    assert (first.arrived, second.arrived) == (3, 1)
    assert log.rate(since_s=0.0) == pytest.approx(2.0)
    assert log.met(TARGETS, since_s=0.0).judged == 11


def test_attainment_is_of_those_that_ended_lately() -> None:
    log = LiveLog(100.0)
    log.tell(1.0, [served(ttft_ms=900.0)], 0)
    log.tell(5.0, [served(), served(ttft_ms=201.0), served(tpot_ms=21.0), served(ttft_ms=500.0, tpot_ms=50.0)], 0)
    met = log.met(TARGETS, since_s=1.0)
    assert (met.judged, met.missed, met.late, met.slow) == (4, 3, 2, 2)
    assert met.attainment == pytest.approx(0.25)
    assert log.met(TARGETS, since_s=0.0).judged == 5


def test_a_request_may_take_too_long_though_no_token_came_late() -> None:
    log = LiveLog(100.0)
    log.tell(1.0, [served(output=10), served(output=30), served(output=1, tpot_ms=None)], 0)  # 190, 390 and 100 ms
    met = log.met(Targets(200.0, 20.0, e2e_ms=200.0), since_s=0.0)
    assert (met.judged, met.missed, met.late, met.slow) == (3, 1, 0, 0)


@pytest.mark.parametrize(
    ("request_", "judged", "missed"),
    [
        (served(output=0, ttft_ms=None, tpot_ms=None, ended=FinishReason.ERROR), 1, 1),
        (served(output=0, ttft_ms=None, tpot_ms=None, ended=FinishReason.ABORT), 0, 0),
        (served(output=1, tpot_ms=None, ended=FinishReason.ABORT), 1, 0),
        (served(ttft_ms=300.0, ended=FinishReason.ABORT), 1, 1),
    ],
    ids=["failed", "given up", "given up in time", "given up late"],
)
def test_how_a_request_that_did_not_finish_is_judged(request_, judged: int, missed: int) -> None:
    log = LiveLog(100.0)
    log.tell(1.0, [request_], 0)
    met = log.met(TARGETS, since_s=0.0)
    assert (met.judged, met.missed) == (judged, missed)


def test_nothing_is_missed_where_nothing_was_judged() -> None:
    assert LiveLog(1.0).met(TARGETS, since_s=0.0).attainment == 1.0


def test_when_a_request_came_is_known_without_the_clock_of_its_gateway() -> None:
    """Told of at 50 s, after 1 s to the first token and 9 gaps of 100 ms: it came at 48.1 s, whatever it says."""
    log = LiveLog(100.0)
    log.tell(50.0, [served(arrived_s=1.7e9, output=10, ttft_ms=1000.0, tpot_ms=100.0), served(1.7e9)], 0)
    (early, late) = log.ended(since_s=0.0)
    assert early.came_s == pytest.approx(48.1)
    assert late.came_s == pytest.approx(49.81)
    assert log.came(49.0, 50.0) == [late]
    assert log.came(48.0, early.came_s) == []
    assert log.ended(since_s=50.0) == []


def test_how_late_requests_may_have_come_to_have_ended() -> None:
    """Of twenty one took 9.1 s, and the others 0.19 s."""
    log = LiveLog(100.0)
    log.tell(20.0, [served(ttft_ms=9010.0), *[served()] * 19], 0)
    assert log.known_until(20.0, since_s=0.0) == pytest.approx(20.0 - 0.19 - 0.05 * 8.91, abs=0.2)
    assert log.known_until(40.0, since_s=30.0) == log.known_until(20.0, since_s=0.0) + 20.0
    assert LiveLog(1.0).known_until(40.0, since_s=30.0) == 40.0


def test_the_log_is_bounded_in_time_and_number() -> None:
    log = LiveLog(10.0)
    for second in range(50):
        log.tell(float(second), [served()], 0)
    assert len(log.ended(since_s=-1.0)) == 10
    log.tell(50.0, [served()] * (MOST_REQUESTS + 5), 0)
    assert len(log.ended(since_s=-1.0)) == MOST_REQUESTS


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_burstiness_is_that_of_the_gaps_by_gaps_and_by_counts(shape: float) -> None:
    gaps = gamma_gaps(30_000, shape**-0.5, np.random.default_rng(1))
    assert burstiness(gaps) == pytest.approx(shape, rel=0.08)
    log = LiveLog(1e6)
    times = np.cumsum(gaps) / 20.0
    for second, arrived in enumerate([0, *np.histogram(times, np.arange(0.0, times[-1]))[0].tolist()]):
        log.tell(float(second), [served()] * arrived, 0)
    assert log.burstiness(since_s=0.0) == pytest.approx(shape, rel=0.15)


def test_too_few_requests_have_the_burstiness_of_chance() -> None:
    assert burstiness(np.array([0.0, 1.0])) == 1.0
    assert burstiness(np.zeros(9)) == 1.0
    assert burstiness(np.array([0.0, 1.0, 1.0])) == np.inf
    assert LiveLog(1.0).burstiness(0.0) == 1.0


def test_what_is_written_is_read_as_a_trace(tmp_path: Path) -> None:
    """In the order of arrival, whatever the order of the ends; without what got no token."""
    lost = served(arrived_s=1e9 + 1, output=0, ttft_ms=None, tpot_ms=None, ended=FinishReason.ERROR)
    ended = [served(arrived_s=1e9 + 3, prompt=7, cached=4), lost, served(arrived_s=1e9, output=1, tpot_ms=None)]
    (tmp_path / "log.jsonl").write_bytes(served_lines(ended[:2]) + served_lines(ended[2:]))
    trace = read_trace(tmp_path / "log.jsonl")
    assert trace.workload.prompt_tokens.tolist() == [100, 7]
    assert trace.workload.output_tokens.tolist() == [1, 10]
    assert trace.workload.cached_tokens.tolist() == [0, 4]
    assert trace.rate == pytest.approx(1 / 3)
    assert served_workload(ended).cached_tokens.tolist() == [4, 0]


GOOD = served_lines([served()]).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + GOOD[:40] + "\n", "line 2: "),
        (GOOD + "\n" + GOOD.replace('"stop"', '"tired"'), "line 3: Invalid enum value 'tired'"),
        (GOOD + GOOD.replace('"prompt_tokens":100', '"prompt_tokens":0'), "line 2: 0 prompt and 10 output tokens"),
        (GOOD + GOOD.replace('"output_tokens":10', '"output_tokens":-1'), "line 2: 100 prompt and -1 output tokens"),
        (GOOD + GOOD.replace('"cached_tokens":0', '"cached_tokens":101'), "line 2: 101 of 100 prompt tokens cached"),
        (GOOD.replace('"output_tokens":10', '"output_tokens":0'), "empty trace"),
        (GOOD.replace('"prompt_tokens":100', '"prompt_tokens":100000000000'), "line 1: 100000000000 prompt"),
    ],
)
def test_a_line_that_is_none_is_refused_by_its_number(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / "log.jsonl")
