"""Weight-only int8, symmetric, with a scale per output: W ~ diag(s) Q, so that y = (x Q^T) s + b.

A few rows multiply Q as it is. For more, Q is first written out in the type of the activations, in which its integers
are exact, and the usual product takes over: PyTorch's operator on CPU costs in proportion to the rows. Measured on two
cores of an EPYC with AVX512-BF16, weights of 3072 x 576, times in µs on one thread: 1 row 240 against 234 of packed
bfloat16 (374 by writing out), 4 rows 362 (410), 8 rows 567 (474), 16 rows 935 (600), 256 rows 4,491 written out against
4,154 packed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

LEVELS = 127
FEW_ROWS_CPU = 6
FEW_ROWS_CUDA = 64
_AT_A_TIME = 2**24
"""Weights that are quantized at a time: the copy in float32 stays small beside the model."""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [rows, inputs], Q [outputs, inputs] int8, s [outputs]) -> [rows, outputs], of few rows."""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q [outputs, inputs] int8, s [outputs] in the weight's type). |W - s Q| <= s / 2, but for the rounding of s."""
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
    rows = max(1, _AT_A_TIME // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float()
        scale = (part.abs().amax(dim=1) / LEVELS).to(weight.dtype)
        scale[scale == 0] = 1  # a row of zeros, or one too small for the type
        integers[start : start + rows] = (part / scale.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
        scales[start : start + rows] = scale
    return integers, scales


class Scratch:
    """Room for the largest weight of a model, written out. Layers run one after the other, so they share it."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def reserve(self, items: int, dtype: torch.dtype, device: torch.device) -> None:
        if self._buffer is None or self._buffer.numel() < items:
            self._buffer = torch.empty(items, dtype=dtype, device=device)

    def written_out(self, integers: torch.Tensor) -> torch.Tensor:
        assert self._buffer is not None, "no layer has reserved room"
        return self._buffer[: integers.numel()].view(integers.shape).copy_(integers)


class Int8Linear:
    """Implements engine.linear.Linear."""

    __slots__ = ("_few", "_few_rows", "_scratch", "bias", "scales", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self.weight, self.scales = quantize(weight)
        self.bias = bias
        self._few, self._few_rows = _product_of_few_rows(weight.device)
        self._scratch = scratch
        scratch.reserve(weight.numel(), weight.dtype, weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._few(x, self.weight, self.scales) if len(x) <= self._few_rows else self._many(x)
        return y if self.bias is None else y.add_(self.bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self(x).add_(residual)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._scratch.written_out(self.weight)
        if x.dtype is torch.float16:  # sums of products with integers would leave its range
            return F.linear(x, weight.mul_(self.scales[:, None]))
        return F.linear(x, weight).mul_(self.scales)


def _product_of_few_rows(device: torch.device) -> tuple[Product, int]:
    if device.type == "cuda":
        from engine.quantization.int8_triton import product  # Triton comes with PyTorch for CUDA only

        return product, FEW_ROWS_CUDA
    few: Product = torch.ops.aten._weight_int8pack_mm.default
    return few, FEW_ROWS_CPU
