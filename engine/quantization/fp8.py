"""fp8 (E4M3) weights with a scale per output, and activations with a scale per row, found as they come:
y = s_x s_w (X8 W8^T) + b. Sums are taken in float32 or better by the device. GPUs that multiply fp8 only."""

from __future__ import annotations

import torch

from core.errors import ConfigError, ModelError
from engine.quantization.methods import FP8_CAPABILITY

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
_MULTIPLE = 16
"""Of which both sides of a weight have to be multiples."""
_AT_A_TIME = 2**24
"""Weights that are quantized at a time: the copy in float32 stays small beside the model."""
_TINY = 1e-12
"""The least scale: a row of zeros has none of its own."""


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([rows, columns] in fp8, scales [rows, 1] in float32)."""
    scales = rows.abs().amax(dim=1, keepdim=True).float().div_(LARGEST).clamp_(min=_TINY)
    return (rows / scales).to(FP8), scales


class Fp8Linear:
    """Implements engine.linear.Linear. Raises ModelError for a shape that the device can't multiply."""

    __slots__ = ("_scales", "_weight", "bias")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if any(size % _MULTIPLE for size in weight.shape):
            raise ModelError(
                f"--quantization fp8: a layer of shape {list(weight.shape)} is no multiple of {_MULTIPLE} each way; "
                "use --quantization int8, or fewer devices per layer"
            )
        parts = [quantize(part) for part in torch.split(weight, max(1, _AT_A_TIME // weight.shape[1]))]
        self._weight = torch.cat([part for part, _ in parts]).t()  # [inputs, outputs], each column contiguous
        self._scales = torch.cat([scales for _, scales in parts]).t()  # [1, outputs]
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scales = quantize(x)
        y = torch._scaled_mm(quantized, self._weight, scales, self._scales, out_dtype=x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self(x).add_(residual)


def check_gpu(device: torch.device) -> None:
    """Raise ConfigError for a GPU that can't multiply fp8."""
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        raise ConfigError(
            f"--quantization fp8 needs compute capability {'.'.join(map(str, FP8_CAPABILITY))}, and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, found))}; use --quantization int8"
        )
