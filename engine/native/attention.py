"""PagedAttention by our kernel: K and V are read where they lie in the cache, whatever mix of decoding, chunks and
token trees the step has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.step import StepBatch
from engine.visibility import Visibility


class NativeAttention:
    """Implements engine.attention.Attention for bfloat16 on the CPU."""

    def __init__(
        self,
        batch: StepBatch,
        cache: torch.Tensor,
        on_written: Callable[[int], None] | None = None,
        first_layer: int = 0,
    ) -> None:
        """`cache`: KVPool.data, [layers, 2, blocks, block_size, kv_heads, head_size], from `first_layer` of the model
        on."""
        self._batch = batch
        self._layers = cache.unbind(0)
        self._slots = torch.from_numpy(batch.slots)
        self._block_size = cache.shape[3]
        self._blocks = torch.from_numpy(np.concatenate(batch.block_tables))
        self._scale = cache.shape[5] ** -0.5
        self._plans: dict[int | None, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._on_written = on_written
        self._first_layer = first_layer
        self._run = torch.ops.slipstream.attention.default

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        kv: torch.Tensor,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        mixed: torch.Tensor = self._run(query, kv, *self.arguments(layer, window, scale, softcap))
        self.written(layer)
        return mixed

    def arguments(
        self, layer: int, window: int | None, scale: float | None, softcap: float | None
    ) -> tuple[torch.Tensor | float | None, ...]:
        """What the kernel takes after query and kv: cache, slots, spans, blocks, masks, scale, softcap, window."""
        spans, masks = self._plans.get(window) or self._plan(window)
        cache = self._layers[layer - self._first_layer]
        scale = self._scale if scale is None else scale
        return cache, self._slots, spans, self._blocks, masks, scale, softcap or 0.0, window or 0

    def written(self, layer: int) -> None:
        """The layer's K and V are in the cache."""
        if self._on_written is not None:
            self._on_written(layer)

    def _plan(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the kernel wants of each sequence (csrc/ops.cpp), for all layers of this window."""
        batch, sight = self._batch, Visibility(self._batch, self._block_size, window)
        counts = np.diff(batch.query_starts)
        tables = np.cumsum([0, *map(len, batch.block_tables)])[:-1]
        spans = np.zeros((len(counts), 6), np.int64)
        spans[:, 0], spans[:, 1], spans[:, 2] = batch.query_starts[:-1], counts, batch.context_lens
        spans[:, 3], spans[:, 4] = tables, -1
        masks, size = [], 0
        for sequence in sight.trees:
            first = int(sight.first_blocks[sequence]) * self._block_size
            seen = sight.of([sequence], int(batch.context_lens[sequence] + counts[sequence]) - first)
            spans[sequence, 4:] = size, first
            masks.append(seen.ravel())
            size += seen.size
        flat = torch.from_numpy(np.concatenate(masks).view(np.uint8)) if masks else None
        self._plans[window] = torch.from_numpy(spans), flat
        return self._plans[window]
