"""A storm of requests, many of them dropped by the client somewhere, and what it leaves of a server."""

from __future__ import annotations

import asyncio
import random
import re

import httpx
import psutil

from tests.e2e.conftest import TIMEOUT_S, Server

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
    async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(timeout=TIMEOUT_S) as client:
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
