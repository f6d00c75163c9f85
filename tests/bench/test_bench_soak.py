"""The soak: what it takes for a fault, and a few seconds of it against a real server."""

from __future__ import annotations

import gc
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from sse_server import DONE, Exchange, Server, event

from bench.cli import bench
from bench.soak.client import Outcome, judge
from bench.soak.mix import Job, Lengths, Mix
from bench.soak.probe import ProcessTree, Sample, check_roots, find_server, totals
from bench.soak.run import Soak, SoakOptions
from bench.soak.verdict import MIB, Settled, faults, growing_processes, growths, slope
from cluster.config.loading import load
from cluster.local import local_cluster
from core.errors import ConfigError
from core.metrics import GatewayMetrics
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.server import HttpServer
from gateway.tokenizer import ServedModel
from tests.e2e.conftest import save_tokenizer
from tests.loop_clock import loop_clock
from tests.tiny import save_tiny_llama

# --- growth ----------------------------------------------------------------------------------------------------------


@given(
    per_minute=st.floats(-50, 50),
    start=st.floats(0, 1e4),
    wild=st.lists(st.integers(0, 99), max_size=20, unique=True),
    seed=st.integers(0, 99),
)
def test_the_slope_is_that_of_most_points_whatever_a_fifth_of_them_say(
    per_minute: float, start: float, wild: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    times = [i / 10 for i in range(100)]
    values = [start + per_minute * t + rng.uniform(-0.1, 0.1) for t in times]
    for index in wild:
        values[index] = rng.uniform(-1e6, 1e6)
    assert slope(times, values) == pytest.approx(per_minute, abs=0.6 + 0.5 * abs(per_minute))


def samples(own: list[float], fds: list[int] | None = None) -> list[Sample]:
    """One a minute; memory in MiB."""
    fds = fds or [50] * len(own)
    return [Sample(float(i), int(m * MIB), 0, f, 9, 3) for i, (m, f) in enumerate(zip(own, fds, strict=True))]


def grown(found: list[Sample], warm_up: float = 4) -> list[str]:
    return [g.name for g in growths(found, warm_up, limit_mib=1.0) if g.grew]


def test_what_grows_after_the_warm_up_is_named() -> None:
    filling = [100.0 + 50 * i for i in range(4)]
    assert grown(samples([*filling, *[250.0] * 16])) == []
    assert grown(samples([*filling, *[250 + 1.5 * i for i in range(16)]])) == ["own memory, MiB"]
    assert grown(samples([250.0] * 20, [40 + i for i in range(20)])) == ["descriptors"]


def test_a_single_descriptor_or_a_slow_drift_is_no_growth() -> None:
    assert grown(samples([250 + 0.5 * i for i in range(20)], [40 + (i > 5) for i in range(20)])) == []
    assert grown(samples([250.0, 252.0, 254.0]), warm_up=0) == []  # two a minute, but four in all


def test_the_processes_that_grow_most_come_first() -> None:
    own = {i: [(float(t), int(i * t * MIB)) for t in range(10)] for i in range(8)}
    tree = ProcessTree([], own, dict.fromkeys(own, "worker"))
    assert growing_processes(tree, 2) == {f"worker {i}": pytest.approx(i) for i in (7, 6, 5, 4, 3)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"outcomes": {Outcome.DONE: 5, Outcome.LOST: 1}}, "1 requests lost"),
        ({"outcomes": {Outcome.DONE: 5, Outcome.DOUBLED: 2}}, "2 requests doubled"),
        ({"outcomes": {Outcome.REFUSED: 5}}, "no request was answered"),
        ({"settled": Settled(0.25, 0)}, "KV blocks in use after the end: 25.0% of a cache, summed over the workers"),
        ({"settled": Settled(0, 2)}, "2 requests still run or wait after the end"),
        ({"ended": (4.0, 5, 7)}, "the server counts 4 ended sequences, where 5 to 7 were sent"),
        ({"ended": (8.0, 5, 7)}, "the server counts 8 ended sequences, where 5 to 7 were sent"),
        ({"why_stopped": "interrupted"}, "interrupted"),
    ],
)
def test_every_fault_is_a_line_of_the_verdict(change: dict[str, Any], reason: str) -> None:
    fine: dict[str, Any] = {
        "outcomes": {Outcome.DONE: 5, Outcome.LEFT: 2, Outcome.REFUSED: 1},
        "grown": [],
        "settled": Settled(0, 0),
        "ended": (6.0, 5, 7),
        "why_stopped": None,
    }
    assert faults(**fine) == []
    assert faults(**(fine | change)) == [reason]


