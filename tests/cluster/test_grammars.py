"""Grammars over real workers: the constraint survives the hand-off and the loss of a worker."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.local import LocalCluster, local_cluster
from core.types import Finish, FinishReason, Grammar, GrammarKind, Request, SamplingParams, TokenDelta

TIMEOUT_S = 60.0
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 9}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
VALUE = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
LONG = Grammar(GrammarKind.REGEX, "[0-9]{60}")


@pytest.fixture(scope="module")
def folder(tiny: tuple[LlamaForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose 128 tokens are the first of 256 single bytes: all of ASCII but the blanks."""
    folder = tmp_path_factory.mktemp("with-tokenizer") / "model"
    shutil.copytree(tiny[1], folder)
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def config(**settings: Any) -> SlipstreamConfig:
    return load(None, {"dtype": "float32", "kv_cache_memory": "4MiB"} | settings)


def request(index: int, grammar: Grammar | None, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=80, seed=index, grammar=grammar, **sampling)
    prompt = [(5 * i + index) % 128 for i in range(9 + 7 * index)]
    return Request(request_id=f"r{index}", prompt_token_ids=prompt, sampling=params, deadline=time.time() + TIMEOUT_S)


async def collect(deltas: AsyncIterator[TokenDelta]) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    async for delta in deltas:
        tokens += delta.token_ids
        if delta.finish is not None:
            return tokens, delta.finish
    raise AssertionError("the request did not end")


async def run(cluster: LocalCluster, *jobs: Request) -> list[tuple[list[int], Finish]]:
    running = [collect(cluster.backend.generate(job)) for job in jobs]
    return await asyncio.wait_for(asyncio.gather(*running), TIMEOUT_S)


def text(folder: Path, token_ids: list[int]) -> str:
    decoded: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(token_ids)
    return decoded


async def test_every_layout_gives_the_same_value_that_fits_the_schema(folder: Path) -> None:
    jobs = [request(i, None if i % 3 == 2 else VALUE) for i in range(9)]
    found = []
    for layout in ({}, {"colocated": True}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}):
        async with local_cluster(config(**layout), folder) as cluster:
            found.append(await run(cluster, *jobs))
    assert found[0] == found[1] == found[2]
    for job, (token_ids, finish) in zip(jobs, found[0], strict=True):
        if job.sampling.grammar is not None:
            value = json.loads(text(folder, token_ids))
            assert finish.reason is FinishReason.STOP
            assert set(value["a"]) <= {True, False}
            assert value["b"] in ("x", "yy")


async def test_a_text_goes_on_by_its_grammar_when_the_decode_worker_is_lost(folder: Path) -> None:
    async with local_cluster(config(), folder) as cluster:
        undisturbed, _ = (await run(cluster, request(1, LONG)))[0]
        stream = cluster.backend.generate(request(1, LONG))
        tokens = [t for _ in range(5) for t in (await anext(stream)).token_ids]
        await cluster.remove_worker("decode-0")
        rest, finish = await asyncio.wait_for(collect(stream), TIMEOUT_S)
    assert tokens + rest == undisturbed
    assert len(text(folder, undisturbed)) == 60
    assert finish.reason is FinishReason.STOP


async def test_a_grammar_no_worker_can_follow_ends_with_the_callers_error(folder: Path) -> None:
    """The vocabulary has no token for a blank."""
    async with local_cluster(config(), folder) as cluster:
        (impossible, good) = await run(
            cluster, request(0, Grammar(GrammarKind.REGEX, "a b")), request(1, Grammar(GrammarKind.REGEX, "ab"))
        )
    assert impossible[1].error == "InvalidRequest"
    assert text(folder, impossible[0]) == "a"
    assert "no token of the model" in impossible[1].message
    assert text(folder, good[0]) == "ab"
