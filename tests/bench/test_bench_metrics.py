"""The numbers, on timelines written by hand."""

import math
from datetime import datetime

import pytest
from sse_server import DONE, delta, event, text, usage

from bench.serving import metrics, report
from bench.serving.load import Run
from bench.serving.stream import CompletionStream
from bench.serving.timeline import Timeline


def completed(start, chunks, end=None, tokens=None, **more):
    return Timeline(
        index=0,
        scheduled=start,
        dispatched=start,
        start=start,
        chunks=chunks,
        end=chunks[-1] if end is None else end,
        finished=True,
        completion_tokens=tokens,
        **more,
    )


def a_run(*timelines, duration=10.0, interrupted=False):
    return Run(list(timelines), began=0.0, duration=duration, cpu=1.0, interrupted=interrupted)


# --- one request ---------------------------------------------------------------------------------------------------


def test_latencies_follow_their_definitions():
    t = completed(1.0, [1.5, 1.6, 1.9], end=2.0, tokens=6)
    assert t.ttft == 0.5
    assert t.latency == 1.0
    assert t.tpot == pytest.approx((1.0 - 0.5) / 5)
    assert t.itl == pytest.approx([0.1, 0.3])


def test_one_token_has_no_tpot():
    assert completed(0.0, [1.0], tokens=1).tpot is None


def test_without_usage_every_chunk_is_a_token():
    assert completed(0.0, [1.0, 2.0, 3.0]).output_tokens == 3


# --- reading a stream ----------------------------------------------------------------------------------------------


def read(*pieces, status=200, keep_text=True):
    """Feed piece i at time i + 1."""
    timeline = Timeline(index=0)
    stream = CompletionStream(timeline, keep_text=keep_text)
    for now, piece in enumerate(pieces, start=1):
        stream.feed(piece, float(now))
    stream.close(status)
    return timeline


def test_only_chunks_with_text_are_timed():
    t = read(delta(""), delta("Hi"), delta("!"), delta(None, "stop"), usage(5, 9), DONE)
    assert (t.chunks, t.end, t.completed) == ([2.0, 3.0], 4.0, True)
    assert (t.prompt_tokens, t.output_tokens, t.text) == (5, 9, "Hi!")


def test_events_may_be_cut_anywhere():
    whole = b": ping\r\n\r\nevent: message\n" + text("é") + text("b", "stop") + usage(1, 2) + DONE
    for cut in range(1, len(whole)):
        t = read(whole[:cut], whole[cut:])
        assert (t.text, t.completed, t.output_tokens) == ("éb", True, 2)


def test_reasoning_is_text():
    t = read(event(choices=[{"delta": {"reasoning_content": "hm"}}]), delta("so", "stop"))
    assert t.chunks == [1.0, 2.0]


def test_cached_tokens_are_read_from_usage():
    details = {"prompt_tokens": 8, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read(text("a", "stop"), event(choices=[], usage=details)).cached_tokens == 4


def test_an_empty_answer_is_an_answer():
    t = read(text("", "stop"), usage(3, 1), DONE)
    assert (t.completed, t.ttft, t.tpot) == (True, 1.0, None)


@pytest.mark.parametrize(
    ("pieces", "status", "reason"),
    [
        ((text("a"),), 200, "the stream broke off"),
        ((DONE,), 200, "no event with text came"),
        ((b'{"choices": []}',), 200, "no event with text came"),
        ((text("a"), event(error={"message": "worker lost"}), DONE), 200, "worker lost"),
        ((b"data: {oops\n\n",), 200, "a chunk is not what the OpenAI API sends"),
        ((b'{"error": {"message": "too\\nlong"}}',), 400, "HTTP 400: too long"),
        ((b'{"detail": "nope"}',), 404, "HTTP 404: nope"),
        ((b"<html>",), 502, "HTTP 502: <html>"),
        ((), 503, "HTTP 503: no body"),
    ],
)
def test_failures_say_why(pieces, status, reason):
    timeline = read(*pieces, status=status)
    assert not timeline.completed
    assert timeline.error.startswith(reason)


def test_done_after_text_ends_a_stream_without_finish_reason():
    assert read(text("a"), DONE).completed


# --- the whole run -------------------------------------------------------------------------------------------------

FAST = completed(0.0, [0.1, 0.2, 0.3], tokens=3, prompt_tokens=10)
SLOW = completed(0.0, [1.0, 3.0], tokens=5, prompt_tokens=20)
FAILED = Timeline(index=0, start=0.0, end=9.0, error="HTTP 500: no", chunks=[0.1])
CUT = Timeline(index=0, start=1.0, chunks=[2.0])


def test_summary_counts_what_completed():
    s = metrics.summary(a_run(FAST, SLOW, FAILED, CUT, interrupted=True), {})
    assert (s["completed"], s["failed"], s["cut_short"], s["interrupted"]) == (2, 1, 1, True)
    assert (s["total_input_tokens"], s["total_output_tokens"]) == (30, 8)
    assert s["request_throughput"] == pytest.approx(0.2)
    assert s["output_throughput"] == pytest.approx(0.8)
    assert s["total_token_throughput"] == pytest.approx(3.8)
    assert s["failures"] == {"HTTP 500: no": 1}
    assert s["request_goodput"] is None
    assert s["client_cpu_utilization"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        ({"ttft": 100}, 1),
        ({"ttft": 99}, 0),
        ({"ttft": 1000}, 2),
        ({"tpot": 400}, 1),
        ({"tpot": 500, "ttft": 1000}, 2),
        ({"e2el": 3000, "ttft": 500}, 1),
    ],
)
def test_goodput_needs_every_target_met(targets, good):
    s = metrics.summary(a_run(FAST, SLOW, FAILED), targets)
    assert s["request_goodput"] == pytest.approx(good / 10)
    assert s["slo_attainment"] == pytest.approx(good / 3)