# --- one answer ------------------------------------------------------------------------------------------------------


def piece(tokens: int, finish: str | None = None, index: int = 0) -> bytes:
    return event(choices=[{"index": index, "text": "x", "token_ids": [5] * tokens, "finish_reason": finish}])


def used(tokens: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": tokens})


JOB = Job("/v1/completions", b"", max_tokens=3, stream=True)
TWO = Job("/v1/completions", b"", max_tokens=3, stream=True, num_choices=2)
BAD = Job("/v1/completions", b"", bad=True)


@pytest.mark.parametrize(
    ("job", "status", "parts", "outcome"),
    [
        (JOB, 200, [piece(1), piece(2, "length"), used(3), DONE], Outcome.DONE),
        (TWO, 200, [piece(3, "length", 1), piece(3, "length"), used(6), DONE], Outcome.DONE),
        (JOB, 200, [piece(1), piece(2, "length"), used(3)], Outcome.LOST),
        (JOB, 200, [piece(1), piece(2), used(3), DONE], Outcome.LOST),
        (JOB, 200, [piece(1), piece(1, "length"), used(3), DONE], Outcome.LOST),
        (JOB, 200, [piece(3, "length"), used(2), DONE], Outcome.LOST),
        (JOB, 200, [piece(3, "length"), DONE], Outcome.LOST),
        (TWO, 200, [piece(3, "length"), used(6), DONE], Outcome.LOST),
        (JOB, 200, [b"data: {broken\n\n", DONE], Outcome.LOST),
        (JOB, 200, [piece(4, "length"), used(4), DONE], Outcome.DOUBLED),
        (JOB, 200, [piece(3, "length"), piece(1), used(3), DONE], Outcome.DOUBLED),
        (JOB, 200, [piece(3, "length"), piece(0, "length"), used(3), DONE], Outcome.DOUBLED),
        (JOB, 200, [piece(1), event(error={"message": "no"}), DONE], Outcome.FAILED),
        (JOB, 503, [b"busy"], Outcome.FAILED),
        (BAD, 400, [b"{}"], Outcome.REFUSED),
        (BAD, 404, [b"{}"], Outcome.REFUSED),
        (BAD, 200, [b"{}"], Outcome.FAILED),
        (BAD, 500, [b"{}"], Outcome.FAILED),
    ],
)
def test_an_answer_is_judged_to_the_token(job: Job, status: int, parts: list[bytes], outcome: Outcome) -> None:
    assert judge(job, status, b"".join(parts)).outcome is outcome


@pytest.mark.parametrize(("tokens", "outcome"), [(3, Outcome.DONE), (2, Outcome.LOST), (4, Outcome.DOUBLED)])
def test_a_whole_answer_is_judged_alike(tokens: int, outcome: Outcome) -> None:
    job = Job("/v1/completions", b"", max_tokens=3)
    choice = {"index": 0, "finish_reason": "length", "token_ids": [1] * tokens}
    answer = json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()
    assert judge(job, 200, answer).outcome is outcome


def test_the_mix_has_everything_and_can_be_repeated() -> None:
    lengths = Lengths(input_tokens=400, output_tokens=60, tokens_per_word=2.0)
    jobs = [mix.next() for mix in [Mix("m", lengths, seed=3)] for _ in range(3000)]
    again = Mix("m", lengths, seed=3)
    assert jobs == [again.next() for _ in range(3000)]
    kinds = Counter(
        "bad" if j.bad else "leaves" if (j.leave_events, j.leave_s) != (None, None) else "stays" for j in jobs
    )
    assert 200 < kinds["bad"] < 400
    assert 400 < kinds["leaves"] < 700
    good = [json.loads(j.body) for j in jobs if not j.bad]
    assert {b.get("priority") for b in good} == {None, -2, -1, 0, 1, 2}
    assert {b["n"] for b in good} == {1, 2}
    prompts = [b.get("prompt") or b["messages"][0]["content"] for b in good]
    assert max(len(p.split()) for p in prompts) <= 200
    assert max(b["max_tokens"] for b in good) == 60


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--pid 999999999: there is no such process"):
        check_roots([999_999_999])


def test_the_server_is_found_by_its_port(server: Server) -> None:
    (pid,) = find_server(server.url)
    assert ProcessTree([pid]).sample(0.0).processes >= 1
    assert find_server("http://192.0.2.1:80") == []


def test_memory_descriptors_and_threads_are_those_of_the_process() -> None:
    tree = ProcessTree([os.getpid()])
    gc.collect()  # what other tests have left
    before = tree.sample(0.0)
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(open(os.devnull))
        held = bytearray(b"x") * (64 * MIB)
        after = tree.sample(1.0)
    assert after.own - before.own > 0.9 * len(held)
    assert after.fds - before.fds >= 30
    assert after.threads >= 1


def test_a_metrics_page_is_summed_over_its_labels() -> None:
    page = '# TYPE vllm:x counter\nvllm:x_total{a="1"} 2\nvllm:x_total{a="2"} 3\n# TYPE y gauge\ny 0.5\n'
    assert totals(page) == {"vllm:x_total": 5.0, "y": 0.5}


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"colocated": True, "kv_cache_memory": "384KiB", "max_num_seqs": 16}])
async def test_some_seconds_of_load_lose_nothing(folder: Path, settings: dict[str, Any]) -> None:
    config = load(None, {"dtype": "float32", "kv_cache_memory": "4MiB"} | settings)
    async with loop_clock("bench.soak.run"), local_cluster(config, folder) as cluster:
        model = ServedModel.load(folder, ["tiny"], max_model_len=256)
        metrics = GatewayMetrics(CollectorRegistry(), model_name="tiny")
        server = HttpServer(create_app(cluster.backend, model, GatewayConfig(), metrics), "127.0.0.1", 0)
        host, port = await server.start()
        options = SoakOptions(
            base_url=f"http://{host}:{port}",
            minutes=4 / 60,
            warm_up=1 / 60,
            concurrency=12,
            input_tokens=100,
            output_tokens=40,
            request_timeout_s=60,
            seed=0,
            pids=(os.getpid(),),
            max_growth_mib=10_000,
        )
        report = await Soak(options, lambda _: None).run()
        await server.stop(5)
    # what opens and closes within seconds may look like growth on a busy machine
    assert report["reasons"] == [told for told in report["growth_text"] if "GROWS" in told], report
    assert set(report["requests"]) >= {"done", "left", "left unanswered", "refused"}
    assert report["ended_by_server"] is not None
    assert report["after"] == {"kv_usage": 0.0, "requests": 0.0}
    assert len(report["samples"]) > 10
    assert report["growth"][0]["last"] > 10


