"""The HTTP client and the load it offers, against a scripted server."""

import asyncio
import gc
import socket
import threading

import pytest
from sse_server import DONE, text, three_words, usage

from bench.serving.client import Client, payload
from bench.serving.datasets import Prompt
from bench.serving.http import HttpClient
from bench.serving.load import _quiet_gc, offer
from bench.serving.timeline import Timeline
from core.errors import ConfigError


def run_requests(url, offsets, *, timeout=60.0, keep_text=True, **how):
    """Offer one request for each offset."""

    async def main():
        http = HttpClient(f"{url}/v1/completions", {"x-test": "yes"})
        try:
            requests = [http.request(b'{"stream": true}', f"r{i}") for i in range(len(offsets))]
            return await offer(Client(http, timeout, keep_text), requests, offsets, **how)
        finally:
            http.close()

    return asyncio.run(main())


def one(url, **how):
    (timeline,) = run_requests(url, [0.0], **how).timelines
    return timeline


# --- one exchange --------------------------------------------------------------------------------------------------


def test_a_streamed_answer_is_timed(server):
    timeline = one(server.url)
    assert timeline.completed
    assert (timeline.text, timeline.prompt_tokens, timeline.output_tokens) == ("a b c", 7, 3)
    assert timeline.start <= timeline.chunks[0] <= timeline.chunks[-1] == timeline.end


def test_headers_and_request_ids_are_sent(server):
    one(server.url)
    (exchange,) = server.exchanges
    assert (exchange.headers["x-test"], exchange.headers["x-request-id"]) == ("yes", "r0")
    assert (exchange.path, exchange.body) == ("/v1/completions", {"stream": True})


def test_text_is_kept_only_when_asked(server):
    assert one(server.url, keep_text=False).text == ""


def test_connections_are_reused(server):
    run = run_requests(server.url, [0.0] * 6, max_concurrency=2)
    assert all(t.completed for t in run.timelines)
    assert server.connections == 2


def test_a_connection_closed_while_idle_is_replaced(server):
    async def closes_afterwards(exchange):
        await three_words(exchange)
        if exchange.number == 0:
            exchange.writer.close()

    server.script = closes_afterwards
    run = run_requests(server.url, [0.0] * 3, max_concurrency=1)
    assert [t.error for t in run.timelines] == [None] * 3


def test_a_body_may_end_with_the_connection(server):
    async def until_close(exchange):
        exchange.writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + text("a") + text("b", "stop") + usage(1, 2) + DONE)
        exchange.writer.close()

    server.script = until_close
    assert one(server.url).text == "ab"


async def refuse(exchange):
    exchange.reply(429, {"error": {"message": "queue is full"}})


async def hang_up(exchange):
    exchange.writer.close()


async def hang_up_midway(exchange):
    exchange.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = text("a")
    exchange.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    exchange.writer.close()


async def babble(exchange):
    exchange.writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")


async def never_answer(exchange):
    await exchange.gone()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (refuse, "HTTP 429: queue is full"),
        (hang_up, "the server closed the connection"),
        (hang_up_midway, "the server closed the connection"),
        (babble, "the answer is not HTTP"),
    ],
)
def test_failures_are_recorded_with_their_reason(server, script, reason):
    server.script = script
    timeline = one(server.url)
    assert not timeline.completed
    assert timeline.error.startswith(reason)
    assert timeline.end >= timeline.start


def test_a_request_that_takes_too_long_fails(server):
    server.script = never_answer
    assert one(server.url, timeout=0.05).error == "no end within --request-timeout 0.05 s"


def test_a_refused_connection_is_a_failure():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # so that nobody else gets it
        assert "Connect call failed" in one(f"http://127.0.0.1:{silent.getsockname()[1]}").error


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", "http://"])
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match="--base-url"):
        HttpClient(url, {})


# --- the load ------------------------------------------------------------------------------------------------------


def test_arrivals_do_not_wait_for_answers(server):
    everyone = asyncio.Event()

    async def only_when_all_are_here(exchange):
        if exchange.number == 9:
            everyone.set()
        await everyone.wait()
        await three_words(exchange)

    server.script = only_when_all_are_here
    run = run_requests(server.url, [i / 1000 for i in range(10)], timeout=60.0)
    assert all(t.completed for t in run.timelines)


def test_max_concurrency_is_kept_and_waiting_is_measured(server):
    run = run_requests(server.url, [0.0] * 12, max_concurrency=3)
    assert server.most_in_flight <= 3
    assert len(server.exchanges) == 12
    assert max(t.client_queue_time for t in run.timelines) > 0
    assert all(t.latency <= t.end - t.dispatched for t in run.timelines)


def test_requests_leave_at_absolute_times(server):
    offsets = [0.0, 0.004, 0.008, 0.05]
    run = run_requests(server.url, offsets)
    assert [t.scheduled - run.began for t in run.timelines] == pytest.approx(offsets)
    assert all(t.dispatched >= t.scheduled for t in run.timelines)


def test_the_collector_leaves_alone_what_is_there_for_as_long_as_load_is_offered():
    gc.unfreeze()
    try:
        with _quiet_gc():
            assert gc.get_freeze_count()
        assert not gc.get_freeze_count()
    finally:
        gc.freeze()  # as tests/conftest.py has it
    with _quiet_gc():
        pass
    assert gc.get_freeze_count()


def test_stopping_hangs_up_and_keeps_what_was_measured(server):
    stopped = threading.Event()

    async def main():
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        async def stop_at_the_third(exchange):
            if exchange.number < 2:
                await three_words(exchange)
            else:
                loop.call_soon_threadsafe(stop.set)
                await exchange.gone()
                stopped.set()

        server.script = stop_at_the_third
        http = HttpClient(f"{server.url}/v1/completions", {})
        requests = [http.request(b"{}", str(i)) for i in range(4)]
        run = await offer(Client(http, 30.0, False), requests, [0.0] * 4, max_concurrency=1, stop=stop)
        http.close()
        return run

    run = asyncio.run(main())
    assert run.interrupted
    assert [t.completed for t in run.timelines] == [True, True, False, False]
    assert [t.error for t in run.timelines] == [None] * 4
    assert stopped.wait(60)


# --- what is asked -------------------------------------------------------------------------------------------------


def test_completions_payload(make_options):
    options = make_options("--temperature", "0", "--top-k", "5", "--extra-body", '{"min_p": 0.1, "top_k": 7}')
    assert payload(options, "m", Prompt([1, 2], 9)) == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "min_p": 0.1,
        "top_k": 7,
    }


def test_chat_payload(make_options):
    options = make_options("--backend", "openai-chat", "--no-ignore-eos")
    assert payload(options, "m", Prompt("hi", 9)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_timeline_starts_with_nothing_known():
    assert not Timeline(index=0).completed
