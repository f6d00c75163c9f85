"""Adapters of a model that is split over devices: each rank has its share of their matrices."""

from __future__ import annotations

import pytest
import torch

from engine.lora.checkpoint import read_adapters
from tests.engine.driver import Driver, close, tokens
from tests.engine.lora.peft import ATTENTION, EVERYTHING, merge, save_adapter
from tests.engine.parallel.ranks import Ranks

MODELS = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "KV heads in common": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "phi3": {"architecture": "Phi3", "pad_token_id": None, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("split", [(2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_merged_weights(changes, split, make_checkpoint, reference, tmp_path):
    base = make_checkpoint(**changes)
    folders = {
        "all": save_adapter(tmp_path / "all", base, (*EVERYTHING, "qkv_proj", "gate_up_proj"), seed=1),
        "some": save_adapter(tmp_path / "some", base, (*ATTENTION, "qkv_proj"), seed=2, rank=2),
    }
    merged = {name: merge(folder, base, tmp_path / f"{name}-merged") for name, folder in folders.items()}
    adapters = read_adapters({name: str(folder) for name, folder in folders.items()}, base)
    names, prompts = ("all", "", "some"), [tokens(n, seed=n) for n in (20, 11, 17)]
    with Ranks(base, tmp_path, *split, adapters=adapters) as ranks:
        driver = Driver(ranks)
        streams = [driver.new(20) for _ in prompts]
        first = driver.logits([(s, p[:9]) for s, p in zip(streams, prompts, strict=True)], adapters=names)
        rest = driver.logits([(s, p[9:]) for s, p in zip(streams, prompts, strict=True)], adapters=names)
    for name, prompt, *got in zip(names, prompts, first, rest, strict=True):
        assert close(torch.cat(got), reference(merged.get(name, base), prompt)), name
