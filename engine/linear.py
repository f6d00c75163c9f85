"""Linear layers: oneDNN-prepacked in bfloat16 on CPU, where packing on each call costs as much as the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the usual name
from torch import Tensor


class Linear:
    """y = x Wᵀ + b. Owns the weight [out, in]; on CPU in bfloat16 it keeps only the packed copy."""

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
        if self._packed:
            with torch.inference_mode():
                weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:  # [tokens, in] -> [tokens, out]
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)
