"""Our Triton kernel as a part of any step, and of captured ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from engine.attention import Part, Scoring
from engine.cuda.inputs import Inputs, Packed
from engine.cuda.kernels import Tables, Tiles, attend, rows_per_tile, splits_for
from engine.cuda.tables import rows_of, tables_of
from engine.cuda.transfer import to_device
from engine.step import StepBatch

_SPLITS = 8
"""Of tiles with few rows in steps that are not captured. Always as many: each number is a kernel to compile."""


def triton_parts(sequences: list[int], batch: StepBatch, cache: torch.Tensor, window: int | None) -> Iterator[Part]:
    yield _TritonPart(sequences, batch, cache, window)


class _TritonPart:
    """Implements engine.attention.Part."""

    def __init__(self, sequences: list[int], batch: StepBatch, cache: torch.Tensor, window: int | None) -> None:
        self.rows = rows_of(sequences, batch, cache.device)
        self._window = window
        self._counts = np.diff(batch.query_starts)[sequences]
        lengths, table_starts, blocks = tables_of(sequences, batch, cache.shape[3])
        starts = np.concatenate(([0], np.cumsum(self._counts)))
        self._tables = Tables(*(to_device(array, cache.device) for array in (starts, lengths, table_starts, blocks)))
        self._tiles: list[Tiles] | None = None

    def __call__(self, query: torch.Tensor, kv: torch.Tensor, cache: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        query = query[self.rows]
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        keys, values = cache.view(2, -1, *cache.shape[1:])
        if self._tiles is None:  # the number of heads is not known before
            self._tiles = [*_tiles(self._counts, query.shape[1] // kv.shape[2], query.device)]
        scale, softcap = scoring
        for tiles in self._tiles:
            attend(query, keys, values, out, self._tables, tiles, window=self._window, scale=scale, softcap=softcap)
        return out


def _tiles(counts: np.ndarray, group: int, device: torch.device) -> Iterator[Tiles]:
    """A tile with its keys split for each sequence of few rows, and tiles of many rows for the others."""
    few = rows_per_tile(group, long=False)
    for long, rows in ((False, few), (True, rows_per_tile(group, long=True))):
        sequences = np.flatnonzero((counts > few) == long)
        per_sequence = -(-counts[sequences] // rows)
        if len(sequences):
            ends = np.cumsum(per_sequence)
            firsts = (np.arange(ends[-1]) - np.repeat(ends - per_sequence, per_sequence)) * rows
            yield Tiles(
                count=int(ends[-1]),
                rows=rows,
                sequences=to_device(np.repeat(sequences, per_sequence), device),
                firsts=to_device(firsts, device),
                splits=1 if long else _SPLITS,
            )


class StaticTriton:
    """Implements engine.cuda.paged.StaticPaged."""

    def __init__(self, inputs: Inputs) -> None:
        self._tables = Tables(inputs.starts, inputs.lengths, inputs.table_starts, inputs.blocks)

    def prepare(self, packed: Packed) -> None:
        """Nothing: the kernel reads all of it on the device."""

    def __call__(self, query: torch.Tensor, cache: torch.Tensor, window: int | None, scoring: Scoring) -> torch.Tensor:
        rows, heads, head_size = query.shape
        out = query.new_empty(rows, heads * head_size)
        keys, values = cache
        tiles = Tiles(count=rows, rows=1, splits=splits_for(rows, cache.shape[3], query.device))
        scale, softcap = scoring
        attend(query, keys, values, out, self._tables, tiles, window=window, scale=scale, softcap=softcap)
        return out
