"""Models that we have no layers for, run by their classes in Transformers over our paged cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ConfigError, ModelError
from engine.model_config import ModelConfig
from engine.parallel.split import check_split
from engine.runner import ModelRunner
from engine.weight_check import check_weights
from tests.engine.driver import Driver, close, tokens
from tests.engine.test_models import TREE, paths

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
    driver, nodes = load_driver(folder), tokens(len(TREE), seed=9)
    prompts = [tokens(n, seed=n) for n in (110, 90, 40, 17, 2)]
    streams = [driver.new(120) for _ in prompts]
    cached = (109, 50, 0, 17, 1)
    driver.run([(s, p[:n]) for s, p, n in zip(streams, prompts, cached, strict=True) if n])
    chunks = [(s, p[n:] or nodes) for s, p, n in zip(streams, prompts, cached, strict=True)]
    chains = [range(-1, len(chunk) - 1) for _, chunk in chunks]

    mixed = driver.logits(chunks, parents=[*chains[:3], TREE, *chains[4:]])

    for index, (prompt, count) in enumerate(zip(prompts, cached, strict=True)):
        if index != 3:
            assert close(mixed[index], reference(folder, prompt)[count:])
    for row, path in enumerate(paths(TREE)):
        assert close(mixed[3][row], reference(folder, prompts[3] + [nodes[node] for node in path])[-1])


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
    from transformers import AutoModelForCausalLM

    folder, ids = make_checkpoint("Olmo2"), tokens(20)
    driver = load_driver(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states

        taps = driver.run([(driver.new(20), ids)], taps=(0, 2, 3)).taps

        assert set(taps) == {0, 2, 3}
        assert close(taps[0], expected[0][0])
        assert close(taps[2], expected[2][0])
        assert close(model.model.norm(taps[3]), expected[3][0])  # the last of Transformers' is after the norm


def test_layers_are_published_in_their_order(make_checkpoint, load_driver):
    driver, published = load_driver(make_checkpoint("Olmo2")), []
    driver.runner.kv_sink = lambda layer, _batch: published.append(layer)
    driver.run([(driver.new(5), tokens(5))], publish=True)
    assert published == [0, 1, 2]


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    import transformers

    from tests.engine.driver import TINY

    family = getattr(transformers, architecture)
    return family.config_class(**TINY | changes).to_dict() | {"architectures": [architecture]}


@pytest.mark.parametrize(
    "architecture",
    ["Falcon", "Bloom", "Mpt", "GPTJ", "Mamba", "Jamba", "Qwen3Next"],
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


Tensors = dict[str, torch.Tensor]
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
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = ModelConfig.from_folder(folder)
    for refuse in (
        lambda: check_weights(folder, config),
        lambda: ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=4),
    ):
        with pytest.raises(ModelError) as caught:
            refuse()
        assert named in caught.value.message
        assert "\n" not in caught.value.message


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
