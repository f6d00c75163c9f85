"""Adapters that can't be served are refused by name before anything is loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ConfigError, ModelError
from engine.lora.adapter_config import AdapterConfig
from engine.lora.checkpoint import read_adapters
from tests.engine.lora.peft import save_adapter

LAYER = "base_model.model.model.layers.1."


@pytest.fixture
def base(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def adapter(tmp_path, base):
    return save_adapter(tmp_path / "adapter", base)


def read(adapter, base, **options):
    return read_adapters({"mine": str(adapter)}, base, **options)


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_knows_its_modules_and_scales(adapter, base):
    [found] = read(adapter, base)
    assert (found.name, len(found.modules)) == ("mine", 3 * 7)
    assert {module.scale for module in found.modules.values()} == {8 / 4}


def test_without_adapters_nothing_is_read(tmp_path):
    assert read_adapters({}, tmp_path / "no model") == []


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"lora_alpha": 3}, 3 / 4),
        ({"alpha_pattern": {"q_proj": 5}}, 5 / 4),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 5}}, 8 / 4),
        ({"alpha_pattern": {"_proj": 5}}, 8 / 4),
        ({"alpha_pattern": {r"model\..*\.q_proj": 6, "q_proj": 5}}, 6 / 4),
    ],
)
def test_scales_follow_the_fields_and_patterns(adapter, changes, scale):
    configure(adapter, **changes)
    assert AdapterConfig.from_folder(adapter).scale_of("model.layers.1.self_attn.q_proj") == pytest.approx(scale)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "`\\$.r`"),
        ({"r": "4"}, "`\\$.r`"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"something_new": 1}, "something_new 1"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern '\\('"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern"),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(adapter, base, changes, named):
    configure(adapter, **changes)
    with pytest.raises(ModelError, match=rf"adapter_config.json.*{named}"):
        read(adapter, base)


def test_fields_that_say_nothing_about_the_arithmetic_are_let_through(adapter, base):
    configure(
        adapter, task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights="gaussian", use_dora=False, megatron=None
    )
    assert read(adapter, base)


def test_a_rank_above_the_limit_names_the_flag(adapter, base):
    with pytest.raises(ConfigError, match="mine: the adapter has rank 4; raise --max-lora-rank 3"):
        read(adapter, base, max_rank=3)


def test_the_limit_is_for_every_module(tmp_path, base):
    wide = save_adapter(tmp_path / "wide", base, ranks={"q_proj": 6}, rank_pattern={"q_proj": 6})
    with pytest.raises(ConfigError, match="rank 6"):
        read(wide, base, max_rank=5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(LAYER + "mlp.up_proj.lora_B.weight"), "mlp.up_proj.lora_B.weight is missing"),
        (
            lambda t: t.update({LAYER + "mlp.up_proj.lora_A.weight": torch.zeros(4, 9)}),
            r"lora_A.weight has shape \[4, 9\]",
        ),
        (lambda t: t.update({LAYER + "mlp.up_proj.lora_B.weight": torch.zeros(64, 3)}), r"shape \[64, 3\].* \[64, 4\]"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}),
            "lm_head.lora_A.weight has no",
        ),
        (
            lambda t: t.update({LAYER + "input_layernorm.weight": torch.zeros(48)}),
            "input_layernorm.weight has no place",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 48)}),
            "model.layers.7.mlp.up_proj, which this model does not have",
        ),
        (
            lambda t: t.update({LAYER + "mlp.up_proj.lora_A.weight": torch.zeros(4, 48, dtype=torch.int8)}),
            "stored as I8",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(adapter, base, spoil, message):
    change(adapter, spoil)
    with pytest.raises(ModelError, match=message):
        read(adapter, base)


def test_pickles_are_refused(adapter, base):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"mine: .* pickled weights only"):
        read(adapter, base)


def test_a_folder_that_is_not_there_is_named(tmp_path, base):
    with pytest.raises(ModelError, match=r"mine: .*nowhere is no folder"):
        read(tmp_path / "nowhere", base)


def test_a_file_cut_short_is_named(adapter, base):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read(adapter, base)


def test_reading_an_adapter_needs_no_torch(adapter, base):
    code = (
        "import sys; from engine.lora.checkpoint import read_adapters; from pathlib import Path\n"
        f"assert read_adapters({{'mine': {str(adapter)!r}}}, Path({str(base)!r}))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
