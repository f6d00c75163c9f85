"""The names of --quantization and what each needs. Free of torch: the command line refuses what can't be run."""

from __future__ import annotations

import re
from typing import Literal, get_args

from core.errors import ConfigError

Method = Literal["int8", "fp8"]
METHODS: tuple[Method, ...] = get_args(Method)

_PROJECTION = re.compile(r"(_proj|\.experts\.\d+\.w[123])\.weight$")

FP8_CAPABILITY = (8, 9)
"""Compute capability from which a GPU multiplies fp8 matrices."""


def check_method(method: Method | None, device_type: str, dtype: str) -> None:
    """Raise ConfigError unless the layers of `method` run on such a device; `dtype` is that of the activations."""
    if method != "fp8":
        return
    if device_type != "cuda":
        raise ConfigError("--quantization fp8 needs a GPU; on a CPU use --quantization int8")
    if dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"--quantization fp8 computes in bfloat16, not {dtype}; use --dtype bfloat16")


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor of a checkpoint is the weight of a layer that a method replaces."""
    return len(shape) > 1 and _PROJECTION.search(name) is not None
