"""The tensors of a drafter's state as they travel, and what a drafter may rely on when they arrive."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from core.draft_state import DraftState, PackedTensor, TensorType
from core.errors import TransferError

_DTYPES: dict[TensorType, torch.dtype] = {
    "int64": torch.int64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def packed(version: str, tensors: Mapping[str, torch.Tensor]) -> DraftState:
    return DraftState(version, {name: _pack(tensor) for name, tensor in tensors.items()})


def unpacked(state: DraftState) -> dict[str, torch.Tensor]:
    """In memory of their own, on the CPU. Raises TransferError where bytes and shape disagree."""
    return {name: _unpack(name, tensor) for name, tensor in state.tensors.items()}


def expect(state: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """The tensor of this name. Raises TransferError unless it has this dtype and shape, None being any size, and, if it
    is of floats, no number that is none."""
    tensor = state.get(name)
    if tensor is None:
        raise TransferError(f"the draft state has no {name}")
    sizes = zip(tensor.shape, shape, strict=False)
    fits = tensor.ndim == len(shape) and all(wanted in (None, size) for size, wanted in sizes)
    if tensor.dtype != dtype or not fits:
        raise TransferError(f"{name} of the draft state is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}")
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise TransferError(f"{name} of the draft state has numbers that are not finite")
    return tensor


def _pack(tensor: torch.Tensor) -> PackedTensor:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return PackedTensor(_NAMES[tensor.dtype], tuple(tensor.shape), data)


def _unpack(name: str, tensor: PackedTensor) -> torch.Tensor:
    dtype = _DTYPES[tensor.dtype]
    if math.prod(tensor.shape) * dtype.itemsize != len(tensor.data):
        raise TransferError(
            f"{name} of the draft state has {len(tensor.data)} bytes, which is not {tensor.dtype} {list(tensor.shape)}"
        )
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).view(tensor.shape)
