"""What may be asked for beside speculation, each two of it together, as clients have it: the answers of workers that
draft, after hand-offs, on groups of devices and with too little room for KV are those of one worker without drafts."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from transformers import LlamaForCausalLM

from cluster.config.loading import load
from cluster.front import offer
from cluster.local import LocalCluster, local_cluster
from core.metrics import GatewayMetrics
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.tokenizer import ServedModel
from speculation.rules.registry import DEFAULT_RULE
from tests.engine.driver import tokens
from tests.tiny import all_handed_over, save_byte_tokenizer

on_one_loop = pytest.mark.asyncio(loop_scope="module")

TIMEOUT_S = 60.0
GRAMMAR = "([a-p]{1,3}[0-9A-P]){2,20}"
BY_REQUEST: dict[str, dict[str, Any]] = {
    "grammar": {"guided_regex": GRAMMAR},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "logit_bias": {"7": 2.0, "9": -100.0}},
    "logprobs": {"logprobs": 2},
    "stop string": {},  # one from the midst of what would be said
    "seed": {"temperature": 0.8, "top_k": 30, "top_p": 0.95},
    "prefix cache": {},  # its prompt begins like those of others
}
EVERYWHERE = ("hand-off", "preemption")
ROOM = {"kv_cache_memory": "160KiB", "block_size": 8, "max_model_len": 96}


@dataclass(frozen=True)
class Layout:
    drafter: str
    rule: str
    of_groups: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"tensor parallel": "tensor_parallel_size", "pipeline parallel": "pipeline_parallel_size"}
        decoding = {sizes[kind]: 2 for kind in self.of_groups}
        return decoding | {f"prefill_{size}": 1 for size in decoding}


LAYOUTS = [
    Layout("hybrid", "sampled"),
    Layout("hybrid", "chain", ("tensor parallel",)),
    Layout("hybrid", "tree", ("pipeline parallel",)),
    Layout("draft_model", "sampled", ("tensor parallel", "pipeline parallel")),
]


def asked() -> list[tuple[str, ...]]:
    """Of each request what it asks for: nothing, one thing, or two."""
    return [some for count in range(3) for some in combinations(BY_REQUEST, count)]


def body(index: int, features: tuple[str, ...]) -> dict[str, Any]:
    start = tokens(24, seed=1) if "prefix cache" in features else []
    given: dict[str, Any] = {"prompt": start + tokens(5 + index % 7, seed=index) * 2, "seed": index, "temperature": 0}
    for feature in features:
        given |= BY_REQUEST[feature]
    return given | {"max_tokens": 44, "ignore_eos": True, "return_token_ids": True}


def stopping(features: tuple[str, ...], asked: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    text = plain["text"]
    return asked | {"stop": text[len(text) // 2 :][:2]} if "stop string" in features else asked


@contextlib.asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[tuple[LocalCluster, httpx.AsyncClient]]:
    config = load(None, all_handed_over({"dtype": "float32"} | ROOM | settings))
    async with local_cluster(config, folder) as cluster:
        model = ServedModel.load(folder, ["tiny"], max_model_len=96)
        metrics = GatewayMetrics(CollectorRegistry(), model_name="tiny")
        app = create_app(cluster.backend, model, GatewayConfig(speculation=offer(config)), metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
            yield cluster, client


async def answers(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choice of each, with its usage."""
    responses = await asyncio.gather(*(client.post("/v1/completions", json=body, timeout=TIMEOUT_S) for body in bodies))
    found = [response.raise_for_status().json() for response in responses]
    return [answer["choices"][0] | {"usage": answer["usage"]} for answer in found]


@pytest.fixture(autouse=True)
def however_busy_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drafter seems to stall."""
    monkeypatch.setattr("speculation.crew.PATIENCE_STEPS", 10_000)


@pytest.fixture(scope="module")
def folder(tiny: tuple[LlamaForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-tokenizer") / "model"
    shutil.copytree(tiny[1], folder)
    save_byte_tokenizer(folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wanted(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Requests, and what one worker without drafts answers them."""
    bodies = [body(index, features) for index, features in enumerate(asked())]
    async with serving(folder, colocated=True, kv_cache_memory="4MiB") as (_, client):
        plain = await answers(client, bodies)
        bodies = [stopping(*each) for each in zip(asked(), bodies, plain, strict=True)]
        return bodies, await answers(client, bodies)


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    said = ("text", "token_ids", "finish_reason", "stop_reason")
    found, expected = (one["logprobs"] or {"token_logprobs": []} for one in (ours, theirs))
    return [ours.get(of) for of in said] == [theirs.get(of) for of in said] and found["token_logprobs"] == (
        pytest.approx(expected["token_logprobs"], abs=1e-4)
    )


@on_one_loop
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join((layout.drafter, *layout.of_groups)))
async def test_answers_are_those_of_one_worker_without_drafts(
    layout: Layout, folder: Path, wanted: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    """Those that are drawn where the rule has no dice of its own: it has none for requests with logprobs."""
    weights = (f"draft_model={folder}",) if layout.drafter == "draft_model" else ()
    drafting = {"speculation": layout.drafter, "speculation_controller": "fixed", "speculation_budget": 6}
    rule = {"speculation_rule": layout.rule, "speculation_weights": weights}
    bodies, plain = wanted
    async with serving(folder, **drafting, **rule, **layout.settings) as (cluster, client):
        found = await answers(client, bodies)
        status = {name.split("-")[0]: node.status() for name, node in cluster.nodes.items()}
    accepted = dict.fromkeys(BY_REQUEST, 0)
    for features, ours, theirs in zip(asked(), found, plain, strict=True):
        if "seed" not in features or layout.rule == DEFAULT_RULE or "logprobs" in features:
            assert same(ours, theirs), features
        if "grammar" in features and "stop string" not in features:
            assert re.match("([a-p]{1,3}[0-9A-P])*[a-p]{0,3}$", ours["text"])
        for feature in features:
            accepted[feature] += ours["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert min(accepted.values()) > 0, accepted
    decoding = status["decode"].counters
    assert decoding.transfers_committed > len(bodies) // 2  # all, unless the machine stood still for long
    assert decoding.preemptions > 0
    assert min(counters.prefix_cache_hits for counters in (decoding, status["prefill"].counters)) > 0
    assert decoding.speculation is not None
    assert not decoding.speculation.switched_off


def test_each_two_of_what_speculation_goes_with_are_asked_for_together() -> None:
    """Ten things: those of requests, those of each cluster here, and the two kinds of groups."""
    features = (*BY_REQUEST, *EVERYWHERE, *{kind for layout in LAYOUTS for kind in layout.of_groups})
    together = {
        frozenset(pair)
        for layout in LAYOUTS
        for some in asked()
        for pair in combinations((*some, *EVERYWHERE, *layout.of_groups), 2)
    }
    assert together == {frozenset(pair) for pair in combinations(features, 2)}
    assert len(together) == 45
