"""Over a real socket: disconnects, shutdown, the openai client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from scripted import Gateway, MakeGateway, Script, chat_text, fails, hangs, says

from core.errors import ConfigError, WorkerLost
from core.types import Request, TokenDelta, TokenLogprobs
from gateway.server import HttpServer
from gateway.tokenizer import ServedModel

TIMEOUT_S = 60.0
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def serving(one: Gateway, grace_s: float = 0.0) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(one.app)
    host, port = await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=TIMEOUT_S) as client:
            yield client
    finally:
        await server.stop(grace_s)


async def started(one: Gateway, count: int = 1) -> None:
    """Until `count` requests have reached the backend."""
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(count):
            await one.backend.arrivals.acquire()


async def test_a_stream_that_the_client_leaves_is_cancelled(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(hangs(after=model.encode("hello")))
    async with serving(one) as client:
        async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            await anext(response.aiter_lines())
            assert one.backend.open == 1
        async with asyncio.timeout(TIMEOUT_S):
            await one.backend.all_closed.wait()
            await one.app.state.admission.idle()
    assert one.ends() == {"abort": 1}


@pytest.mark.parametrize("body", [{"n": 3}, {"stream": True}, {}])
async def test_a_client_that_leaves_before_the_first_token_is_noticed(
    gateway: MakeGateway, body: dict[str, Any]
) -> None:
    one = gateway(hangs(after=[]))
    async with serving(one) as client:
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, **body}))
        await started(one, body.get("n", 1))
        waiting.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            await one.backend.all_closed.wait()
            await one.app.state.admission.idle()
    assert one.ends() == {"abort": body.get("n", 1)}


async def test_more_than_the_places_is_refused_at_once(gateway: MakeGateway) -> None:
    one = gateway(hangs(after=[]), max_concurrent_requests=2, max_choices=2, retry_after_s=1.5)
    async with serving(one) as client:
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await started(one)
        refused = await client.post("/v1/chat/completions", json={**CHAT, "n": 2})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.json()["error"]["code"] == "overloaded"
        assert one.sample("slipstream:requests_refused_total", error="overloaded") == 1
        waiting.cancel()


def opens_gate(tokens: list[int], gate: asyncio.Event) -> Script:
    """Emits the first token, and the others once `gate` is set."""
    play = says(tokens)

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        async for delta in play(request):
            yield delta
            await gate.wait()

    return script


async def test_running_streams_finish_within_the_grace(gateway: MakeGateway, model: ServedModel) -> None:
    gate = asyncio.Event()
    one = gateway(opens_gate(model.encode("hello world"), gate))
    server = HttpServer(one.app)
    host, port = await server.start()
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=TIMEOUT_S) as client:
        running = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        await started(one)
        stopping = asyncio.create_task(server.stop(grace_s=TIMEOUT_S))
        await asyncio.sleep(0)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        gate.set()
        assert (await running).text.endswith("data: [DONE]\n\n")
        await stopping
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(f"http://{host}:{port}/health")
    assert one.ends() == {"length": 1}


async def test_what_outlives_the_grace_ends_with_an_error(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(hangs(after=model.encode("hello")))
    server = HttpServer(one.app)
    host, port = await server.start()
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=TIMEOUT_S) as client:
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            await started(one, 2)
            stopping = asyncio.create_task(server.stop(grace_s=0.01))
            lines = [line async for line in response.aiter_lines() if line]
        await stopping
        assert (await whole).status_code == 503
    assert "service_unavailable" in lines[-2]
    assert lines[-1] == "data: [DONE]"


def bursts(tokens: list[int]) -> Script:
    """Emits far more at once than the buffers of a socket hold, then nothing."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        logprobs = [TokenLogprobs(-1.0, [(i, -1.0) for i in range(20)])] * len(tokens)
        yield TokenDelta(request_id=request.request_id, index=0, token_ids=tokens, logprobs=logprobs)
        await asyncio.Event().wait()

    return script


async def test_a_client_that_does_not_read_cannot_hold_up_the_end(
    gateway: MakeGateway, model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.exchange.FAREWELL_S", 0.01)
    monkeypatch.setattr("gateway.server.CLOSE_S", 0)
    one = gateway(bursts([1] * 10_000))
    server = HttpServer(one.app)
    body = json.dumps({**CHAT, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    reader, writer = await asyncio.open_connection(*await server.start(), limit=1)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    await reader.readexactly(1)
    async with asyncio.timeout(TIMEOUT_S):
        await server.stop(0.01)
        await one.backend.all_closed.wait()
        received = await reader.read()
    assert b"[DONE]" not in received
    assert one.ends() == {"abort": 1}
    assert "the client does not read" in caplog.text
    writer.close()


async def test_a_taken_port_is_one_clear_line(gateway: MakeGateway) -> None:
    first = HttpServer(gateway().app)
    host, port = await first.start()
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: the port is in use; choose another"):
        await HttpServer(gateway().app, host, port).start()
    await first.stop(0)
    again = HttpServer(gateway().app, host, port)
    assert await again.start() == (host, port)
    await again.stop(0)


async def test_an_address_of_another_machine_is_refused(gateway: MakeGateway) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await HttpServer(gateway().app, "192.0.2.1").start()


async def test_stop_leaves_no_task_behind(gateway: MakeGateway) -> None:
    before = asyncio.all_tasks()
    async with serving(gateway()) as client:
        await client.post("/v1/chat/completions", json=CHAT)
    assert asyncio.all_tasks() == before


async def test_a_body_of_ten_megabytes_is_refused_over_the_wire(gateway: MakeGateway) -> None:
    async with serving(gateway()) as client:
        response = await client.post("/v1/chat/completions", content=b"x" * 10_000_000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


# --- the openai client -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def openai_client(one: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(one) as http,
        openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_the_openai_client_reads_answers(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(says(model.encode("hello 😀"), cached=4))
    async with openai_client(one) as client:
        chat = await client.chat.completions.create(model="tiny", messages=CHAT["messages"], max_tokens=9)
        text = await client.completions.create(model="tiny", prompt="hi")
        assert [m.id for m in (await client.models.list()).data] == ["tiny", "alias"]
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("hello 😀", "length")
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 4
    assert text.choices[0].text == "hello 😀"


async def test_the_openai_client_reads_streams(gateway: MakeGateway) -> None:
    async with openai_client(gateway()) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=CHAT["messages"], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk.model_dump() async for chunk in stream]
    assert chat_text(chunks) == "hello world"
    assert chunks[-1]["usage"]["completion_tokens"] > 0


async def test_the_openai_client_raises_its_own_errors(gateway: MakeGateway) -> None:
    async with openai_client(gateway()) as client:
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            await client.chat.completions.create(model="gpt-9", messages=CHAT["messages"])
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=CHAT["messages"], max_tokens=10_000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


async def test_the_openai_client_sees_an_error_in_a_stream(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(fails(WorkerLost("worker w1 died"), after=model.encode("hello")))
    async with openai_client(one) as client:
        stream = await client.chat.completions.create(model="tiny", messages=CHAT["messages"], stream=True)
        with pytest.raises(openai.APIError, match="worker w1 died"):
            async for _ in stream:
                pass
