"""`slipstream serve --replan on`: workers are given up and added while requests run, and none of these is lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from placement.latency import Coefficients, StepLatency
from placement.profile import write_profile
from tests.e2e.conftest import TIMEOUT_S, Server, assert_drained, served
from tests.placement.profiles import profile

pytestmark = pytest.mark.e2e

SLOW = StepLatency(Coefficients(10.0, 0.1, 0.0), Coefficients(40.0, 0.0, 8.0), Coefficients(400.0, 0.0, 8.0), 100)
"""The tiny model is several times as fast, so nobody misses a target: what happens is what the forecast asks for, with
this profile or, once it is corrected as far as can be, with steps half as long."""
OUTPUT = 10
MANY, FEW = 24.0, 5.0
"""Requests per second. Even with steps half as long one worker decodes about twenty, so the former takes two; the
latter takes one even by the profile as it is, which decodes about eight. More than two are not asked for: where there
are two cores, a forecast knows that a third worker would take turns with them."""
PATIENCE_S = 180.0


class Load:
    """Requests at a rate that can be changed."""

    def __init__(self, url: str) -> None:
        self.rate = FEW
        self.statuses: Counter[int | str] = Counter()
        self._client = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=100))
        self._under_way: set[asyncio.Task[None]] = set()
        self._number = 0

    async def go_on(self) -> None:
        while True:
            task = asyncio.create_task(self._ask())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            await asyncio.sleep(1 / self.rate)

    async def _ask(self) -> None:
        self._number += 1
        body = {"model": "tiny", "prompt": f"request {self._number}", "max_tokens": OUTPUT, "ignore_eos": True}
        try:
            answer = await self._client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return
        usage = answer.json().get("usage", {})
        complete = answer.status_code == 200 and usage.get("completion_tokens") == OUTPUT
        self.statuses[200 if complete else f"{answer.status_code} {answer.text}"] += 1

    async def end(self) -> None:
        await asyncio.gather(*self._under_way)
        await self._client.aclose()


@asynccontextmanager
async def under_load(url: str) -> AsyncIterator[Load]:
    load = Load(url)
    going_on = asyncio.create_task(load.go_on())
    try:
        yield load
    finally:
        going_on.cancel()
        await load.end()


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        await asyncio.sleep(0.2)


def shown(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/replanning", timeout=TIMEOUT_S).json()
    return found


def plan_in_metrics(server: Server) -> int:
    series = 'slipstream:plan_id{model_name="tiny",replica="0",role="gateway"} '
    (value,) = (line.removeprefix(series) for line in server.metrics().splitlines() if line.startswith(series))
    return int(float(value))


def said(server: Server) -> list[str]:
    """Of its decisions, to whoever started it: known once it has ended."""
    prefix = "replanning: "
    return [line.removeprefix(prefix).strip() for line in server.output if line.startswith(prefix)]


async def one_worker_left(server: Server) -> None:
    await until(lambda: len(server.roles) == 1, "doing with one worker")
    await until(lambda: len(server.replicas("worker")) == 1, "the end of the other")


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Path:
    """A profile of workers that decode slowly."""
    found = profile(SLOW)
    facts = replace(found.model, name=str(folder), dtype="float32", weight_bytes=10**6, kv_token_bytes=768)
    path = tmp_path / "profile.json"
    write_profile(replace(found, model=facts), path)
    return path


async def test_workers_are_given_up_and_added_as_traffic_grows_and_falls_and_no_request_is_lost(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    log = tmp_path / "traffic.jsonl"
    flags = {
        "replan": "on",
        "replan-profile": made,
        "replan-slo": "ttft=2000,tpot=150",
        "replan-max-workers": 2,
        "replan-interval": 0.3,
        "replan-horizon": 600,
        "cpus-per-worker": 0.5,
        "traffic-log": log,
    }
    with served(folder, *(f"--{name}={value}" for name, value in flags.items())) as server:
        async with under_load(server.url) as load:
            await until(lambda: len(server.roles) == 2, "metrics of both workers")
            await one_worker_left(server)
            load.rate = MANY
            await until(lambda: len(server.roles) == 2, "a second worker")
            assert len(server.replicas("worker")) == 2
            await until(lambda: shown(server)["correction"]["decodes"] < 1, "a correction of the profile")
            load.rate = FEW
            await one_worker_left(server)
            await until(lambda: shown(server)["plan_id"] >= 3, "showing the last change")  # it is a second old
            status = shown(server)
            await until(lambda: plan_in_metrics(server) == shown(server)["plan_id"], "metrics of the plan")
        assert set(load.statuses) == {200}, load.statuses
        assert status["mode"] == "on"
        assert status["plan_id"] == len(status["decisions"]) >= 3
        assert all(decided["carried_out"] for decided in status["decisions"])
        await until(lambda: len(log.read_bytes().splitlines()) >= load.statuses[200], "a log of all requests")
        assert_drained(server, signal.SIGTERM)
    assert said(server) == [f"changing to {decided['to']}: {decided['why']}" for decided in status["decisions"]]
    assert status["arrangement"] == status["decisions"][-1]["to"]
