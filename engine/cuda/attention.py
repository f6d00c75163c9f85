"""Attention on a GPU by kernels that read K and V where they lie in the cache.

A prompt with nothing cached before it attends among its own rows, by PyTorch's flash attention. The other sequences
attend together by the kernel. Steps with a token tree go by engine.attention: kernels know no trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from engine.attention import FreshChunk, PagedAttention, Part
from engine.cuda.choice import Kernel
from engine.cuda.inputs import Inputs
from engine.cuda.paged import MakeStatic, StaticPaged
from engine.step import StepBatch
from engine.visibility import Visibility

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""K and V of rows, [rows, 2, kv_heads, head_size], to a layer of the cache, [2, blocks, block_size, kv_heads,
head_size], at slots [rows]."""


class MakeParts(Protocol):
    def __call__(
        self, sequences: list[int], batch: StepBatch, cache: torch.Tensor, window: int | None
    ) -> Iterator[Part]:
        """How some sequences of a step, of any numbers of rows, attend to the cache, the pool's."""
        ...


class KernelAttention(PagedAttention):
    """Implements engine.attention.Attention for any step."""

    def __init__(
        self,
        batch: StepBatch,
        cache: torch.Tensor,
        on_written: Callable[[int], None] | None = None,
        first_layer: int = 0,
        *,
        make: MakeParts,
    ) -> None:
        super().__init__(batch, cache, on_written, first_layer)
        self._make = make

    def _parts(self, window: int | None) -> Iterator[Part]:
        batch = self._batch
        if Visibility(batch, self._cache.shape[3]).trees:
            yield from super()._parts(window)
            return
        paged: list[int] = []
        for sequence, (count, context) in enumerate(zip(np.diff(batch.query_starts), batch.context_lens, strict=True)):
            if count > 1 and context == 0 and (window is None or count <= window):
                start = int(batch.query_starts[sequence])
                yield FreshChunk(start, start + int(count))
            else:
                paged.append(sequence)
        if paged:
            yield from self._make(paged, batch, self._cache, window)


class StaticAttention:
    """Implements engine.attention.Attention for captured steps of one number of rows."""

    def __init__(self, inputs: Inputs, cache: torch.Tensor, paged: StaticPaged, write: Write) -> None:
        """`cache`: KVPool.data, of all layers of the model."""
        self._slots = inputs.slots
        self._layers = cache.unbind(0)
        self._paged = paged
        self._write = write

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        kv: torch.Tensor,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        cache = self._layers[layer]
        self._write(kv, cache, self._slots)
        return self._paged(query, cache, window, (scale, softcap))


def make_parts(kernel: Kernel, device: torch.device) -> MakeParts | None:
    """Of eager steps; None for the way of engine.attention."""
    if kernel == "flashinfer":
        from engine.cuda.flashinfer import FlashInfer

        return FlashInfer(device).parts
    if kernel == "triton":
        from engine.cuda.triton_paged import triton_parts

        return triton_parts
    return None


def make_static(kernel: Kernel) -> tuple[MakeStatic, Write]:
    """Of captured steps: there are none with sdpa."""
    from engine.cuda import kernels

    if kernel == "flashinfer":
        from engine.cuda.flashinfer import StaticFlashInfer

        return StaticFlashInfer, kernels.write
    from engine.cuda.triton_paged import StaticTriton

    return StaticTriton, kernels.write
