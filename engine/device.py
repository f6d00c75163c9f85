"""Where a model runs, and in which type."""

from __future__ import annotations

import torch


def serving_device(name: str) -> torch.device:
    """"auto" is the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def serving_dtype(name: str, device: torch.device) -> str:
    """"auto" is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return "bfloat16"
