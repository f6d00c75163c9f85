"""Geometry of a hand-off: token ranges to slots, slots to runs, a cache to pieces; copies and checksums over them.

A pool is seen as rows: [layers, 2 (key, value), slots, row bytes], one row per token. Blocks of any size are the same
rows, so two sides with unlike block sizes differ only in which slot a token has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from engine.kv_cache import KVPool, Pool
from engine.kv_layout import KVLayout
from kv_transfer import native_rows
from kv_transfer.messages import Piece
from kv_transfer.split_rows import Memory, Share, SplitRows

PIECE_BYTES = 2 << 20
"""Upper bound of a piece unless one token of one layer is larger: small enough to be hashed out of the cache it was
copied through, large enough that a piece costs microseconds of interpreter time."""

LAST_PIECE_BYTES = 512 << 10
"""Upper bound of the last piece of a prompt of several, unless one layer is larger: nothing hides it."""

Rows: TypeAlias = Memory | SplitRows  # [layers, 2, slots, row bytes]: numpy on CPU, torch elsewhere
Slots: TypeAlias = NDArray[np.int64]  # [tokens]
Runs: TypeAlias = NDArray[np.int64]  # [runs, 3]: source, target, length of tokens that are side by side in both


class Extent(NamedTuple):
    """A piece without its checksum."""

    token: int
    num_tokens: int
    layer: int
    num_layers: int

    def from_token(self, start: int) -> Extent:
        """What is left of it without the tokens before `start`, if anything."""
        first = max(self.token, min(start, self.token + self.num_tokens))
        return self._replace(token=first, num_tokens=self.token + self.num_tokens - first)


class Frontier(NamedTuple):
    """How much of a sequence has its KV: the first `num_tokens` tokens in all layers and, of the chunk of `num_rows`
    tokens after them, the first `num_layers` layers."""

    num_tokens: int = 0
    num_rows: int = 0
    num_layers: int = 0

    def since(self, earlier: Frontier, all_layers: int) -> list[Extent]:
        """What lies between the two, earlier tokens first. Chunks are computed one after the other."""
        token, rows, layer = earlier
        if (token, rows) == self[:2]:
            grown = [Extent(token, rows, layer, self.num_layers - layer)]
        else:
            begun = rows if layer else 0
            rest = Extent(token, begun, layer, all_layers - layer)
            whole = Extent(token + begun, self.num_tokens - token - begun, 0, all_layers)
            grown = [rest, whole, Extent(self.num_tokens, self.num_rows, 0, self.num_layers)]
        return [extent for extent in grown if extent.num_tokens > 0 and extent.num_layers > 0]


def rows_of(pool: Pool) -> Rows:
    """The pool's memory as rows; shares it."""
    if isinstance(pool, KVPool):
        return as_rows(pool.data.view(torch.uint8), pool.layout)
    layers, heads = pool.layout.num_layers, pool.layout.num_kv_heads
    shares = [Share(s.layers(layers), s.kv_heads(heads), _raw(data)) for s, data in pool.shares]
    return SplitRows(shares, layers, heads)


def _raw(data: torch.Tensor) -> Memory:
    """The data of a pool as [layers, 2, slots, bytes]."""
    rows = data.flatten(4).flatten(2, 3).view(torch.uint8)
    return rows.numpy() if rows.device.type == "cpu" else rows


def as_rows(memory: torch.Tensor | NDArray[np.uint8], layout: KVLayout) -> Rows:
    """Bytes of any shape as rows of `layout`, without a copy; CPU tensors become numpy arrays."""
    if isinstance(memory, torch.Tensor) and memory.device.type == "cpu":
        memory = memory.numpy()
    return memory.reshape(layout.num_layers, 2, -1, row_bytes(layout))


def is_tensor(rows: Rows) -> bool:
    """Whether they are in torch's memory, and not in an array's."""
    return rows.is_tensor if isinstance(rows, SplitRows) else isinstance(rows, torch.Tensor)


def row_bytes(layout: KVLayout) -> int:
    """Bytes of the keys (or values) of one token in one layer."""
    return layout.token_bytes // (2 * layout.num_layers)


