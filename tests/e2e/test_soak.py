"""A thousand requests, many of them dropped by the client somewhere: each ends once, and nothing is left or grows."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import Server, start

pytestmark = pytest.mark.e2e
NUM_REQUESTS = 1000
CONCURRENCY = 32


async def one(client: httpx.AsyncClient, rng: random.Random) -> str:
    body = {
        "model": "tiny",
        "prompt": "".join(rng.choices("abcdefgh ", k=rng.randrange(1, 150))),
        "max_tokens": rng.randrange(1, 60),
        "temperature": rng.choice([0, 1]),
        "ignore_eos": True,
        "stream": rng.random() < 0.7,
    }
    patience = rng.choice([None, None, 0.001, rng.random() * 0.3])
    read = rng.choice([None, rng.randrange(1, 20)])
    try:
        async with asyncio.timeout(patience), client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            count = 0
            async for _ in response.aiter_lines():
                count += 1
                if read is not None and count > read and body["stream"]:
                    return "left"
    except TimeoutError:
        return "gave up"
    return "done"


async def storm(url: str, count: int, seed: int) -> list[str]:
    rng, room = random.Random(seed), asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def bounded() -> str:
            async with room:
                return await one(client, rng)

        return await asyncio.gather(*(bounded() for _ in range(count)))


def total(metrics: str, name: str) -> float:
    return sum(float(m[1]) for m in re.finditer(rf"^{name}\{{.*\}} (\S+)$", metrics, re.MULTILINE))


async def settled(server: Server) -> str:
    """The metrics once no block is in use anywhere."""
    async with asyncio.timeout(30), httpx.AsyncClient() as client:
        while True:
            metrics = (await client.get(f"{server.url}/metrics")).text
            if not total(metrics, "vllm:kv_cache_usage_perc") and not total(metrics, "vllm:num_requests_running"):
                return metrics
            await asyncio.sleep(0.1)


def footprint(server: Server) -> tuple[int, int, int]:
    """Memory in MiB, descriptors and threads of gateway and workers."""
    replicas: list[psutil.Process] = [*server.replicas("gateway"), *server.replicas("worker")]
    return (
        sum(p.memory_info().rss for p in replicas) // 2**20,
        sum(p.num_fds() for p in replicas),
        sum(p.num_threads() for p in replicas),
    )


async def test_every_request_ends_once_and_nothing_grows(folder: Path) -> None:
    server = start(folder)
    try:
        await storm(server.url, 500, seed=0)  # first use of everything, and of memory that allocators keep
        before, memory = await settled(server), footprint(server)
        ends = await storm(server.url, NUM_REQUESTS, seed=1)
        after, memory_after = await settled(server), footprint(server)
    finally:
        server.stop()
    assert min(ends.count(kind) for kind in ("done", "left", "gave up")) > 50
    success = "vllm:request_success_total"
    ended = total(after, success) - total(before, success)
    # A client that gives up at once may be gone before its request is read, and is then none.
    assert NUM_REQUESTS - ends.count("gave up") <= ended <= NUM_REQUESTS
    assert memory_after[0] - memory[0] < 40
    assert memory_after[1] - memory[1] < 16
    assert memory_after[2] - memory[2] < 8
