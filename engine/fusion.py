"""Which neighbouring parts of a layer run as one kernel. Parts that can't be fused - adapted, quantized, split over
devices, not native - run one after the other."""

from __future__ import annotations

from typing import Literal

import torch

from engine.layers import Branch, GeGLU, HeadNorms, Norm, OffsetNorm, RMSNorm, SwiGLU
from engine.linear import Linear
from engine.linears import Projection
from engine.native.linear import GatedLinear, NativeLinear, can_gate
from engine.native.rope import NativeRotate
from engine.rope import Rope, Rotate, keep

Activation = Literal["silu", "gelu_tanh"]


class PreNormed:
    """A branch of the normed input."""

    __slots__ = ("_inner", "_norm")

    def __init__(self, norm: Norm, inner: Branch) -> None:
        self._norm = norm
        self._inner = inner

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner(self._norm(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._inner.add(self._norm(x), residual)


class GatedMLP:
    """arXiv:2002.05202, with norm, product, activation and gate in one kernel."""

    __slots__ = ("down", "gated")

    def __init__(self, gated: GatedLinear, down: Linear) -> None:
        self.gated = gated
        self.down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gated(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down.add(self.gated(x), residual)


def normed(norm: Norm, linear: Linear) -> Projection:
    """linear(norm(x))."""
    if isinstance(linear, NativeLinear) and isinstance(norm, RMSNorm | OffsetNorm):
        return linear.after(norm.scale, norm.eps)
    return PreNormed(norm, linear)


def gated_mlp(norm: Norm, gate_up: Linear, down: Linear, inner: int, activation: Activation) -> Branch:
    """down(activation(gate(norm(x))) * up(norm(x))), gate and up of `inner` outputs each."""
    if isinstance(gate_up, NativeLinear) and can_gate(gate_up) and isinstance(norm, RMSNorm | OffsetNorm):
        return GatedMLP(GatedLinear(gate_up, activation, norm.scale, norm.eps), down)
    return PreNormed(norm, (SwiGLU if activation == "silu" else GeGLU)(gate_up, down, inner))


def wide_head(norm: Norm, head: Projection) -> Projection:
    """head(norm(x)), in float32 where that costs nothing."""
    if isinstance(head, NativeLinear) and isinstance(norm, RMSNorm | OffsetNorm):
        return head.after(norm.scale, norm.eps).wide
    return lambda x: head(norm(x))


def rotation(rope: Rope | None, scales: torch.Tensor | None, eps: float, native: bool) -> Rotate:
    """An RMSNorm of each query and key head, if there are `scales` ([heads, head_size]), and then the rotation."""
    if native and rope is not None:
        return NativeRotate(scales, eps)
    rotate_ = keep if rope is None else rope.rotate_
    return rotate_ if scales is None else HeadNorms(scales, eps, rotate_)
