"""Models that we have no layers for, run by their classes in Transformers over our paged cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError, ModelError
from engine.model_config import ModelConfig
from engine.parallel.split import check_split
from engine.runner import ModelRunner
from engine.weight_check import check_weights
from tests.engine.driver import TINY, Driver, check_mixed_step, check_taps, tokens
from tests.tiny import Tensors, rewrite

MLA = {
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT2 = {"architecture": "GPT2LMHeadModel", "n_inner": 64, "num_key_value_heads": 6}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"architecture": "Olmo2"},
    "scaled and with windows": {
        "architecture": "Cohere2",
        "sliding_window": 21,
        "logit_scale": 0.3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "learned positions": GPT2,
    "experts": {"architecture": "Olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "values smaller than keys": {"architecture": "DeepseekV3", **MLA},
    "partial rotary": {"architecture": "GPTNeoX", "rotary_pct": 0.5},
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_kind_of_step_has_the_logits_of_the_class_with_its_own_attention(
    changes, seed, make_checkpoint, load_driver, reference
):
    folder = make_checkpoint(**changes, seed=seed)
    check_mixed_step(load_driver(folder), partial(reference, folder))


def test_heads_of_an_odd_size_are_computed_in_bfloat16_too(make_checkpoint, load_driver, reference):
    folder, ids = make_checkpoint(**GPT2 | {"hidden_size": 30}), tokens(20)
    driver = load_driver(folder, dtype="bfloat16")
    got = driver.logits([(driver.new(20), ids)])[0]
    exact = reference(folder, ids)
    assert ((got - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.1


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_packed_and_quantized_layers_take_the_place_of_the_class_ones(changes, make_checkpoint, load_driver, reference):
    folder, ids = make_checkpoint(**changes), tokens(40)
    exact = reference(folder, ids)
    for options in ({}, {"quantization": "int8"}):
        driver = load_driver(folder, dtype="bfloat16", **options)
        stream = driver.new(40)
        got = torch.cat([driver.logits([(stream, ids[a:b])])[0] for a, b in ((0, 30), (30, 31), (31, 40))])
        errors = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert errors.median() < 0.1  # of some rows rounding may change the experts


def test_taps_are_what_goes_into_a_layer_or_comes_out_of_the_last(make_checkpoint, load_driver):
    folder = make_checkpoint("Olmo2")
    check_taps(load_driver(folder), folder)


def test_layers_are_published_in_their_order(make_checkpoint, load_driver):
    driver, published = load_driver(make_checkpoint("Olmo2")), []
    driver.runner.kv_sink = lambda layer, _batch: published.append(layer)
    driver.run([(driver.new(5), tokens(5))], publish=True)
    assert published == [0, 1, 2]


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    import transformers

    family = getattr(transformers, architecture)
    return family.config_class(**TINY | changes).to_dict() | {"architectures": [architecture]}


@pytest.mark.parametrize(
    "architecture",
    ["Falcon", "Bloom", "Mpt", "Mamba", "Jamba", "Qwen3Next"],  # GPTJ is by Transformers' interface from 5.24 on
)
def test_a_class_that_keeps_its_attention_to_itself_is_refused_by_name(architecture: str) -> None:
    architecture += "ForCausalLM"
    with pytest.raises(ModelError, match=rf"architecture {architecture} is not supported: .*_supports_attention_back"):
        ModelConfig.from_dict({"architectures": [architecture]})


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("DogeForCausalLM", {}, "masks attention by itself"),
        ("GptOssForCausalLM", {}, "takes s_aux"),
        ("DiffLlamaForCausalLM", {}, "6 of its 3 layers"),
        ("RecurrentGemmaForCausalLM", {"lru_width": 48}, "1 of its 3 layers"),
        ("BertLMHeadModel", {"is_decoder": False}, "not causal"),
        ("Llama4ForCausalLM", {}, "is not supported"),
        ("PhimoeForCausalLM", {"sliding_window": 21}, "sliding_window 21"),
    ],
)
def test_a_class_that_remembers_otherwise_than_by_paged_attention_is_refused(
    architecture: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_dict(config_of(architecture, **changes))
    assert architecture in caught.value.message
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_code_that_comes_with_a_checkpoint_is_never_run() -> None:
    config = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    with pytest.raises(ModelError, match=r"OwnForCausalLM is code that comes with the checkpoint \(auto_map\)"):
        ModelConfig.from_dict(config)


@pytest.mark.parametrize("architecture", ["NoSuchForCausalLM", "BertModel", "AutoModelForCausalLM", "pipeline", ""])
def test_an_architecture_that_is_no_causal_model_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"architecture {architecture} is not supported; supported are Gemma2"):
        ModelConfig.from_dict({"architectures": [architecture]})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": "six"}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "Olmo2ForCausalLM"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config says awq"),
        ({"rope_parameters": {"rope_type": "none"}}, "rope_type"),
    ],
)
def test_a_configuration_that_the_class_does_not_take_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_dict(config_of("Olmo2ForCausalLM") | changes)
    assert named in caught.value.message
    assert "\n" not in caught.value.message


def test_a_sequence_ends_where_the_frequencies_would_change_for_all_of_it() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    for rope, longest in ((dynamic, 512), ({"rope_type": "longrope", "rope_theta": 10000.0, **factors}, 64)):
        config = config_of("Olmo2ForCausalLM", rope_parameters=rope)
        assert ModelConfig.from_dict(config).max_position_embeddings == longest


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(QUERY), f"tensor {QUERY} is missing"),
        (lambda t: t.update({QUERY: torch.zeros(7, 48)}), f"tensor {QUERY} has shape [7, 48], but config.json makes"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "no place for tensor model.extra"),
        (lambda t: t.update({QUERY: torch.ones(48, 48, dtype=torch.int8)}), f"tensor {QUERY} is stored as I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_and_at_load(
    change: Callable[[Tensors], object], named: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_checkpoint("Olmo2"), tmp_path / "model"))
    rewrite(folder, change)
    config = ModelConfig.from_folder(folder)
    for refuse in (
        lambda: check_weights(folder, config),
        lambda: ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=4),
    ):
        with pytest.raises(ModelError) as caught:
            refuse()
        assert named in caught.value.message
        assert "\n" not in caught.value.message


def test_an_expert_that_does_not_fit_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint(**MODELS["experts"]), tmp_path / "model"))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(7, 9)}))
    with pytest.raises(ModelError, match=rf"tensor {name} has shape \[7, 9\], but other experts have \[64, 48\]"):
        check_weights(folder, ModelConfig.from_folder(folder))


def test_a_class_that_computes_otherwise_with_our_attention_is_refused_at_load(
    make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    """Its positions start elsewhere when it is not told them."""
    folder = make_checkpoint("Roberta", is_decoder=True, pad_token_id=1)
    with pytest.raises(ModelError, match=r"RobertaForCausalLM is not supported: over a paged cache .* off"):
        load_driver(folder)


def test_it_is_on_one_device(make_checkpoint: Callable[..., Path]) -> None:
    config = ModelConfig.from_folder(make_checkpoint("Olmo2"))
    for flag, sizes in (("--tensor-parallel-size", (2, 1)), ("--pipeline-parallel-size", (1, 2))):
        with pytest.raises(ConfigError, match=f"{flag}: Olmo2ForCausalLM is run by its class"):
            check_split(config, *sizes)


def test_the_configuration_is_read_as_plain_data(make_checkpoint: Callable[..., Path]) -> None:
    config = ModelConfig.from_folder(make_checkpoint("DeepseekV3", **MLA))
    assert (config.num_layers, config.num_kv_heads, config.head_size) == (3, 6, 16)
    assert json.dumps(config.fields)
