"""What a drafter has learned of a prompt, as it travels with the KV of the prompt to the worker that decodes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_STATE_BYTES = 128 * 2**20
"""Of all drafters of a sequence together: half of what a message may have. What is larger stays where it is."""

TensorType = Literal["int64", "float32", "float16", "bfloat16"]
_Size = Annotated[int, Meta(ge=0)]


class PackedTensor(Struct, frozen=True, array_like=True):
    dtype: TensorType
    shape: tuple[_Size, ...]
    data: bytes
    """Row-major, little-endian."""


class DraftState(Struct, frozen=True):
    """Of one drafter, which is of use to the same one in the same version only."""

    version: str
    tensors: dict[str, PackedTensor]

    @property
    def nbytes(self) -> int:
        return sum(len(tensor.data) for tensor in self.tensors.values())


DraftStates = dict[str, DraftState]
"""By drafter."""
