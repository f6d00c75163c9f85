"""Rotary embedding and the norms of heads by our kernel."""

from __future__ import annotations

import torch

from engine.rope import Angles


class NativeRotate:
    """Implements engine.rope.Rotate: an RMSNorm of each head if there is a scale for it, then the rotation."""

    __slots__ = ("_run", "eps", "scales")

    def __init__(self, scales: torch.Tensor | None = None, eps: float = 0.0) -> None:
        """`scales`: [heads, head_size]."""
        self.scales = None if scales is None else scales.float().contiguous()
        self.eps = eps
        self._run = torch.ops.slipstream.rotate.default

    def __call__(self, heads: torch.Tensor, angles: Angles) -> None:
        self._run(heads, *angles, self.scales, self.eps)