def piece_bytes(rows: Rows, piece: Piece | Extent) -> int:
    """Bytes of a piece of a pool with these rows."""
    return 2 * piece.num_layers * piece.num_tokens * int(rows.shape[-1])


def slots_of(block_ids: Sequence[int], block_size: int, num_tokens: int) -> Slots:
    """Slots of the first tokens of a sequence with this block table."""
    tokens = np.arange(num_tokens)
    slots: Slots = np.asarray(block_ids, dtype=np.int64)[tokens // block_size] * block_size + tokens % block_size
    return slots


def runs(source: Slots, target: Slots) -> Runs:
    """The fewest runs that pair source[i] with target[i] for every i. Not to be written to: pieces of one range of
    tokens come one after the other, and share them."""
    return _runs(np.asarray(source, np.int64).tobytes(), np.asarray(target, np.int64).tobytes())


@lru_cache(maxsize=8)
def _runs(sources: bytes, targets: bytes) -> Runs:
    source, target = np.frombuffer(sources, np.int64), np.frombuffer(targets, np.int64)
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks)) if len(source) else breaks[:0]
    lengths = np.diff(np.append(starts, len(source)))
    found: Runs = np.stack((source[starts], target[starts], lengths), axis=1)
    found.setflags(write=False)
    return found


