"""The quantized layers on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.quantization import fp8, int8
from engine.quantization.methods import FP8_CAPABILITY
from tests.engine.driver import close, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rows", [1, 5, 16, 40, int8.FEW_ROWS_CUDA, int8.FEW_ROWS_CUDA + 1, 300])
@pytest.mark.parametrize("shape", [(48, 64), (50, 130), (4096, 4096)], ids=str)
def test_int8_is_the_product_of_the_rounded_weights(rows, shape):
    weight, x = torch.randn(shape, device="cuda"), torch.randn(rows, shape[1], device="cuda")
    integers, scales = int8.quantize(weight)
    layer = int8.Int8Linear(weight, None, int8.Scratch())
    assert close(layer(x), F.linear(x, integers * scales[:, None]))


@pytest.mark.parametrize("rows", [1, 17, 300])
def test_fp8_is_the_product_of_the_rounded_rows_and_weights(rows):
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("the GPU does not multiply fp8")
    x, weight = (torch.randn(n, 256, device="cuda").bfloat16() for n in (rows, 128))
    (x8, x_scales), (w8, w_scales) = fp8.quantize(x), fp8.quantize(weight)
    expected = F.linear(x8.float() * x_scales, w8.float() * w_scales)
    assert (fp8.Fp8Linear(weight, None)(x).float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_a_quantized_model_stays_close_to_the_model(method, make_checkpoint, load_driver):
    base, ids = make_checkpoint(), tokens(60)
    drivers = [load_driver(base, device="cuda", dtype="bfloat16", quantization=how) for how in (None, method)]
    plain, quantized = (driver.logits([(driver.new(60), ids)])[0] for driver in drivers)
    assert (quantized - plain).norm() < 0.3 * plain.norm()
