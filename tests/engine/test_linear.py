"""Packed layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch

from engine.linear import FewRowsLinear, PackedLinear, PlainLinear, can_pack, make_linear


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


@pytest.mark.parametrize("rows", range(9))
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_give_what_many_do(rows: int, bias: bool) -> None:
    weight, x, residual = (random(*shape, seed=rows).float() for shape in ((48, 32), (rows, 32), (rows, 48)))
    b = random(48, seed=3).float() if bias else None
    plain, few = PlainLinear(weight, b), FewRowsLinear(weight, b)
    before = x.clone(), residual.clone()
    for found, expected in ((few(x), plain(x)), (few.add(x, residual), plain.add(x, residual))):
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(), "views are taken of it"
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize(("capability", "kind"), [("AVX2", FewRowsLinear), ("AVX512", PlainLinear)])
def test_few_rows_are_turned_where_that_is_known_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, capability: str, kind: type[PlainLinear]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert type(make_linear(torch.zeros(8, 4))) is kind
    assert type(make_linear(torch.zeros(8, 4, dtype=torch.float16))) is PlainLinear


def test_float32_is_left_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    weight, x = random(8, 4, seed=0).float(), random(3, 4, seed=1).float()
    layer = make_linear(weight)
    assert isinstance(layer, PlainLinear)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))
    assert torch.equal(layer.add(x, torch.ones(3, 8)), layer(x) + 1)
