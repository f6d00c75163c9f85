"""The layers of a method, for engine.linears."""

from __future__ import annotations

from functools import partial

import torch

from engine.linear import MakeLinear, dense_maker
from engine.quantization.fp8 import Fp8Linear, check_gpu
from engine.quantization.int8 import Int8Linear, Scratch
from engine.quantization.methods import Method, check_method


def linear_maker(method: Method | None, device: torch.device, dtype: str, native: bool = False) -> MakeLinear:
    """Makes the projections of one model. Raises ConfigError where the device can't run them."""
    check_method(method, device.type, dtype)
    if method == "int8":
        return partial(Int8Linear, scratch=Scratch())
    if method == "fp8":
        check_gpu(device)
        return Fp8Linear
    return dense_maker(native)
