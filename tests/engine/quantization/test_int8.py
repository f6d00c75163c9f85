"""int8 rounds the weights of projections, and nothing else."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.lora.checkpoint import read_adapters
from engine.quantization import int8
from engine.quantization.int8 import FEW_ROWS_CPU, Int8Linear, Scratch, quantize
from tests.engine.driver import Driver, close, tokens
from tests.engine.lora.peft import merge, save_adapter
from tests.engine.parallel.ranks import Ranks
from tests.engine.quantization.rounded import rounded

MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2, biases": {"architecture": "Qwen2"},
    "phi3, fused projections": {"architecture": "Phi3", "pad_token_id": None},
    "mixtral, experts": {"architecture": "Mixtral", "num_local_experts": 4},
}


@given(seed=st.integers(0, 2**31), size=st.floats(1e-4, 1e4))
def test_no_weight_is_off_by_more_than_half_a_step(seed, size):
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) * size
    integers, scales = quantize(weight)
    assert ((weight - integers * scales[:, None]).abs() <= scales[:, None] * 0.50001).all()
    assert (integers.abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_zeros(dtype):
    integers, scales = quantize(torch.zeros(3, 16, dtype=dtype))
    assert not integers.any()
    assert scales.isfinite().all()


def test_a_weight_is_quantized_alike_in_one_piece_and_in_many(monkeypatch):
    weight = torch.randn(50, 64)
    whole = quantize(weight)
    monkeypatch.setattr(int8, "_AT_A_TIME", 7 * 64)
    for one, other in zip(whole, quantize(weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [1, FEW_ROWS_CPU, FEW_ROWS_CPU + 1, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_few_and_many_rows_are_the_same_product(rows, biased):
    weight, bias, x, residual = torch.randn(48, 64), torch.randn(48), torch.randn(rows, 64), torch.randn(rows, 48)
    integers, scales = quantize(weight)
    layer = Int8Linear(weight, bias if biased else None, Scratch())
    expected = F.linear(x, integers * scales[:, None], bias if biased else None)
    assert close(layer(x), expected)
    assert close(layer.add(x, residual), expected + residual)


def test_layers_of_different_sizes_share_the_room_for_the_largest():
    scratch = Scratch()
    small, large = torch.randn(16, 16), torch.randn(48, 64)
    layers = [Int8Linear(weight, None, scratch) for weight in (small, large)]
    for weight, layer in zip((small, large), layers, strict=True):
        x = torch.randn(30, weight.shape[1])
        assert (layer(x) - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()


def test_in_float16_sums_stay_in_range():
    x = torch.full((30, 4096), 4.0, dtype=torch.float16)
    y = Int8Linear(torch.full((8, 4096), 0.5, dtype=torch.float16), None, Scratch())(x)
    assert torch.allclose(y, torch.tensor(8192.0, dtype=torch.float16), rtol=1e-2)


def test_the_weight_it_was_made_from_is_let_go_of():
    weight = torch.randn(16, 16)
    known = weakref.ref(weight)
    layer = Int8Linear(weight, None, Scratch())
    del weight
    assert known() is None
    assert layer.weight.dtype is torch.int8


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_transformers_with_rounded_projections(
    changes, make_checkpoint, load_driver, reference, tmp_path
):
    base = make_checkpoint(**changes)
    driver, ids = load_driver(base, quantization="int8"), tokens(60)
    expected = reference(rounded(base, tmp_path / "rounded"), ids)
    stream = driver.new(60)
    parts = [driver.logits([(stream, ids[a:b])])[0] for a, b in ((0, 40), (40, 43), (43, 59), (59, 60))]
    assert close(torch.cat(parts), expected)
    assert not close(expected, reference(base, ids))


def test_adapters_are_added_to_the_rounded_weights_as_they_are(make_checkpoint, load_driver, reference, tmp_path):
    base = make_checkpoint()
    adapter = save_adapter(tmp_path / "adapter", base)
    merged = merge(adapter, rounded(base, tmp_path / "rounded"), tmp_path / "merged")
    driver = load_driver(base, quantization="int8", adapters=read_adapters({"a": str(adapter)}, base))
    ids = tokens(40)
    [logits] = driver.logits([(driver.new(40), ids)], adapters=("a",))
    assert close(logits, reference(merged, ids))


def test_caches_of_quantized_and_plain_models_are_not_joined(make_checkpoint, load_driver):
    plain, quantized = (load_driver(make_checkpoint(), quantization=q).runner.layout for q in (None, "int8"))
    assert plain.fingerprint != quantized.fingerprint


def test_split_over_devices_it_rounds_no_more_than_on_one(make_checkpoint, load_driver, tmp_path):
    base, ids = make_checkpoint(num_attention_heads=4), tokens(40)
    plain, whole = (load_driver(base, quantization=how) for how in (None, "int8"))
    with Ranks(base, tmp_path, 2, 2, quantization="int8") as ranks:
        exact, alone, split = (d.logits([(d.new(40), ids)])[0] for d in (plain, whole, Driver(ranks)))
    assert 0 < (split - exact).norm() < 1.2 * (alone - exact).norm()
