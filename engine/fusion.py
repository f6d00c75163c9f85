"""Which neighbouring parts of a layer run as one kernel. Parts that can't be fused - quantized, split over devices, not
native, or adapted, in a step that names an adapter - run one after the other."""

from __future__ import annotations

from typing import Any

import torch

from engine.layers import Branch, Gate, GatedMLP, HeadNorms, Norm, PostNormed, RMSNorm
from engine.linear import Linear
from engine.linears import Projection
from engine.lora.adapters import AdaptedLinear
from engine.model_config import Activation
from engine.native.linear import GatedLinear, GateUp, NativeLinear, can_gate
from engine.native.pages import enlarge
from engine.native.rope import NativeRotate
from engine.rope import Rope, Rotate, keep


class PreNormed:
    """A branch of the normed input. `bare` is the same without adapters, where the branch has any."""

    __slots__ = ("_inner", "_norm", "bare")

    def __init__(self, norm: Norm, inner: Branch, bare: Projection | None = None) -> None:
        self._inner = inner
        self._norm = norm
        self.bare = bare

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner(self._norm(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._inner.add(self._norm(x), residual)


def bare(part: Any) -> Any:
    """What a part of a layer is in steps that name no adapter: over the same weights, and fused where it can be."""
    if isinstance(part, AdaptedLinear):
        return part.base
    if isinstance(part, PreNormed):
        return part.bare or part
    if isinstance(part, PostNormed):
        return PostNormed(bare(part.inner), part.norm)
    return GatedMLP(part.gated, bare(part.down)) if isinstance(part, GatedMLP) else part


def normed(norm: Norm, linear: Linear) -> Projection:
    """linear(norm(x))."""
    if isinstance(linear, NativeLinear) and isinstance(norm, RMSNorm):
        return linear.after(norm.scale, norm.eps)
    return PreNormed(norm, linear, normed(norm, linear.base) if isinstance(linear, AdaptedLinear) else None)


def gated_mlp(norm: Norm, gate_up: Linear, down: Linear, activation: Activation) -> Branch:
    """down(activation(gate(norm(x))) * up(norm(x))), gate and up of as many outputs each."""
    own = bare(gate_up)
    if not can_gate(own) or not isinstance(norm, RMSNorm):
        return PreNormed(norm, GatedMLP(Gate(gate_up, activation), down))
    gated = GatedLinear(own, activation, norm.scale, norm.eps)
    if not isinstance(gate_up, AdaptedLinear):
        return GatedMLP(gated, down)
    adapted = Gate(gate_up.over(GateUp(gated)), activation)
    return PreNormed(norm, GatedMLP(adapted, down), GatedMLP(gated, bare(down)))


def wide_head(norm: Norm, head: Projection) -> Projection:
    """head(norm(x)), in float32 where that costs nothing."""
    if isinstance(head, NativeLinear) and isinstance(norm, RMSNorm):
        enlarge([head.packed])
        return head.after(norm.scale, norm.eps).wide
    return lambda x: head(norm(x))


def rotation(rope: Rope | None, scales: torch.Tensor | None, eps: float, native: bool) -> Rotate:
    """An RMSNorm of each query and key head, if there are `scales` ([heads, head_size]), and then the rotation."""
    if native and rope is not None:
        return NativeRotate(scales, eps)
    rotate_ = keep if rope is None else rope.rotate_
    return rotate_ if scales is None else HeadNorms(scales, eps, rotate_)
