"""Logits against Transformers in float32, however the tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from engine.runner import ModelRunner
from engine.step import StepBatch, StepOutput
from tests.engine.conftest import MakeModel

BLOCK = 16
TOLERANCE = 1e-4


def load(folder: Path) -> ModelRunner:
    return ModelRunner.load(folder, dtype="float32", device="cpu", block_size=BLOCK, kv_cache_bytes=2**21, threads=1)


def batch(*parts: tuple[list[int], int, list[int]], **extra: Any) -> StepBatch:
    """A step of (new token ids, tokens in the cache before, block table) per sequence; logits for every row."""
    slots, positions, starts = [], [], [0]
    for tokens, context, table in parts:
        logical = np.arange(context, context + len(tokens))
        slots.append(np.asarray(table)[logical // BLOCK] * BLOCK + logical % BLOCK)
        positions.append(logical)
        starts.append(starts[-1] + len(tokens))
    return StepBatch(
        token_ids=np.array([t for tokens, _, _ in parts for t in tokens], np.int64),
        positions=extra.pop("positions", np.concatenate(positions)),
        slots=np.concatenate(slots),
        query_starts=np.array(starts, np.int64),
        context_lens=np.array([context for _, context, _ in parts], np.int64),
        block_tables=tuple(np.array(table, np.int64) for _, _, table in parts),
        logit_rows=np.arange(starts[-1]),
        return_logits=True,
        **extra,
    )


def run(runner: ModelRunner, step: StepBatch) -> StepOutput:
    return runner.submit(step).result()


def logits_of(runner: ModelRunner, step: StepBatch) -> torch.Tensor:
    logits = run(runner, step).logits
    assert logits is not None
    return logits


def reference(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        *({"rope_parameters": rope} for rope in ROPES),
    ],
    ids=lambda settings: ",".join(f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in settings.items()),
)
def test_a_prompt_gives_the_logits_of_transformers(make_model: MakeModel, settings: dict[str, Any]) -> None:
    model, folder = make_model(**settings)
    prompt = tokens(37)
    assert_close(logits_of(load(folder), batch((prompt, 0, [3, 0, 5]))), reference(model, prompt))


@pytest.mark.parametrize("cuts", [[16], [1], [5, 6, 30], [36], list(range(1, 37))])
def test_a_prompt_in_chunks_gives_the_same_logits(tiny: tuple[LlamaForCausalLM, Path], cuts: list[int]) -> None:
    model, folder = tiny
    runner, prompt = load(folder), tokens(37)
    edges = [0, *cuts, 37]
    parts = [logits_of(runner, batch((prompt[a:b], a, [7, 1, 4]))) for a, b in zip(edges, edges[1:], strict=False)]
    assert_close(torch.cat(parts), reference(model, prompt))


def test_prompts_chunks_and_decodes_share_a_step(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    runner = load(folder)
    a, b, c, d = tokens(50, 1), tokens(20, 2), tokens(9, 3), tokens(3, 4)
    run(runner, batch((a[:49], 0, [0, 1, 2, 3]), (b[:8], 0, [4, 5]), (d[:2], 0, [6])))
    step = batch((a[49:], 49, [0, 1, 2, 3]), (b[8:], 8, [4, 5]), (c, 0, [7]), (d[2:], 2, [6]))
    want = [reference(model, s)[cut:] for s, cut in ((a, 49), (b, 8), (c, 0), (d, 2))]
    assert_close(logits_of(runner, step), torch.cat(want))


def test_decodes_of_very_different_lengths_share_a_step(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    runner = load(folder)
    sequences = [tokens(n, n) for n in (200, 2, 3, 40, 5)]
    tables, free = [], iter(range(100))
    for s in sequences:
        tables.append([next(free) for _ in range(-(-len(s) // BLOCK))])
        run(runner, batch((s[:-1], 0, tables[-1])))
    step = batch(*((s[-1:], len(s) - 1, table) for s, table in zip(sequences, tables, strict=True)))
    assert_close(logits_of(runner, step), torch.stack([reference(model, s)[-1] for s in sequences]))


def test_every_path_of_a_token_tree_gives_the_logits_of_that_path_alone(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    runner, prompt = load(folder), tokens(21)
    run(runner, batch((prompt, 0, [2, 9])))
    tree, parents = tokens(6, 5), np.array([-1, 0, 0, 1, 2, 4])
    depths = np.array([0, 1, 1, 2, 2, 3])
    got = logits_of(runner, batch((tree, 21, [2, 9]), tree_parents=parents, positions=21 + depths))
    for node in range(6):
        path, at = [], node
        while at >= 0:
            path.insert(0, tree[at])
            at = int(parents[at])
        assert_close(got[node], reference(model, prompt + path)[-1])


def test_moved_kv_serves_as_if_it_had_been_computed_there(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    """A tree of two roots; the second is accepted, so its KV moves to the first slot after the context."""
    model, folder = tiny
    runner, prompt, (wrong, right, after) = load(folder), tokens(17), tokens(3, 8)
    run(runner, batch((prompt, 0, [4, 6])))
    fork = batch((([wrong, right]), 17, [4, 6]), tree_parents=np.array([-1, -1]), positions=np.array([17, 17]))
    run(runner, fork)
    moves = np.array([[fork.slots[1], fork.slots[0]]])
    got = logits_of(runner, batch(([after], 18, [4, 6]), kv_moves=moves))
    assert_close(got[0], reference(model, [*prompt, right, after])[-1])


def test_moves_are_all_read_before_any_is_written(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    runner = load(tiny[1])
    run(runner, batch((tokens(4), 0, [0])))
    before = runner.pool.data[:, :, 0, :2].clone()
    run(runner, batch(([5], 0, [1]), kv_moves=np.array([[0, 1], [1, 0]])))
    assert torch.equal(runner.pool.data[:, :, 0, :2], before.flip(2))


def test_taps_are_the_hidden_states_of_transformers(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    prompt = tokens(11)
    with torch.inference_mode():
        states = model.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    got = run(load(folder), batch((prompt, 0, [1]), taps=(0, 2))).taps
    assert set(got) == {0, 2}
    assert_close(got[0], states[0][0])
    assert_close(got[2], states[2][0])


def test_a_layer_is_published_once_its_kv_is_written(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    runner = load(tiny[1])
    seen: list[tuple[int, bool]] = []
    runner.kv_sink = lambda layer, step: seen.append((layer, bool(runner.pool.data[layer, :, 3, :2].any())))
    run(runner, batch((tokens(2), 0, [3]), publish=True))
    assert seen == [(0, True), (1, True), (2, True)]
    run(runner, batch((tokens(2), 0, [3])))
    assert len(seen) == 3


def test_a_step_that_cannot_run_fails_its_future(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    future = load(tiny[1]).submit(batch(([5], 0, [10**6])))
    assert future.exception() is not None


