"""Parts that families share. Plain callables: in eager mode on CPU, dispatch is what a decode step waits for."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from engine.linear import Linear
from engine.rope import Angles, Rope


class RMSNorm:
    """arXiv:1910.07467. [rows, hidden] -> the same."""

    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._shape = tuple(weight.shape)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, self._shape, self._weight, self._eps)


class HeadNorms:
    """RMSNorm of each query and key head, then RoPE, in place."""

    __slots__ = ("_eps", "_rotate_", "_scales", "_shape")

    def __init__(self, scales: torch.Tensor, eps: float, rope: Rope) -> None:
        """`scales`: [query heads + key heads, head_size]."""
        self._scales = scales
        self._shape = tuple(scales.shape[1:])
        self._eps = eps
        self._rotate_ = rope.rotate_

    def __call__(self, heads: torch.Tensor, angles: Angles) -> None:
        """heads: [tokens, query heads + key heads, head_size]."""
        torch.mul(torch.rms_norm(heads, self._shape, None, self._eps), self._scales, out=heads)
        self._rotate_(heads, angles)


class SwiGLU:
    """arXiv:2002.05202: down(silu(gate(x)) * up(x)), gate and up as one matrix."""

    __slots__ = ("_down", "_gate_up", "_size")

    def __init__(self, gate_up: Linear, down: Linear, intermediate_size: int) -> None:
        self._gate_up = gate_up
        self._down = down
        self._size = intermediate_size

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + mlp(x)."""
        gate_up = self._gate_up(x)  # [rows, 2 * intermediate]
        hidden = F.silu(gate_up[:, : self._size]).mul_(gate_up[:, self._size :])
        return self._down.add(hidden, residual)
