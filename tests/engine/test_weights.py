"""A checkpoint is loaded whole or refused by the name of what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from core.errors import ConfigError, ModelError
from engine.linear import Linear
from engine.model_config import ModelConfig
from engine.runner import ModelRunner
from engine.weights import fingerprint

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny[1], tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def load(folder: Path) -> ModelRunner:
    return ModelRunner.load(folder, dtype="float32", device="cpu", kv_cache_bytes=2**20)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update({NORM: torch.zeros(7)}), f"tensor {NORM} has shape (7,)"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "tensor model.extra is not part"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: Callable[[Tensors], object], named: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert named in caught.value.message


def test_a_copy_of_the_tied_head_and_derived_tensors_are_let_pass(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load(folder)


def test_shards_are_read_as_one(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    save_file({n: tensors[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    load(folder)


def test_a_pickle_is_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"dtype": "int8"}, "dtype"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope_type"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused_by_its_field(
    folder: Path, settings: dict[str, Any], named: str
) -> None:
    configure(folder, **settings)
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_folder(folder)
    assert named in caught.value.message
    assert "\n" not in caught.value.message


def test_the_older_spelling_of_rope_is_understood(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_parameters")
    scaling = {"type": "linear", "factor": 2.0}
    config = ModelConfig.from_dict({**raw, "rope_theta": 5e5, "rope_scaling": scaling})
    assert (config.rope["rope_type"], config.rope["rope_theta"], config.rope["factor"]) == ("linear", 5e5, 2.0)


def test_a_cache_too_small_for_one_block_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not hold one block"):
        ModelRunner.load(folder, dtype="float32", device="cpu", kv_cache_bytes=10)


def test_the_fingerprint_is_of_the_weights_not_of_the_folder(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    configure(elsewhere, transformers_version="9.9", _name_or_path="x")
    assert fingerprint(elsewhere) == before
    rewrite(elsewhere, lambda t: t[NORM].add_(1.0))
    assert fingerprint(elsewhere) != before


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears_equal_plain_ones(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator, dtype=torch.bfloat16)
    b = torch.randn(48, generator=generator, dtype=torch.bfloat16) if bias else None
    x = torch.randn(rows, 32, generator=generator, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(Linear(weight, b)(x), torch.nn.functional.linear(x, weight, b))