def test_a_single_token_meets_any_tpot():
    assert metrics.meets(completed(0.0, [5.0], tokens=1), {"tpot": 0.0})


def test_statistics_are_in_milliseconds():
    s = metrics.statistics([0.1, 0.2, 0.3, 0.4], "ttft", [50, 99, 99.9])
    assert s == pytest.approx(
        {
            "mean_ttft_ms": 250,
            "median_ttft_ms": 250,
            "std_ttft_ms": math.sqrt(12500),
            "p50_ttft_ms": 250,
            "p99_ttft_ms": 397,
            "p99.9_ttft_ms": 399.7,
        }
    )


def test_nothing_measured_is_null_not_zero():
    assert metrics.statistics([], "tpot", [99]) == dict.fromkeys(
        ["mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p99_tpot_ms"]
    )


def test_samples_pool_gaps_and_skip_missing_tpots():
    one = completed(0.0, [2.0], tokens=1)
    assert metrics.samples([FAST, one], "itl") == pytest.approx([0.1, 0.1])
    assert metrics.samples([FAST, one], "tpot") == pytest.approx([0.1])
    assert metrics.samples([FAST, one], "e2el") == pytest.approx([0.3, 2.0])


def test_waiting_for_a_slot_is_kept_apart():
    t = completed(3.0, [4.0])
    t.dispatched = 1.0
    assert metrics.samples([t], "client_queue_time") == [2.0]
    assert metrics.samples([t], "e2el") == [1.0]
    assert metrics.samples([t], "e2el_including_client_queue") == [3.0]


def test_peaks():
    a = completed(0.0, [0.5, 0.9, 1.5], tokens=6)
    b = completed(1.5, [1.6], tokens=1)
    assert metrics.peak_concurrency([a, b]) == 1
    assert metrics.peak_concurrency([a, completed(1.0, [1.2]), completed(1.1, [3.0])]) == 3
    assert metrics.peak_output_rate([a, b]) == 4  # two chunks of two tokens in the first second
    assert metrics.peak_output_rate([]) == metrics.peak_concurrency([]) == 0


def test_categories_are_measured_apart():
    runs = [completed(0.0, [1.0, 2.0]), completed(0.0, [3.0, 4.0]), Timeline(index=2, error="no")]
    for i, t in enumerate(runs):
        t.index = i
    result = metrics.by_category(a_run(*runs), ["math", "qa", "math"], [50])
    assert (result["math"]["completed"], result["math"]["failed"]) == (1, 1)
    assert (result["math"]["mean_ttft_ms"], result["qa"]["mean_ttft_ms"]) == (1000, 3000)


# --- what users are warned of --------------------------------------------------------------------------------------


def warnings_of(run, options):
    return list(report.warnings(report.build_result(options, "m", run, [None], datetime(2030, 1, 1))))


def test_a_lagging_generator_is_reported(make_options):
    late = completed(0.0, [1.0], tokens=1)
    late.dispatched = 0.02
    late.start = 0.02
    (warning,) = warnings_of(a_run(late), make_options(request_rate=5.0))
    assert "fell behind its schedule (median 20.0 ms, max 20.0 ms)" in warning
    assert not warnings_of(a_run(completed(0.0, [1.0], tokens=1)), make_options(request_rate=5.0))


def test_the_commonest_failures_come_first(make_options):
    failed = [Timeline(index=0, error=f"reason {i}") for i in (*range(7), 3, 3)]
    lines = warnings_of(a_run(*failed), make_options())
    assert lines[0] == "3 failed: reason 3"
    assert len(lines) == 6
    assert "2 more reasons" in lines[-1]


def test_counting_by_chunks_is_said(make_options):
    (warning,) = warnings_of(a_run(completed(0.0, [1.0])), make_options())
    assert "without usage" in warning
