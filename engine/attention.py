"""Paged attention in plain torch: this step's keys and values go to their slots, then each row attends to what it may.

Everything that depends on the batch and not on the layer (gather indices, masks) is made once per step, in
AttentionPlan. Rows fall into two kinds. Sequences with one row decode together: their blocks are gathered, padded to the
longest, and the query heads that share a KV head become rows of one query, which spares repeating keys and values.
Sequences with several rows (prompt chunks, token trees) go one by one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the usual name
from numpy.typing import NDArray
from torch import Tensor

from engine.step import StepBatch

PADDING_LIMIT = 2.0
"""Decoding sequences are split by length when padding would make their gather this many times larger."""


class _DecodeGroup:
    """Sequences of one row each, padded to the longest."""

    def __init__(self, batch: StepBatch, sequences: list[int], block_size: int, device: torch.device) -> None:
        lens = [int(batch.context_lens[s]) + 1 for s in sequences]
        num_blocks = -(-max(lens) // block_size)
        tables = np.zeros((len(sequences), num_blocks), dtype=np.int64)
        for row, (sequence, length) in enumerate(zip(sequences, lens, strict=True)):
            used = -(-length // block_size)
            tables[row, :used] = batch.block_tables[sequence][:used]
        self.rows = torch.from_numpy(batch.query_starts[sequences]).to(device)  # [sequences]
        self.blocks = torch.from_numpy(tables.reshape(-1)).to(device)  # [sequences * blocks]
        self.size = len(sequences)
        columns = torch.arange(num_blocks * block_size, device=device)
        visible = columns < torch.tensor(lens, device=device).unsqueeze(1)
        self.mask = visible[:, None, None, :]  # [sequences, 1, 1, columns]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """query [rows, heads, head_size], keys and values [blocks, block_size, kv_heads, head_size]"""
        kv_heads, head_size = keys.shape[2:]
        q = query.view(self.size, kv_heads, -1, head_size)
        k = keys.index_select(0, self.blocks).view(self.size, -1, kv_heads, head_size).transpose(1, 2)
        v = values.index_select(0, self.blocks).view(self.size, -1, kv_heads, head_size).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)
        return out.reshape(self.size, -1)


class _Span:
    """One sequence with several rows. Without context it needs no gather and no mask."""

    def __init__(self, batch: StepBatch, sequence: int, block_size: int, device: torch.device) -> None:
        self.start, self.end = int(batch.query_starts[sequence]), int(batch.query_starts[sequence + 1])
        context, rows = int(batch.context_lens[sequence]), self.end - self.start
        self.length = context + rows
        parents = None if batch.tree_parents is None else batch.tree_parents[self.start : self.end]
        self.mask: Tensor | None = None
        self.blocks: Tensor | None = None
        if context or parents is not None:
            used = -(-self.length // block_size)
            self.blocks = torch.from_numpy(np.ascontiguousarray(batch.block_tables[sequence][:used])).to(device)
            within = np.tri(rows, dtype=np.bool_) if parents is None else ancestors(parents)
            seen = np.concatenate((np.ones((rows, context), dtype=np.bool_), within), axis=1)
            self.mask = torch.from_numpy(seen).to(device)  # [rows, context + rows]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """query, key, value: this sequence's rows; keys, values: the cache."""
        if self.blocks is not None:
            key = keys.index_select(0, self.blocks).flatten(0, 1)[: self.length]
            value = values.index_select(0, self.blocks).flatten(0, 1)[: self.length]
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
        )
        return out.squeeze(0).transpose(0, 1).reshape(self.end - self.start, -1)


def ancestors(parents: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[rows, rows]: which rows of a tree each row sees, itself included. Parents come before their children."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for row, parent in enumerate(parents):
        if parent >= 0:
            seen[row] |= seen[parent]
    return seen


class AttentionPlan:
    """One step's attention over a KV pool [layers, 2, blocks, block_size, kv_heads, head_size]."""

    def __init__(self, batch: StepBatch, block_size: int, head_size: int, device: torch.device) -> None:
        self._scale = head_size**-0.5
        self._slots = torch.from_numpy(batch.slots).to(device)
        counts = np.diff(batch.query_starts)
        single = np.flatnonzero(counts == 1).tolist()
        self._groups = [_DecodeGroup(batch, g, block_size, device) for g in by_length(batch.context_lens, single)]
        self._spans = [_Span(batch, s, block_size, device) for s in np.flatnonzero(counts > 1).tolist()]
        # The common step, everybody decodes: rows are already in the order of the only group.
        self._whole = len(self._groups) == 1 and not self._spans

    def run(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write key and value [tokens, kv_heads, head_size] to their slots, then attend with query
        [tokens, heads, head_size]. Returns [tokens, heads * head_size]."""
        keys.flatten(0, 1).index_copy_(0, self._slots, key)
        values.flatten(0, 1).index_copy_(0, self._slots, value)
        if self._whole:
            return self._groups[0].attend(query, keys, values, self._scale)
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for group in self._groups:
            out.index_copy_(0, group.rows, group.attend(query[group.rows], keys, values, self._scale))
        for span in self._spans:
            rows = slice(span.start, span.end)
            out[rows] = span.attend(query[rows], key[rows], value[rows], keys, values, self._scale)
        return out


def by_length(context_lens: NDArray[np.int64], sequences: list[int]) -> list[list[int]]:
    """Group sequences so that padding each group to its longest stays below PADDING_LIMIT."""
    if not sequences:
        return []
    lens = context_lens[sequences] + 1
    if lens.max() * len(sequences) <= PADDING_LIMIT * lens.sum():
        return [sequences]
    order = np.argsort(lens, kind="stable")
    half = int(np.searchsorted(lens[order], lens.max() / 2))
    short, long = sorted(order[:half].tolist()), sorted(order[half:].tolist())
    return by_length(context_lens, [sequences[i] for i in short]) + [[sequences[i] for i in long]]
