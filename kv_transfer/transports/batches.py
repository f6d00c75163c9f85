"""What goes over a pair as one message: consecutive pieces, packed into one contiguous buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.messages import Manifest, Piece
from kv_transfer.pieces import Rows, Slots, copy, layers_of, piece_bytes, runs, tokens_of

BATCH_BYTES = 8 << 20
"""Gloo reaches its full rate from here on."""


class Batch(NamedTuple):
    first: int
    last: int
    nbytes: int


def batches(layout: KVLayout, pieces: Sequence[Piece]) -> Iterator[Batch]:
    """Consecutive pieces, together at most BATCH_BYTES unless one alone is larger."""
    first = nbytes = 0
    for index, piece in enumerate(pieces):
        size = piece_bytes(layout, piece)
        if nbytes and nbytes + size > BATCH_BYTES:
            yield Batch(first, index, nbytes)
            first, nbytes = index, 0
        nbytes += size
    if nbytes:
        yield Batch(first, len(pieces), nbytes)


def device_identity(device: torch.device) -> str:
    """Equal for two pools on the same device: NCCL can't join those."""
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"


class Staging:
    """A contiguous buffer on the device that the backend sends from; grows to what is asked of it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, nbytes: int) -> torch.Tensor:
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._buffer.device)
        return self._buffer[:nbytes]


def pack(buffer: torch.Tensor, rows: Rows, slots: Slots, manifest: Manifest, batch: Batch) -> None:
    """The pieces of a batch out of the giver's slots of tokens start_token .. into the buffer."""
    for piece, part in _parts(buffer, rows, manifest, batch):
        tokens = tokens_of(slots, piece, manifest.start_token)
        copy(part, layers_of(rows, piece), runs(tokens, np.arange(piece.num_tokens)))


def unpack(buffer: torch.Tensor, rows: Rows, slots: Slots, manifest: Manifest, batch: Batch) -> None:
    """The other way, into the taker's slots."""
    for piece, part in _parts(buffer, rows, manifest, batch):
        tokens = tokens_of(slots, piece, manifest.start_token)
        copy(layers_of(rows, piece), part, runs(np.arange(piece.num_tokens), tokens))


def _parts(buffer: torch.Tensor, rows: Rows, manifest: Manifest, batch: Batch) -> Iterator[tuple[Piece, Rows]]:
    """Each piece of a batch with its part of the buffer, as rows of the kind that `rows` is."""
    layout, at = manifest.layout, 0
    memory = buffer if isinstance(rows, torch.Tensor) else buffer.numpy()
    for piece in manifest.pieces[batch.first : batch.last]:
        size = piece_bytes(layout, piece)
        part = memory[at : at + size].reshape(piece.num_layers, 2, piece.num_tokens, -1)
        yield piece, part
        at += size


def staging_device(backend: str, pool: KVPool) -> torch.device:
    """Where the backend sends from."""
    return pool.device if backend == "nccl" else torch.device("cpu")
