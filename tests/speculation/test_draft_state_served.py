"""Draft states over real hand-offs between workers: as many tokens accepted in each step as where one does it all."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import load
from cluster.local import local_cluster
from core.types import Request, Role, SamplingParams
from speculation import allowance
from tests.engine.driver import tokens
from tests.tiny import all_handed_over, save_tiny_llama

TIMEOUT_S = 60.0
PROMPTS = [[token + 3 for token in tokens(length, seed=length)] for length in (9, 40, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


async def rounds(folder: Path, drafter: str, **settings: Any) -> list[list[tuple[list[int], int, int]]]:
    """Of each request its deltas: tokens, how many were drafted, and how many accepted."""
    given = {"dtype": "float32", "kv_cache_memory": "4MiB", "speculation": drafter}
    weights = (f"draft_model={folder}",) if drafter == "draft_model" else ()
    fixed = {"speculation_controller": "fixed", "speculation_budget": 6, "speculation_weights": weights}
    async with local_cluster(load(None, all_handed_over(given | fixed | settings)), folder) as cluster:

        async def one(name: str, prompt: list[int]) -> list[tuple[list[int], int, int]]:
            sampling = SamplingParams(max_tokens=30, temperature=0.0)
            request = Request(
                request_id=name, prompt_token_ids=prompt, sampling=sampling, deadline=time.time() + TIMEOUT_S
            )
            deltas = [delta async for delta in cluster.backend.generate(request)]
            return [(delta.token_ids, delta.num_drafted_tokens, delta.num_accepted_tokens) for delta in deltas]

        async with asyncio.timeout(TIMEOUT_S):
            found = [await one(f"r{index}", prompt) for index, prompt in enumerate(PROMPTS)]
        committed = sum(node.status().counters.transfers_committed for node in cluster.nodes.values())
    assert committed == (0 if settings.get("colocated") else len(PROMPTS))
    return found


@pytest.mark.parametrize("drafter", ["hybrid", "draft_model"])
async def test_rounds_after_a_hand_off_are_those_of_one_worker(
    folder: Path, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "SHARE", 1e6)  # how much is learned of plain steps depends on the time they take
    apart, together = [await rounds(folder, drafter, **layout) for layout in ({}, {"colocated": True})]
    assert apart == together
    assert any(accepted for deltas in apart for _, _, accepted in deltas)


async def test_a_worker_that_begins_to_decode_keeps_no_second_set_of_drafters(folder: Path) -> None:
    given = {"dtype": "float32", "kv_cache_memory": "4MiB", "speculation": "hybrid"}
    async with local_cluster(load(None, all_handed_over(given)), folder) as cluster, asyncio.timeout(TIMEOUT_S):
        node = cluster.nodes["prefill-0"]
        watching = weakref.ref(node._observer)
        assert watching() is not None
        node.set_role(Role.BOTH, 512)
        while watching() is not None:
            gc.collect()
            await asyncio.sleep(0.01)
        assert node._speculator is not None
