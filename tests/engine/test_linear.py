"""Packed layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch

from engine.linear import PackedLinear, PlainLinear, can_pack, make_linear


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_equals_plain(dtype: torch.dtype, rows: int, bias: bool) -> None:
    shapes = (48, 32), (rows, 32), (rows, 48)
    weight, x, residual = (random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    if not can_pack(weight):
        pytest.skip(f"oneDNN has no {dtype} here")
    b = random(48, seed=3).to(dtype) if bias else None
    plain, packed = PlainLinear(weight, b), make_linear(weight, b)
    assert isinstance(packed, PackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x))
        exact = residual.float() + torch.nn.functional.linear(
            x.float(), weight.float(), None if b is None else b.float()
        )
        torch.testing.assert_close(packed.add(x, residual), exact.to(dtype))
        wide = {"rtol": 0.02, "atol": 0.05} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(plain.add(x, residual), exact.to(dtype), **wide)


def test_a_dtype_that_onednn_does_not_compute_in_is_left_plain() -> None:
    weight, x = random(8, 4, seed=0).double(), random(3, 4, seed=1).double()
    layer = make_linear(weight)
    assert isinstance(layer, PlainLinear)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))
    assert torch.equal(layer.add(x, torch.ones(3, 8)), layer(x) + 1)
