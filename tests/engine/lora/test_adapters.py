"""Rows of adapters have the logits of merged weights, whatever else is in the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.errors import InternalError
from engine.lora.checkpoint import read_adapters
from tests.engine.driver import close, tokens
from tests.engine.lora.peft import ATTENTION, EVERYTHING, merge, save_adapter

MODELS = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"architecture": "Qwen3"},
    "phi3, fused projections": {"architecture": "Phi3", "pad_token_id": None},
}
ADAPTERS = {
    "all": {"rank": 4, "seed": 1},
    "some": {"targets": ("q_proj", "v_proj", "qkv_proj"), "rank": 3, "seed": 2},
    "stabilized": {"targets": (*ATTENTION, "qkv_proj", "gate_up_proj"), "rank": 2, "seed": 3, "use_rslora": True},
    "patterns": {
        "rank": 4,
        "seed": 4,
        "ranks": {"down_proj": 2, "v_proj": 5},
        "rank_pattern": {"down_proj": 2, "model.layers.[0-9]+.self_attn.v_proj": 5},
        "alpha_pattern": {"o_proj": 3},
    },
}


@pytest.fixture
def adapted(tmp_path, load_driver, reference):
    """A driver with adapters over a base model, and the logits of each adapter merged into it; "" is the base."""

    def adapted(base, names=tuple(ADAPTERS), **load):
        folders = {}
        for name in names:
            options = {"targets": (*EVERYTHING, "qkv_proj", "gate_up_proj"), **ADAPTERS[name]}
            folders[name] = save_adapter(tmp_path / name, base, **options)
        merged = {name: merge(folder, base, tmp_path / f"{name}-merged") for name, folder in folders.items()}
        adapters = read_adapters({name: str(folder) for name, folder in folders.items()}, base)
        return load_driver(base, adapters=adapters, **load), lambda name, ids: reference(merged.get(name, base), ids)

    return adapted


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_adapters_and_base_mix_in_one_batch_of_prompts_chunks_and_decoding(changes, make_checkpoint, adapted):
    driver, merged = adapted(make_checkpoint(**changes))
    names = ["all", "", "some", "stabilized", "patterns", "all", ""]
    prompts = [tokens(n, seed=n) for n in (60, 41, 30, 52, 18, 7, 33)]
    streams = [driver.new(64) for _ in prompts]
    got = [[] for _ in prompts]
    for cut in ((0, 0, 10, 51, 17, 0, 32), (20, 41, 29, 52, 18, 7, 33), (60, 41, 30, 52, 18, 7, 33)):
        step = [i for i, end in enumerate(cut) if end > streams[i].context]
        chunks = [(streams[i], prompts[i][streams[i].context : cut[i]]) for i in step]
        for i, logits in zip(step, driver.logits(chunks, adapters=tuple(names[i] for i in step)), strict=True):
            got[i].append(logits)
    for name, prompt, logits in zip(names, prompts, got, strict=True):
        assert close(torch.cat(logits), merged(name, prompt)), name


def test_a_step_of_one_adapter_alone(make_checkpoint, adapted):
    driver, merged = adapted(make_checkpoint(), ["all"])
    ids = tokens(40)
    [logits] = driver.logits([(driver.new(40), ids)], adapters=("all",))
    assert close(logits, merged("all", ids))
    assert not close(logits, merged("", ids))


def test_a_step_that_names_no_adapter_is_the_base_model(make_checkpoint, adapted):
    driver, merged = adapted(make_checkpoint(), ["all"])
    ids = tokens(40)
    driver.logits([(driver.new(10), ids[:10])], adapters=("all",))
    assert close(driver.logits([(driver.new(40), ids)])[0], merged("", ids))


def test_in_bfloat16_an_adapter_is_as_close_to_float32_as_merged_weights_are(make_checkpoint, adapted, tmp_path):
    from transformers import AutoModelForCausalLM

    driver, merged = adapted(make_checkpoint(), ["all"], dtype="bfloat16")
    ids = tokens(40)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "all-merged", dtype=torch.bfloat16)
        theirs = model(torch.tensor([ids])).logits[0].float()

    [ours] = driver.logits([(driver.new(40), ids)], adapters=("all",))

    assert (ours - merged("all", ids)).norm() < 1.5 * (theirs - merged("all", ids)).norm()


def test_a_step_with_an_adapter_that_was_not_loaded_fails(make_checkpoint, adapted):
    driver, _ = adapted(make_checkpoint(), ["all"])
    batch = driver.batch([(driver.new(4), tokens(4))], adapters=("other",))
    with pytest.raises(InternalError, match="'other'"):
        driver.runner.submit(batch).result()


def test_what_the_adapters_compute_is_part_of_the_fingerprint_of_the_cache(make_checkpoint, tmp_path, load_driver):
    base = make_checkpoint()
    one, other = (save_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2))
    prints = {
        load_driver(base, adapters=read_adapters(modules, base)).runner.layout.fingerprint
        for modules in ({}, {"a": str(one)}, {"b": str(one)}, {"a": str(other)})
    }
    assert len(prints) == 4


def test_every_row_keeps_its_adapter_when_sequences_interleave(make_checkpoint, adapted):
    driver, merged = adapted(make_checkpoint(), ["all", "some"])
    prompts = [tokens(12, seed=n) for n in range(6)]
    names = ("all", "", "some", "all", "some", "")
    streams = [driver.new(12) for _ in prompts]
    driver.run([(s, p[:11]) for s, p in zip(streams, prompts, strict=True)], adapters=names)
    order = np.random.default_rng(0).permutation(6)
    got = driver.logits([(streams[i], prompts[i][11:]) for i in order], adapters=tuple(names[i] for i in order))
    for i, logits in zip(order, got, strict=True):
        assert close(logits[-1], merged(names[i], prompts[i])[-1])
