"""How large the KV cache of a GPU can be: what the allowed share of its memory leaves after the weights and the largest
step that may come. Measured, as vLLM does it, because the workspaces of kernels follow no formula."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from core.errors import ConfigError
from core.types import SamplingParams
from engine.step import SamplingRow, StepBatch

DEFAULT_UTILIZATION = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    """What a process may take of a GPU, and the largest step to leave room for."""

    utilization: float | None = None
    """Share of the memory there is, used by others or not; None is DEFAULT_UTILIZATION."""
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64
    kept_bytes: int = 0
    """Of that share, for what comes after the model: drafters with weights."""


class Gpu(Protocol):
    """What a device says of its memory, in bytes."""

    def free_and_total(self) -> tuple[int, int]: ...

    def reserved(self) -> int:
        """Held by PyTorch's allocator, in use or not."""
        ...

    def peak(self) -> int:
        """Most that was in use at a time since `forget_peak`."""
        ...

    def forget_peak(self) -> None: ...


class CudaGpu:
    """Implements Gpu."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self._device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


class Meter:
    """Made before the weights are loaded; asked after the largest step. Raises ConfigError if others use so much of the
    GPU that the share is not there."""

    def __init__(self, gpu: Gpu, share: GpuShare) -> None:
        self._gpu = gpu
        self._utilization = DEFAULT_UTILIZATION if share.utilization is None else share.utilization
        self._free, self._total = gpu.free_and_total()
        self._reserved = gpu.reserved()
        self._kept = share.kept_bytes
        self._allowed = int(self._total * self._utilization)
        if self._allowed > self._free:
            raise ConfigError(
                f"--gpu-memory-utilization {self._utilization:g} asks for {_gib(self._allowed)} of the GPU's "
                f"{_gib(self._total)} and {_gib(self._free)} are free; lower it, or end what else runs there"
            )
        gpu.forget_peak()

    def left(self) -> int:
        """Bytes for the cache: allowed - kept - peak of the allocator - what grew outside it (contexts, kernels, NCCL).
        Raises ConfigError when nothing is left."""
        free, _ = self._gpu.free_and_total()
        outside = max(0, (self._free - free) - (self._gpu.reserved() - self._reserved))
        used = self._gpu.peak() + outside + self._kept
        if used >= self._allowed:
            drafters, theirs = (", drafters", ", --speculation-memory") if self._kept else ("", "")
            raise ConfigError(
                f"--gpu-memory-utilization {self._utilization:g} allows {_gib(self._allowed)}, but weights{drafters} "
                f"and the largest step take {_gib(used)}; raise it, or lower --max-num-batched-tokens{theirs} or "
                "--max-num-seqs"
            )
        return self._allowed - used

    def cost(self, work: Callable[[], object]) -> int:
        """Bytes of the GPU that `work` keeps, in the allocator or beside it: of captured graphs, which have memory of
        their own. The allocator has let go of the rest before."""
        before, _ = self._gpu.free_and_total()
        work()
        return max(0, before - self._gpu.free_and_total()[0])


def largest_step(share: GpuShare, max_position_embeddings: int, block_size: int) -> StepBatch:
    """As many tokens as a step may have, in prompts of the longest kind, with a draw for as many sequences as there may
    be. All of it reads and writes block 0: what it computes is of no use."""
    count = share.max_num_batched_tokens
    positions = np.arange(count, dtype=np.int64) % max_position_embeddings
    starts = np.arange(0, count, max_position_embeddings, dtype=np.int64)
    lengths = np.diff(np.append(starts, count))
    rows = min(share.max_num_seqs, count)
    row = SamplingRow(SamplingParams(max_tokens=1, top_p=0.9, top_k=20), position=0)
    return StepBatch(
        token_ids=np.zeros(count, np.int64),
        positions=positions,
        slots=positions % block_size,
        query_starts=np.append(starts, count),
        context_lens=np.zeros(len(starts), np.int64),
        block_tables=tuple([np.zeros(-(-int(length) // block_size), np.int64) for length in lengths]),
        logit_rows=np.arange(rows, dtype=np.int64),
        sampling=(row,) * rows,
    )


def let_go() -> None:
    """Give what the allocator holds and does not use back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