def run(*flags: str) -> Any:
    return CliRunner().invoke(bench, ["soak", *flags])


def answering(exchange: Exchange, tokens: int) -> None:
    """As asked, but with so many tokens."""
    if exchange.body.get("stream"):
        exchange.stream(piece(tokens, "length"), used(tokens), DONE)
    else:
        choice = {"index": 0, "finish_reason": "length", "token_ids": [1] * tokens}
        usage = {"completion_tokens": tokens, "prompt_tokens": 40}
        exchange.reply(200, {"choices": [choice], "usage": usage})


def test_a_server_that_loses_tokens_fails_the_soak(server: Server) -> None:
    async def script(exchange: Exchange) -> None:
        asked = exchange.body.get("max_tokens")
        answering(exchange, asked if exchange.number % 3 and asked in range(200) else 0)

    server.script = script
    result = run("--url", server.url, "--minutes", "5", "--concurrency", "4", "--max-growth", "10000")
    assert result.exit_code == 1, result.output
    assert "given up after 100 faults" in result.output
    assert "requests lost" in result.output
    assert "requests failed" in result.output  # bad requests got an answer
    assert "fault: " in result.output


def test_bad_flags_and_absent_servers_are_one_line() -> None:
    absent = run("--url", "http://127.0.0.1:9", "--minutes", "1")
    assert absent.exit_code == 1
    assert "no OpenAI server answers there" in absent.output
    warm = run("--minutes", "1", "--warm-up", "2")
    assert (warm.exit_code, "--warm-up 2 is not below --minutes 1" in warm.output) == (2, True)
    assert run("--minutes", "0").exit_code == 2
