"""What goes over a wire at a time: consecutive pieces, packed into one contiguous buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.kv_cache import Pool
from kv_transfer.coding import Coding
from kv_transfer.messages import Piece
from kv_transfer.pieces import Rows, Slots, copy, is_tensor, layers_of, piece_bytes, runs, tokens_of
from kv_transfer.transports.base import PullJob

BATCH_BYTES = 16 << 20
"""Asked for at a time: a message over the link, which costs either end as much as packing a megabyte."""
MESSAGE_BYTES = 4 << 20
"""Sent at a time: one is packed while the one before is on the wire."""


class Batch(NamedTuple):
    first: int
    last: int
    nbytes: int
    framed: bool
    """All of its pieces are, or none is."""


def batches(coding: Coding, pieces: Sequence[Piece], max_bytes: int | None = None) -> Iterator[Batch]:
    """Consecutive pieces that travel alike, together at most `max_bytes` on the wire, by default BATCH_BYTES, unless
    one alone is larger."""
    max_bytes = BATCH_BYTES if max_bytes is None else max_bytes
    first = nbytes = 0
    framed = False
    for index, piece in enumerate(pieces):
        size, is_framed = coding.wire_bytes(piece), coding.is_framed(piece)
        if nbytes and (nbytes + size > max_bytes or is_framed != framed):
            yield Batch(first, index, nbytes, framed)
            first, nbytes = index, 0
        nbytes, framed = nbytes + size, is_framed
    if nbytes:
        yield Batch(first, len(pieces), nbytes, framed)


def messages(coding: Coding, pieces: Sequence[Piece], batch: Batch) -> Iterator[tuple[Batch, slice]]:
    """The batch as what is sent at a time, each with its part of the batch's buffer. Both ends compute them alike."""
    at = 0
    for part in batches(coding, pieces[batch.first : batch.last], MESSAGE_BYTES):
        first, last = batch.first + part.first, batch.first + part.last
        yield part._replace(first=first, last=last), slice(at, at + part.nbytes)
        at += part.nbytes


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


def pack_frames(buffer: torch.Tensor, frames: Sequence[torch.Tensor]) -> None:
    at = 0
    for frame in frames:
        buffer[at : at + frame.numel()].copy_(frame)
        at += frame.numel()


def land(job: PullJob, batch: Batch, buffer: torch.Tensor) -> None:
    """The pieces of a batch, which has come in the buffer, into the taker's slots, and verify them."""
    pieces = job.pieces[batch.first : batch.last]
    if not batch.framed:
        for index, (_, part) in enumerate(_parts(buffer, job.rows, pieces), batch.first):
            job.landed(index, part)
        return
    at = 0
    for index, piece in enumerate(pieces, batch.first):
        size = job.coding.wire_bytes(piece)
        job.decoded(index, buffer[at : at + size])
        at += size


def pack(buffer: torch.Tensor, rows: Rows, slots: Slots, pieces: Sequence[Piece]) -> None:
    """Pieces out of the giver's slots, those of the sequence by token, into the buffer."""
    for piece, part in _parts(buffer, rows, pieces):
        copy(part, layers_of(rows, piece), runs(tokens_of(slots, piece), np.arange(piece.num_tokens)))


def _parts(buffer: torch.Tensor, rows: Rows, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Rows]]:
    """Each piece with its part of the buffer, as rows of the kind that `rows` is."""
    at = 0
    memory = buffer if is_tensor(rows) else buffer.numpy()
    for piece in pieces:
        size = piece_bytes(rows, piece)
        part = memory[at : at + size].reshape(piece.num_layers, 2, piece.num_tokens, -1)
        yield piece, part
        at += size


def staging_device(backend: str, pool: Pool) -> torch.device:
    """Where the backend sends from."""
    return pool.device if backend == "nccl" else torch.device("cpu")
