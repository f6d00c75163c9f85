"""The endpoints beside generation."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from scripted import MakeGateway

from core.types import Role
from core.wire import WorkerCounters, WorkerStatus
from gateway.protocol import parse


async def test_models_are_listed_under_every_name(gateway: MakeGateway) -> None:
    client = gateway().client
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(c["id"], c["object"], c["max_model_len"]) for c in cards] == [
        ("tiny", "model", 256),
        ("alias", "model", 256),
    ]
    assert (await client.get("/v1/models/alias")).json()["id"] == "alias"
    assert (await client.get("/v1/models/other/one")).json()["error"]["code"] == "model_not_found"


async def test_health_says_whether_a_request_would_be_served(gateway: MakeGateway) -> None:
    one = gateway()
    assert (await one.client.get("/health")).status_code == 200
    one.backend.ready = False
    for path in ("/health", "/ping"):
        response = await one.client.get(path)
        assert (response.status_code, response.json()["error"]["message"]) == (503, "not ready: no worker is alive")
    assert (await one.client.get("/-/healthz")).status_code == 200


async def test_version_is_the_packages(gateway: MakeGateway) -> None:
    assert (await gateway().client.get("/version")).json()["version"][0].isdigit()


async def test_tokenize_and_detokenize_are_inverse(gateway: MakeGateway) -> None:
    one = gateway()
    answer = (await one.post("/tokenize", prompt="hello 😀", return_token_strs=True)).json()
    assert answer["tokens"] == one.model.encode("hello 😀")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 256)
    assert len(answer["token_strs"]) == answer["count"]
    back = await one.post("/detokenize", tokens=answer["tokens"])
    assert back.json() == {"prompt": "hello 😀"}


async def test_tokenize_applies_the_chat_template(gateway: MakeGateway) -> None:
    one = gateway()
    answer = (await one.post("/tokenize", messages=[{"role": "user", "content": "hi"}])).json()
    await one.chat()
    assert answer["tokens"] == one.backend.requests[0].prompt_token_ids


async def test_tokenize_names_what_is_wrong(gateway: MakeGateway) -> None:
    one = gateway()
    for path, param, body in [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "prompt", {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", "tools", {"prompt": "a", "tools": []}),
        ("/detokenize", "tokens", {"tokens": [10**9]}),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "model", {"tokens": [], "model": "gpt-9"}),
    ]:
        response = await one.post(path, **body)
        assert response.status_code in (400, 404)
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "hello " * 1000, "return_token_strs": True}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hello"}] * 200}),
        ("/detokenize", {"tokens": [1] * 5000}),
    ],
)
async def test_long_texts_take_turns_in_a_thread_and_too_many_are_refused(
    gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    one = gateway(max_waiting_texts=2, retry_after_s=3)
    entered, go, running = threading.Semaphore(0), threading.Event(), []

    def held(*args: Any) -> Any:
        running.append(threading.current_thread())
        entered.release()
        go.wait(60)
        return parse(*args)

    monkeypatch.setattr("gateway.app.parse", held)
    waiting = [asyncio.create_task(one.post(path, **body)) for _ in range(2)]
    assert await asyncio.to_thread(entered.acquire, timeout=60)
    refused = await one.post(path, **body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    assert len(running) == 1
    go.set()
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
    assert threading.current_thread() not in running
    assert (await one.post("/tokenize", prompt="short")).status_code == 200


async def test_the_metrics_page_shows_gateway_and_workers(gateway: MakeGateway) -> None:
    one = gateway()
    worker = WorkerStatus(
        worker_id="w0",
        role=Role.DECODE,
        num_running=3,
        num_waiting=1,
        num_waiting_tokens=0,
        num_free_blocks=25,
        num_blocks=100,
        block_size=16,
        max_num_seqs=8,
        counters=WorkerCounters(prefix_cache_hits=11),
    )
    one.backend.workers = (worker,)
    await one.chat()
    response = await one.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for line in (
        'vllm:time_to_first_token_seconds_count{model_name="tiny",replica="g0",role="gateway"} 1.0',
        'vllm:request_success_total{finished_reason="length",model_name="tiny",replica="g0",role="gateway"} 1.0',
        'vllm:num_requests_running{model_name="tiny",replica="w0",role="decode"} 3.0',
        'vllm:kv_cache_usage_perc{model_name="tiny",replica="w0",role="decode"} 0.75',
        'vllm:prefix_cache_hits_total{model_name="tiny",replica="w0",role="decode"} 11.0',
    ):
        assert line in response.text.splitlines()
