"""Logits are those of one device, however the model is split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.driver import BLOCK_SIZE, TINY, Driver, close, tokens
from tests.engine.parallel.ranks import Ranks

SPLITS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)][1:]
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama, biases": EIGHT | {"attention_bias": True, "mlp_bias": True},
    "llama, tied": EIGHT | {"tie_word_embeddings": True},
    "llama, KV heads in common": EIGHT | {"num_key_value_heads": 1},
    "mistral, windows": EIGHT | {"architecture": "Mistral", "sliding_window": 7, "num_key_value_heads": 2},
    "qwen2": EIGHT | {"architecture": "Qwen2"},
    "qwen3": EIGHT | {"architecture": "Qwen3"},
    "phi3": EIGHT | {"architecture": "Phi3", "pad_token_id": None, "num_key_value_heads": 2},
    "gemma2": EIGHT | {"architecture": "Gemma2", "sliding_window": 9},
    "gemma3": EIGHT | {"architecture": "Gemma3", "sliding_window": 9, "num_hidden_layers": 7},
    "mixtral": EIGHT | MOE | {"architecture": "Mixtral"},
}


@pytest.fixture
def split(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Any:
    def make(tp_size: int, pp_size: int, dtype: str = "float32", **changes: Any) -> Ranks:
        return Ranks(make_checkpoint(**(EIGHT | changes)), tmp_path, tp_size, pp_size, dtype=dtype)

    return make


@pytest.mark.parametrize(("tp_size", "pp_size"), SPLITS)
def test_prompts_chunks_decoding_and_trees_are_as_on_one_device(
    tp_size: int, pp_size: int, split: Any, make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    whole = load_driver(make_checkpoint(**EIGHT), num_blocks=200)
    with split(tp_size, pp_size) as ranks:
        parted = Driver(ranks)
        got, want = ([d.new(60), d.new(60)] for d in (parted, whole))
        steps: list[tuple[list[list[int]], dict[str, Any]]] = [
            ([tokens(21), tokens(9, seed=1)], {}),  # prompts
            ([tokens(13, seed=2), [5]], {}),  # a chunk beside decoding
            ([[6], [7]], {}),  # decoding
            ([[8, 9, 10], [11, 12, 13]], {"parents": [[-1, 0, 0], [-1, 0, 1]]}),  # trees
        ]
        for chunks, options in steps:
            ours = parted.logits(list(zip(got, chunks, strict=True)), **options)
            theirs = whole.logits(list(zip(want, chunks, strict=True)), **options)
            assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_split_both_ways(
    family: str,
    split: Any,
    make_checkpoint: Callable[..., Path],
    reference: Callable[..., torch.Tensor],
) -> None:
    changes = dict(FAMILIES[family])
    folder, ids = make_checkpoint(**changes), tokens(23)
    expected = reference(folder, ids)
    for tp_size, pp_size in ((2, 1), (4, 2)):
        with split(tp_size, pp_size, **changes) as ranks:
            driver = Driver(ranks)
            stream = driver.new(30)
            rows = [*driver.logits([(stream, ids[:17])]), *driver.logits([(stream, ids[17:])])]
            assert close(torch.cat(rows), expected)


def test_taps_of_all_stages_come_together(
    split: Any, make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    layers = TINY["num_hidden_layers"]
    taps = tuple(range(layers + 1))
    whole = load_driver(make_checkpoint(**EIGHT))
    expected = whole.run([(whole.new(9), tokens(9))], taps=taps).taps
    with split(2, 2) as ranks:
        driver = Driver(ranks)
        got = driver.run([(driver.new(9), tokens(9))], taps=taps).taps
    assert got.keys() == expected.keys()
    assert all(close(got[layer], expected[layer]) for layer in taps)


def test_the_cache_of_a_group_is_that_of_one_device(
    split: Any, make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    """So a hand-off need not know of the split."""
    whole = load_driver(make_checkpoint(**EIGHT), num_blocks=200)
    whole.run([(whole.new(19), tokens(19))])
    for tp_size, pp_size in ((2, 1), (1, 2), (4, 2)):
        with split(tp_size, pp_size) as ranks:
            driver = Driver(ranks)
            stream = driver.new(19)
            driver.run([(stream, tokens(19))])
            blocks = torch.from_numpy(stream.blocks[:4])  # full ones
            assert close(ranks.pool.data[:, :, blocks], whole.runner.pool.data[:, :, blocks])


def test_moves_of_kv_reach_every_rank(split: Any) -> None:
    with split(2, 2) as ranks:
        driver = Driver(ranks)
        stream = driver.new(4)
        driver.run([(stream, tokens(4))])
        slots = ranks.pool.data.flatten(2, 3)
        first = int(stream.blocks[0]) * BLOCK_SIZE
        second = first + 1
        before = slots[:, :, [first, second]].clone()
        driver.run([(driver.new(1), tokens(1))], kv_moves=np.array([[first, second], [second, first]]))
        assert torch.equal(slots[:, :, [second, first]], before)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_bfloat16_is_no_farther_from_float32_than_on_one_device(
    tp_size: int, pp_size: int, split: Any, make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    def run(driver: Driver) -> torch.Tensor:
        stream, ids = driver.new(40), tokens(40)
        return torch.cat([*driver.logits([(stream, ids[:30])]), *driver.logits([(stream, ids[30:])])])

    folder = make_checkpoint(**EIGHT)
    exact, rough = run(load_driver(folder)), run(load_driver(folder, dtype="bfloat16"))
    with split(tp_size, pp_size, dtype="bfloat16") as ranks:
        got = run(Driver(ranks))
    assert (got - exact).norm() < 1.5 * (rough - exact).norm()
