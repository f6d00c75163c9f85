"""Adapters on models with experts, and on those that Transformers runs."""

from __future__ import annotations

import pytest

from core.errors import ModelError
from engine.lora.checkpoint import read_adapters
from tests.engine.driver import close, tokens
from tests.engine.lora.peft import ATTENTION, merge, save_adapter

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "gemma2": {"architecture": "Gemma2", "query_pre_attn_scalar": 11},
    "experts": {"architecture": "Qwen3Moe", **EXPERTS},
    "run by transformers": {"architecture": "Olmo2"},
}


def load_adapted(base, tmp_path, load_driver, targets):
    folder = save_adapter(tmp_path / "adapter", base, targets, rank=3)
    return folder, load_driver(base, adapters=read_adapters({"one": str(folder)}, base))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_adapted_attention_is_that_of_merged_weights(changes, tmp_path, make_checkpoint, load_driver, reference):
    base, ids = make_checkpoint(**changes), tokens(30)
    folder, driver = load_adapted(base, tmp_path, load_driver, ATTENTION)

    adapted, plain = driver.logits([(driver.new(30), ids), (driver.new(30), ids)], adapters=("one", ""))

    assert close(adapted, reference(merge(folder, base, tmp_path / "merged"), ids))
    assert close(plain, reference(base, ids))


@pytest.mark.parametrize("changes", [MODELS["experts"], {"architecture": "Mixtral", "num_local_experts": 4}])
def test_an_adapter_of_experts_is_refused_by_name(changes, tmp_path, make_checkpoint, load_driver):
    base = make_checkpoint(**changes)
    with pytest.raises(ModelError, match=r"experts\.0\.(down_proj|w1).* has no place"):
        load_adapted(base, tmp_path, load_driver, ("down_proj", "w1"))
