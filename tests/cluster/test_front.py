"""The gateway's process without Ray: when it begins to listen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import LlamaForCausalLM

from cluster import front
from cluster.client import ClusterBackend, ListMembers
from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.front import ALL_ADDRESSES, Front
from cluster.local import local_cluster
from cluster.membership import Member
from cluster.routes import Routes
from core.types import FinishReason
from tests.e2e.conftest import save_tokenizer

TIMEOUT_S = 60.0
CONFIG = load(None, {"dtype": "float32", "kv_cache_memory": "4MiB", "port": 0, "colocated": True})


@asynccontextmanager
async def gateway(
    folder: Path, list_members: ListMembers, config: SlipstreamConfig = CONFIG, **given: str
) -> AsyncIterator[Front]:
    save_tokenizer(folder)
    started = Front(config, folder, ClusterBackend(list_members, routes=Routes.of(config)), **given)
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


async def health(url: str) -> int:
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        return (await client.get(f"{url}/health")).status_code


async def test_a_gateway_that_joins_a_cluster_listens_when_it_knows_a_worker(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "ACQUAINTANCE_S", TIMEOUT_S)
    async with local_cluster(CONFIG, tiny[1]) as cluster, gateway(tiny[1], cluster._list_members) as joined:
        assert await health(joined.url) == 200


async def test_without_workers_a_gateway_listens_all_the_same_and_says_so(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "ACQUAINTANCE_S", 0.1)
    async with asyncio.timeout(TIMEOUT_S), gateway(tiny[1], nobody) as alone:
        assert await health(alone.url) == 503


async def test_a_request_that_ends_at_a_stop_string_is_no_abort_to_those_who_count(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    save_tokenizer(tiny[1])
    async with asyncio.timeout(TIMEOUT_S), local_cluster(CONFIG, tiny[1]) as cluster:
        backend = ClusterBackend(cluster._list_members, routes=Routes.of(CONFIG))
        joined = Front(CONFIG, tiny[1], backend)
        await joined.start()
        asked: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0}
        async with httpx.AsyncClient(base_url=joined.url, timeout=TIMEOUT_S) as client:
            asked["model"] = (await client.get("/v1/models")).json()["data"][0]["id"]
            whole = (await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"]
            answer = await client.post("/v1/completions", json=asked | {"stop": whole[len(whole) // 2]})
        await joined.stop()
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert [served.ended for served in backend._recorder.take()] == [FinishReason.LENGTH, FinishReason.STOP]


async def nobody() -> list[Member]:
    return []


async def test_a_gateway_on_all_addresses_gives_one_that_can_be_called(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "ACQUAINTANCE_S", 0.1)
    for host in ALL_ADDRESSES:
        everywhere = CONFIG.model_copy(update={"gateway": CONFIG.gateway.model_copy(update={"host": host})})
        async with gateway(tiny[1], nobody, everywhere, node="127.0.0.1") as listening:
            assert listening.url.startswith("http://127.0.0.1:")
            assert await health(listening.url) == 503
