"""The KV of a head's own layer: a slot for each token, found through lists of slots, so that the nodes of a tree share
what comes before them and no node sees another branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import PagedAttention
from engine.native.attention import NativeAttention
from engine.step import StepBatch
from speculation.tree import offsets_of

Slots = NDArray[np.int64]


@dataclass(slots=True)
class Line:
    """The slots of a request's rows, in their order."""

    _slots: Slots = field(default_factory=lambda: np.empty(64, np.int64))
    length: int = 0

    @property
    def slots(self) -> Slots:
        return self._slots[: self.length]

    def extend(self, slots: Slots) -> None:
        end = self.length + len(slots)
        if end > len(self._slots):
            self._slots = np.concatenate([self.slots, np.empty(end, np.int64)])
        self._slots[self.length : end] = slots
        self.length = end


class LayerCache:
    def __init__(self, num_slots: int, kv_heads: int, head_size: int, like: torch.Tensor, *, native: bool) -> None:
        """`like` has the dtype and the device. Memory is taken as slots are first used."""
        self.data = torch.empty((1, 2, num_slots, 1, kv_heads, head_size), dtype=like.dtype, device=like.device)
        self._free = np.arange(num_slots - 1, -1, -1)  # a stack, the lowest on top
        self.num_free = num_slots
        self._attend = NativeAttention if native else PagedAttention

    def take(self, count: int) -> Slots:
        """No more than there are free."""
        self.num_free -= count
        return self._free[self.num_free : self.num_free + count].copy()

    def give_back(self, slots: Slots) -> None:
        self._free[self.num_free : self.num_free + len(slots)] = slots
        self.num_free += len(slots)

    def attention(
        self, lines: Sequence[Slots], counts: Sequence[int], positions: NDArray[np.int64]
    ) -> NativeAttention | PagedAttention:
        """Of a step that writes the last counts[i] slots of each line, every row seeing the slots up to its own."""
        own = np.array(counts, np.int64)
        slots = np.concatenate([line[-count:] for line, count in zip(lines, counts, strict=True)])
        batch = StepBatch(
            token_ids=positions,  # not looked at
            positions=positions,
            slots=slots,
            query_starts=offsets_of(own),
            context_lens=np.array([len(line) for line in lines], np.int64) - own,
            block_tables=tuple(lines),
            logit_rows=np.empty(0, np.int64),
        )
        return self._attend(batch, self.data)

    def read(self, slots: Slots) -> torch.Tensor:
        """[slots, 2, kv_heads, head_size]"""
        return self.data[0, :, torch.from_numpy(slots).to(self.data.device), 0].transpose(0, 1)

    def write(self, slots: Slots, kv: torch.Tensor) -> None:
        self.data[0, :, torch.from_numpy(slots).to(self.data.device), 0] = kv.transpose(0, 1)
