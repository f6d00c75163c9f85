"""Geometry of a hand-off: token ranges to slots, slots to runs, a cache to pieces; copies and checksums over them.

A pool is seen as rows: [layers, 2 (key, value), slots, row bytes], one row per token. Blocks of any size are the same
rows, so two sides with unlike block sizes differ only in which slot a token has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.messages import Piece

PIECE_BYTES = 2 << 20
"""Upper bound of a piece unless one token of one layer is larger: small enough to be hashed out of the cache it was
copied through, large enough that a piece costs microseconds of interpreter time."""

Rows: TypeAlias = NDArray[np.uint8] | torch.Tensor  # [layers, 2, slots, row bytes]: numpy on CPU, torch elsewhere
Slots: TypeAlias = NDArray[np.int64]  # [tokens]


class Run(NamedTuple):
    """`length` tokens that lie one after the other in both places."""

    source: int
    target: int
    length: int


class Extent(NamedTuple):
    """A piece without its checksum."""

    token: int
    num_tokens: int
    layer: int
    num_layers: int


def rows_of(pool: KVPool) -> Rows:
    """The pool's memory as rows; shares it."""
    return as_rows(pool.data.view(torch.uint8), pool.layout)


def as_rows(memory: torch.Tensor | NDArray[np.uint8], layout: KVLayout, num_layers: int | None = None) -> Rows:
    """Bytes of any shape as rows of `layout`, without a copy; CPU tensors become numpy arrays."""
    if isinstance(memory, torch.Tensor) and memory.device.type == "cpu":
        memory = memory.numpy()
    layers = layout.num_layers if num_layers is None else num_layers
    return memory.reshape(layers, 2, -1, row_bytes(layout))


def row_bytes(layout: KVLayout) -> int:
    """Bytes of the keys (or values) of one token in one layer."""
    return layout.token_bytes // (2 * layout.num_layers)


def piece_bytes(layout: KVLayout, piece: Piece | Extent) -> int:
    return 2 * piece.num_layers * piece.num_tokens * row_bytes(layout)


def slots_of(block_ids: Sequence[int], block_size: int, start: int, stop: int) -> Slots:
    """Slots of tokens start .. stop - 1 of a sequence with this block table."""
    tokens = np.arange(start, stop)
    slots: Slots = np.asarray(block_ids, dtype=np.int64)[tokens // block_size] * block_size + tokens % block_size
    return slots


def runs(source: Slots, target: Slots) -> list[Run]:
    """The fewest runs that pair source[i] with target[i] for every i."""
    if not len(source):
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(source)])))
    return [Run(*map(int, run)) for run in zip(source[starts], target[starts], lengths, strict=True)]


def cut(layout: KVLayout, start: int, stop: int, max_bytes: int | None = None) -> Iterator[Extent]:
    """Pieces that cover tokens start .. stop - 1 of all layers once: lower layers first, within them earlier tokens.
    `max_bytes` is PIECE_BYTES unless given."""
    max_bytes = PIECE_BYTES if max_bytes is None else max_bytes
    token_bytes = 2 * row_bytes(layout)
    max_tokens = max(1, max_bytes // token_bytes)
    longest = min(max_tokens, max(1, stop - start))
    max_layers = max(1, max_bytes // (token_bytes * longest))
    for layer in range(0, layout.num_layers, max_layers):
        num_layers = min(max_layers, layout.num_layers - layer)
        for token in range(start, stop, max_tokens):
            yield Extent(token, min(max_tokens, stop - token), layer, num_layers)


def copy(target: Rows, source: Rows, pairs: Sequence[Run]) -> None:
    """target[:, :, run.target ...] = source[:, :, run.source ...]. Numpy lets other threads run meanwhile and, unlike
    torch, takes no cores from the model's thread pool."""
    for run in pairs:
        into, out_of = slice(run.target, run.target + run.length), slice(run.source, run.source + run.length)
        if isinstance(target, torch.Tensor):
            assert isinstance(source, torch.Tensor)
            target[:, :, into].copy_(source[:, :, out_of])
        else:
            assert not isinstance(source, torch.Tensor)
            target[:, :, into] = source[:, :, out_of]


def checksum(rows: Rows, slots: Slots) -> int:
    """xxh3-64 over rows[:, :, slots] in canonical order."""
    digest = xxhash.xxh3_64()
    spans = runs(slots, slots)
    for layer in rows:
        for plane in layer:
            # Gathering many short spans is cheaper than hashing each; one span is hashed where it lies.
            part = plane[spans[0].source :][: len(slots)] if len(spans) == 1 else plane[slots]
            digest.update(part.cpu().numpy().data if isinstance(part, torch.Tensor) else part.data)
    return int(digest.intdigest())


def seal(rows: Rows, slots: Slots, extents: Sequence[Extent]) -> list[Piece]:
    """Pieces with their checksums. `slots` are those of the tokens from the first extent's token on."""
    base = extents[0].token if extents else 0
    return [Piece(*extent, checksum(layers_of(rows, extent), tokens_of(slots, extent, base))) for extent in extents]


def layers_of(rows: Rows, piece: Piece | Extent) -> Rows:
    return rows[piece.layer : piece.layer + piece.num_layers]


def tokens_of(slots: Slots, piece: Piece | Extent, base: int) -> Slots:
    """The piece's part of `slots`, whose first is that of token `base`."""
    return slots[piece.token - base : piece.token - base + piece.num_tokens]
