"""Linear layers. On CPU in bfloat16 the weight is kept only in oneDNN's own layout: at the batch sizes of decoding that
is twice as fast as F.linear, which reorders the weight in every call. In float32 few rows have a kernel of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from engine.native import few_rows
from engine.native.linear import NativeLinear


class Linear(Protocol):
    """y = x W^T + b; x: [rows, in_features], y: [rows, out_features]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + y, as a new tensor."""
        ...


MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""From weight ([outputs, inputs], which the caller lets go of) and bias."""


class PlainLinear:
    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self(x).add_(residual)


MOST_FEW = 32
"""Rows; of 48 it took 0.7 to 0.95 of the time of F.linear, of 64 as long."""


class FewRowsLinear(PlainLinear):
    """In float32. F.linear takes two to three times as long for 2 to 16 rows as for one, and hardly less on two cores;
    the kernel takes little longer than reading the weight does for up to 8."""

    __slots__ = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return few_rows.product(x, self.weight, self.bias) if len(x) <= MOST_FEW else super().__call__(x)


class PackedLinear:
    """The sum of `add` is taken in float32, before rounding."""

    __slots__ = ("_binary", "_unary", "bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._unary(x, self.weight, self.bias, "none", [], "")
        return y

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._binary(x, residual, self.weight, self.bias, "add")
        return y


def can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest layer for `weight` ([out_features, in_features]), which the caller should then let go of."""
    if can_pack(weight):
        return PackedLinear(weight, bias)
    few = weight.device.type == "cpu" and weight.dtype is torch.float32 and few_rows.is_loaded()
    return FewRowsLinear(weight.contiguous(), bias) if few else PlainLinear(weight, bias)


def dense_maker(native: bool) -> MakeLinear:
    """Of layers that are not quantized. `native`: engine.native is loaded, and rows are bfloat16 on the CPU."""
    return NativeLinear.make if native else make_linear
