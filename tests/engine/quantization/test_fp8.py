"""fp8 on the arithmetic that PyTorch has on CPUs; that a deployment needs a GPU for it is said at the edge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from core.errors import ConfigError, ModelError
from engine.quantization.fp8 import Fp8Linear, quantize
from engine.quantization.methods import check_method
from engine.runner import ModelRunner


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_that_of_the_rounded_rows_and_weights(rows, biased):
    x, weight = torch.randn(rows, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    residual, bias = torch.randn(rows, 48).bfloat16(), torch.randn(48).bfloat16() if biased else None
    (x8, x_scales), (w8, w_scales) = quantize(x), quantize(weight)
    expected = F.linear(x8.float() * x_scales, w8.float() * w_scales, bias.float() if bias is not None else None)
    layer = Fp8Linear(weight, bias)
    assert (layer(x).float() - expected).norm() < 0.005 * expected.norm()
    assert (layer.add(x, residual).float() - expected - residual).norm() < 0.005 * expected.norm()


def test_rows_and_outputs_of_any_size_keep_their_precision():
    sizes = torch.logspace(-6, 4, 16)[:, None]
    x, weight = (torch.randn(16, 64) * sizes).bfloat16(), (torch.randn(16, 64) * sizes).bfloat16()
    exact = x.float() @ weight.float().T
    errors = (Fp8Linear(weight, None)(x).float() - exact).abs() / (sizes * sizes.T * 8)
    assert errors.max() < 0.15


def test_rows_of_zeros_give_zeros():
    assert not Fp8Linear(torch.zeros(16, 16).bfloat16(), None)(torch.zeros(3, 16).bfloat16()).any()


def test_a_shape_that_can_not_be_multiplied_is_named():
    with pytest.raises(ModelError, match=r"\[40, 64\]"):
        Fp8Linear(torch.zeros(40, 64).bfloat16(), None)


def test_on_a_cpu_it_is_refused_with_what_to_use_instead(make_checkpoint):
    with pytest.raises(ConfigError, match=r"--quantization fp8 needs a GPU.*--quantization int8"):
        ModelRunner.load(make_checkpoint(), device="cpu", quantization="fp8")


def test_other_activations_than_bfloat16_are_refused():
    with pytest.raises(ConfigError, match="not float16; use --dtype bfloat16"):
        check_method("fp8", "cuda", "float16")
    check_method("fp8", "cuda", "auto")
    check_method("int8", "cpu", "float32")
