"""Sampling parameters from an HTTP body to the workers and back, and the metrics that tell of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaForCausalLM

from cluster.config.loading import load
from cluster.local import LocalCluster, local_cluster
from core.metrics import GatewayMetrics
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.tokenizer import ServedModel
from tests.e2e.conftest import save_tokenizer
from tests.held import Held
from tests.tiny import save_tiny_llama

LAYOUTS: dict[str, dict[str, Any]] = {
    "disaggregated": {},
    "colocated": {"colocated": True},
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
}
PROMPT = [7 + 11 * i % 90 for i in range(70)]
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("tiny-llama")
    model = save_tiny_llama(folder)
    save_tokenizer(folder)
    return model, folder


@contextlib.asynccontextmanager
async def serving(folder: Path, *, seed: int | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway over workers in this process."""
    async with serving_cluster(folder, seed=seed, **settings) as (client, _):
        yield client


@contextlib.asynccontextmanager
async def serving_cluster(
    folder: Path, *, seed: int | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, LocalCluster]]:
    config = load(None, {"dtype": "float32", "kv_cache_memory": "4MiB"} | settings)
    async with local_cluster(config, folder) as cluster:
        model = ServedModel.load(folder, ["tiny"], max_model_len=256)
        metrics = GatewayMetrics(CollectorRegistry(), model_name="tiny")
        app = create_app(cluster.backend, model, GatewayConfig(seed=seed), metrics)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=TIMEOUT_S) as client:
            yield client, cluster


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def law(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """[tokens, vocab] logprobs of what follows each token."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


# --- logprobs of the prompt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_prompt_is_scored_as_transformers_scores_it(tiny: tuple[LlamaForCausalLM, Path], layout: str) -> None:
    model, folder = tiny
    expected = law(model, PROMPT)
    own = [None, *(expected[i, token].item() for i, token in enumerate(PROMPT[1:]))]
    async with serving(folder, **LAYOUTS[layout]) as client:
        await complete(client)  # what the prefix caches know is of no use
        for max_tokens in (0, 1, 5):
            answer = await complete(
                client, echo=True, logprobs=3, prompt_logprobs=2, max_tokens=max_tokens, ignore_eos=True
            )
            (choice,) = answer["choices"]
            assert answer["usage"]["completion_tokens"] == max_tokens
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {len(PROMPT) + max_tokens}
            assert logprobs["token_logprobs"][: len(PROMPT)] == pytest.approx(own, abs=1e-3)
            assert [next(iter(top.values())) for top in logprobs["top_logprobs"][1 : len(PROMPT)]] == pytest.approx(
                expected.amax(-1)[:-1].tolist(), abs=1e-3
            )
            scored = choice["prompt_logprobs"]
            assert scored[0] is None
            assert [row[str(token)]["logprob"] for row, token in zip(scored[1:], PROMPT[1:], strict=True)] == (
                pytest.approx(own[1:], abs=1e-3)
            )
            ranks = [int((expected[i] > expected[i, token]).sum()) + 1 for i, token in enumerate(PROMPT[1:])]
            assert [row[str(token)]["rank"] for row, token in zip(scored[1:], PROMPT[1:], strict=True)] == ranks


async def test_prompts_that_are_scored_while_others_run_are_scored_alike(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    """With so few blocks that prompts are preempted."""
    async with serving(
        tiny[1], kv_cache_memory="256KiB", colocated=True, max_num_batched_tokens=24, max_num_seqs=8
    ) as c:
        alone = await complete(c, prompt_logprobs=1, temperature=0, max_tokens=60)
        jobs = [complete(c, prompt=PROMPT[i:], max_tokens=100, ignore_eos=True) for i in range(6)]
        scored = [complete(c, prompt_logprobs=1, temperature=0, max_tokens=60) for _ in range(3)]
        results = await asyncio.gather(*jobs, *scored)
        await until(c, "vllm:num_preemptions_total", lambda count: count > 0, "both")
    (expected,) = alone["choices"]
    for answer in results[len(jobs) :]:
        (choice,) = answer["choices"]
        assert choice["text"] == expected["text"]
        rows = zip(choice["prompt_logprobs"][1:], expected["prompt_logprobs"][1:], strict=True)
        for row, other in rows:
            found, wanted = ({token: entry["logprob"] for token, entry in r.items()} for r in (row, other))
            assert found == pytest.approx(wanted, abs=1e-3)


async def test_a_chat_is_scored_too(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async with serving(tiny[1]) as client:
        body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2, "prompt_logprobs": 0}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in answer["prompt_logprobs"][1:])


# --- choices, seeds, classes, tenants --------------------------------------------------------------------------------


async def test_best_of_returns_the_likeliest_of_the_same_choices(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async with serving(tiny[1]) as client:
        every = await complete(client, n=6, seed=11, logprobs=0, ignore_eos=True)
        best = await complete(client, n=2, best_of=6, seed=11, logprobs=0, ignore_eos=True)
    ranked = sorted(every["choices"], key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"] == 48


async def test_a_run_on_a_server_with_a_seed_can_be_repeated(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async def run(seed: int | None, layout: str, order: int) -> list[list[str]]:
        async with serving(tiny[1], seed=seed, **LAYOUTS[layout]) as client:
            jobs = [complete(client, prompt=PROMPT[i % 5 :], n=2) for i in range(10)][::order]
            answers = (await asyncio.gather(*jobs))[::order]
        texts = [[c["text"] for c in answer["choices"]] for answer in answers]
        return [sorted([texts[i], texts[i + 5]]) for i in range(5)]  # equal prompts are told apart by their order only

    first = await run(3, "disaggregated", 1)
    assert await run(3, "chunked", -1) == first
    assert await run(4, "disaggregated", 1) != first
    assert await run(None, "disaggregated", 1) != first
    assert all(one != other for one, other in first)


async def test_a_bias_decides_what_is_drawn(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async with serving(tiny[1]) as client:
        always = await complete(client, logit_bias={"9": 100}, return_token_ids=True, temperature=0)
        never = await complete(client, logit_bias={"9": -100}, return_token_ids=True, n=8, logprobs=5)
    assert always["choices"][0]["token_ids"] == [9] * 8
    assert not any(9 in choice["token_ids"] for choice in never["choices"])


async def test_a_prefix_is_shared_within_a_salt_only(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async with serving(tiny[1]) as client:
        cached = [
            (await complete(client, cache_salt=salt))["usage"]["prompt_tokens_details"]["cached_tokens"]
            for salt in ("a", "b", "a", "", "b", "")
        ]
    assert cached == [0, 0, 64, 0, 64, 64]


async def test_the_more_urgent_is_served_first(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    async def one(client: httpx.AsyncClient, priority: int) -> None:
        await complete(client, priority=priority, max_tokens=5, ignore_eos=True)
        ended.append(priority)

    async with serving_cluster(tiny[1], colocated=True, max_num_seqs=1) as (client, cluster):
        (node,) = cluster.nodes.values()
        held = Held(monkeypatch, node.runner)
        first = asyncio.create_task(one(client, 9))
        await asyncio.to_thread(held.begun.wait, TIMEOUT_S)  # it has the only seat
        others = [asyncio.create_task(one(client, priority)) for priority in (2, -1, 1, 0, -2)]
        async with asyncio.timeout(TIMEOUT_S):
            while node.num_owned < 6:
                await asyncio.sleep(0.001)
        held.go_on.set()
        await asyncio.gather(first, *others)
    assert ended == [9, -2, -1, 0, 1, 2]


# --- metrics ---------------------------------------------------------------------------------------------------------


def value(page: httpx.Response, name: str, role: str) -> float:
    found = re.findall(rf'^{re.escape(name)}{{[^}}]*role="{role}"[^}}]*}} (\S+)$', page.text, re.MULTILINE)
    assert len(found) == 1, f"{len(found)} series {name} for {role}"
    return float(found[0])


async def until(client: httpx.AsyncClient, name: str, reached: Callable[[float], bool], role: str) -> None:
    """Workers speak four times a second."""
    async with asyncio.timeout(TIMEOUT_S):
        while not reached(value(await client.get("/metrics"), name, role)):
            await asyncio.sleep(0.01)


async def test_each_worker_tells_its_prefix_cache_and_its_preemptions(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    queries, hits, preemptions = (
        f"vllm:{name}_total" for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
    )
    async with serving(tiny[1]) as client:
        for _ in range(2):
            await complete(client)
        await complete(client, prompt_logprobs=0)  # looks nothing up where it is scored
        await until(client, queries, lambda count: count == 3 * len(PROMPT), "decode")
        await until(client, queries, lambda count: count == 2 * len(PROMPT), "prefill")
        page = await client.get("/metrics")
        assert (value(page, hits, "prefill"), value(page, hits, "decode")) == (64, 2 * 64)
        assert value(await client.get("/metrics"), preemptions, "decode") == 0
