"""`slipstream serve`, from the checklist to Ctrl-C."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import TIMEOUT_S, Server, start
from tests.e2e.storm import footprint, settled, storm, total

pytestmark = pytest.mark.e2e
RECOVERY_S = 120.0
LOOK_S = 0.05
STORM = 1000
"""Requests."""


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


def complete(server: Server, prompt: str = "hello there", max_tokens: int = 12) -> str:
    with client(server) as api:
        return api.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0).choices[0].text


def healthy(server: Server) -> bool:
    return httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200


def wait_until(condition: Callable[[], bool], seconds: float = RECOVERY_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(LOOK_S)


def gauge(server: Server, name: str) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in server.metrics().splitlines() if line.startswith(name + "{")]


def idle(server: Server) -> bool:
    return not any(gauge(server, "vllm:kv_cache_usage_perc")) and not any(gauge(server, "vllm:num_requests_running"))


def test_the_checklist_says_what_was_started_and_where(server: Server) -> None:
    text = "".join(server.output)
    for step in ("model", "ray", "worker-tp1-pp1", "gateway", "1 prefill, 1 decode"):
        assert step in text


def test_prefill_and_decode_run_in_processes_of_their_own(server: Server) -> None:
    complete(server)
    assert len(server.replicas("worker")) == 2
    assert server.roles == ["decode", "prefill"]
    wait_until(lambda: sum(gauge(server, "slipstream:handoff_bytes_total")) > 0)  # told by a heartbeat


def test_the_openai_client_streams_what_it_gets_in_one_piece(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with client(server) as api:
        whole = api.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
        stream = api.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"no_such_thing": 1}, "no_such_thing"),
    ],
)
def test_bad_input_is_answered_with_the_parameter_and_leaks_nothing(
    server: Server, body: dict[str, object], param: str
) -> None:
    asked = {"model": "tiny", "prompt": "a"} | body
    response = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=TIMEOUT_S)
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["param"] == param
    wait_until(lambda: idle(server))


def test_a_client_that_disconnects_frees_its_blocks_within_a_second(server: Server) -> None:
    body = {"model": "tiny", "prompt": "a b c", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        next(response.iter_lines())
    looks: list[bool] = []
    wait_until(lambda: looks.append(idle(server)) or looks[-1])
    # A second, and a heartbeat until the metrics say so: told in looks, as on a machine that stands still now and then
    # who looks stands still too.
    assert len(looks) * LOOK_S < 1.5


async def test_of_a_storm_every_request_ends_once_and_nothing_grows(server: Server) -> None:
    await storm(server.url, 500, seed=0)  # first use of everything, and of memory that allocators keep
    before, memory = await settled(server), footprint(server)
    ends = await storm(server.url, STORM, seed=1)
    after, memory_after = await settled(server), footprint(server)
    assert min(ends.count(kind) for kind in ("done", "left", "gave up")) > 50
    success = "vllm:request_success_total"
    ended = total(after, success) - total(before, success)
    # A client that gives up at once may be gone before its request is read, and is then none.
    assert STORM - ends.count("gave up") <= ended <= STORM
    assert memory_after[0] - memory[0] < 40
    assert memory_after[1] - memory[1] < 16
    assert memory_after[2] - memory[2] < 8


def test_killed_workers_are_replaced_and_no_request_is_lost(server: Server) -> None:
    want = complete(server)
    for index in range(2):
        victim = server.replicas("worker")[index]
        victim.kill()
        assert complete(server) == want  # by whoever is alive
        wait_until(lambda gone=victim: not gone.is_running() and len(server.replicas("worker")) == 2)
        wait_until(lambda: server.roles == ["decode", "prefill"])
    assert healthy(server)
    assert complete(server) == want


def test_a_taken_port_is_one_clear_line(server: Server, folder: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    with pytest.raises(AssertionError) as caught:
        start(folder, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_ctrl_c_leaves_nothing_behind(server: Server) -> None:
    processes = server.tree
    session = next(Path(a.split("=", 1)[1]) for p in processes for a in p.cmdline() if a.startswith("--session-dir="))
    assert server.stop() == 0
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert [p.cmdline() for p in alive] == []
    assert not session.parent.exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
