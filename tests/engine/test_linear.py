"""Packed layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch

from engine.linear import PackedLinear, PlainLinear, can_pack, make_linear
from engine.native import few_rows


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.skipif(not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_equals_plain(rows: int, bias: bool) -> None:
    weight, x, residual = random(48, 32, seed=0), random(rows, 32, seed=1), random(rows, 48, seed=2)
    b = random(48, seed=3) if bias else None
    plain, packed = PlainLinear(weight, b), make_linear(weight, b)
    assert isinstance(packed, PackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x))
        exact = residual.float() + torch.nn.functional.linear(
            x.float(), weight.float(), None if b is None else b.float()
        )
        torch.testing.assert_close(packed.add(x, residual), exact.to(torch.bfloat16))
        torch.testing.assert_close(plain.add(x, residual), exact.to(torch.bfloat16), rtol=0.02, atol=0.05)


def test_float32_is_left_plain_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "is_loaded", lambda: False)
    weight, x = random(8, 4, seed=0).float(), random(3, 4, seed=1).float()
    layer = make_linear(weight)
    assert type(layer) is PlainLinear
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))
    assert torch.equal(layer.add(x, torch.ones(3, 8)), layer(x) + 1)