def cut(layout: KVLayout, extent: Extent, max_bytes: int | None = None) -> Iterator[Extent]:
    """Parts that cover an extent once: lower layers first, within them earlier tokens. `max_bytes` is PIECE_BYTES
    unless given."""
    max_bytes = PIECE_BYTES if max_bytes is None else max_bytes
    start, stop = extent.token, extent.token + extent.num_tokens
    max_tokens = max(1, max_bytes // (2 * row_bytes(layout)))
    max_layers = layers_per_piece(layout, extent.num_tokens, max_bytes)
    for layer in range(extent.layer, extent.layer + extent.num_layers, max_layers):
        num_layers = min(max_layers, extent.layer + extent.num_layers - layer)
        for token in range(start, stop, max_tokens):
            yield Extent(token, min(max_tokens, stop - token), layer, num_layers)


def layers_per_piece(layout: KVLayout, num_tokens: int, max_bytes: int | None = None) -> int:
    """How many layers of so many tokens one piece holds; 1 if it does not hold one."""
    max_bytes = PIECE_BYTES if max_bytes is None else max_bytes
    return max(1, max_bytes // (2 * row_bytes(layout) * max(1, num_tokens)))


def layers_told(layout: KVLayout, num_tokens: int, *, last: bool) -> frozenset[int]:
    """After which layers but the last one to tell of a chunk of so many tokens: each time there is a piece more. Of the
    `last` chunk of a prompt pieces become smaller towards the end, down to LAST_PIECE_BYTES, as nothing is computed any
    more that would hide the last one; unless all of it is one piece anyway, and not worth more words."""
    most = layers_per_piece(layout, num_tokens)
    if not last or most >= layout.num_layers:
        return frozenset(range(most, layout.num_layers, most))
    return _tapered(layout.num_layers, most, min(most, layers_per_piece(layout, num_tokens, LAST_PIECE_BYTES)))


@lru_cache(maxsize=256)
def _tapered(num_layers: int, most: int, least: int) -> frozenset[int]:
    """The ends of pieces of `least` layers, twice as many, and so on, `most` at a time, from the last layer down."""
    told, grown = set(), least
    layer = num_layers - grown
    while layer > 0:
        told.add(layer)
        grown = min(most, 2 * grown)
        layer -= grown
    return frozenset(told)


def copy(target: Rows, source: Rows, pairs: Runs, *, streamed: bool = False) -> None:
    """target[:, :, run's target ...] = source[:, :, run's source ...]. Lets other threads run meanwhile and, unlike
    torch, takes no cores from the model's thread pool. One of the two may be split. `streamed`: it is
    not read again soon."""
    if isinstance(source, SplitRows):
        assert not isinstance(target, SplitRows)
        for part, own in source.sources(target):
            copy(part, own, pairs)
    elif isinstance(target, SplitRows):
        for part, own in target.targets(source):
            copy(own, part, pairs)
    elif isinstance(target, torch.Tensor):
        assert isinstance(source, torch.Tensor)
        for first, into, length in pairs.tolist():
            target[:, :, into : into + length].copy_(source[:, :, first : first + length])
    else:
        assert not isinstance(source, torch.Tensor)
        if native_rows.move(source, target, pairs, summed=False, streamed=streamed) is None:
            for first, into, length in pairs.tolist():
                target[:, :, into : into + length] = source[:, :, first : first + length]


def copy_summed(target: Rows, source: Rows, pairs: Runs) -> int:
    """Copy, and the xxh3-64 of what was read, for which it need not be read again. `source` has the target's bytes."""
    if isinstance(source, np.ndarray) and isinstance(target, np.ndarray):
        found = native_rows.move(source, target, pairs, summed=True, streamed=True)
        if found is not None:
            return found
    copy(target, source, pairs)
    return checksum(target, np.concatenate([np.arange(into, into + length) for _, into, length in pairs.tolist()]))


def checksum(rows: Rows, slots: Slots) -> int:
    """xxh3-64 over rows[:, :, slots] in canonical order."""
    if not len(slots):
        return int(xxhash.xxh3_64_intdigest(b""))
    own = runs(slots, slots)
    if isinstance(rows, SplitRows):
        whole, tokens = rows.new_rows(len(slots)), np.arange(len(slots))
        copy(whole, rows, runs(slots, tokens))
        return checksum(whole, tokens)
    if isinstance(rows, np.ndarray) and (found := native_rows.move(rows, None, own, summed=True)) is not None:
        return found
    digest = xxhash.xxh3_64()
    gathered = np.empty((len(slots), rows.shape[-1]), np.uint8)
    for plane in itertools.chain.from_iterable(rows):
        if isinstance(plane, torch.Tensor):
            digest.update(plane[slots].cpu().numpy().data)
        elif len(own) == 1:
            digest.update(plane[slots[0] :][: len(slots)].data)
        else:  # into memory that is warm; "clip" lets it be written directly
            np.take(plane, slots, axis=0, out=gathered, mode="clip")
            digest.update(gathered.data)
    return int(digest.intdigest())


def seal(rows: Rows, slots: Slots, extents: Sequence[Extent]) -> list[Piece]:
    """Pieces with their checksums; `slots` are those of the sequence, by token."""
    return [Piece(*extent, checksum(layers_of(rows, extent), tokens_of(slots, extent))) for extent in extents]


def layers_of(rows: Rows, piece: Piece | Extent) -> Rows:
    return rows[piece.layer : piece.layer + piece.num_layers]


def tokens_of(slots: Slots, piece: Piece | Extent) -> Slots:
    """The piece's part of the slots of a sequence, whose first is that of token 0."""
    return slots[piece.token : piece.token + piece.num_tokens]


def oversized(rows: Rows, piece: Piece) -> bool:
    """Whether no giver cuts such a piece."""
    return piece_bytes(rows, piece) > PIECE_BYTES and (piece.num_tokens, piece.num_layers) != (1, 1)


class Coverage:
    """Which KV of tokens start .. stop - 1 pieces have been named for, and that none is named twice."""

    def __init__(self, start: int, stop: int, num_layers: int) -> None:
        self._start = start
        self._named = np.zeros((num_layers, stop - start), dtype=np.bool_)
        self._left = self._named.size

    def add(self, piece: Piece) -> bool:
        """False, with nothing changed, if it is empty or lies outside or across what was named before."""
        layers, tokens = self._named.shape
        token = piece.token - self._start
        within = 0 <= token < token + piece.num_tokens <= tokens
        if not within or not 0 <= piece.layer < piece.layer + piece.num_layers <= layers:
            return False
        part = self._named[piece.layer : piece.layer + piece.num_layers, token : token + piece.num_tokens]
        if part.any():
            return False
        part[:] = True
        self._left -= part.size
        return True

    @property
    def whole(self) -> bool:
        return not self._left
