"""Where the sequences of a step have their rows and their blocks, for kernels that read the cache where it lies."""

from __future__ import annotations

import numpy as np
import torch

from engine.cuda.transfer import to_device
from engine.step import StepBatch


def tables_of(sequences: list[int], batch: StepBatch, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `sequences`: tokens in the cache with the step's own; where its blocks begin, with the end of the
    last; and the blocks of all, as int32."""
    lengths = (batch.context_lens + np.diff(batch.query_starts))[sequences]
    used = -(-lengths // block_size)
    blocks = [batch.block_tables[s][:n] for s, n in zip(sequences, used.tolist(), strict=True)]
    return lengths, np.concatenate(([0], np.cumsum(used))), np.concatenate(blocks).astype(np.int32)


def rows_of(sequences: list[int], batch: StepBatch, device: torch.device) -> slice | torch.Tensor:
    """The rows of these sequences, in their order; a slice where they are neighbours."""
    starts = batch.query_starts
    if sequences[-1] - sequences[0] + 1 == len(sequences):
        return slice(int(starts[sequences[0]]), int(starts[sequences[-1] + 1]))
    return to_device(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in sequences]), device)
