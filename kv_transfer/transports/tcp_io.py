"""Bytes between sockets and pools: vectors over the runs of a pool, moved by one system call as far as that goes.

Sockets block in a thread. A call returns to the interpreter once it has moved all it was given, megabytes, so the
interpreter's lock, which the engine's thread wants too, is asked for once per batch and not once per readiness; an
event loop would be woken for every fraction of a socket buffer. The kernel bounds every wait (IDLE_TIMEOUT_S), and
`shutdown` from another thread ends it at once.

The giver's kernel copies straight out of the pool. Each vector costs its own work in kernel and interpreter, so where
runs are shorter than MIN_VECTOR_BYTES on average a batch is packed into a contiguous buffer before, and so is KV in GPU
memory. Frames of a codec are sent from where they were encoded to. The taker has to read what came to sum it, and
copies it to its slots in the same pass: a buffer that stays in the cache costs less than a kernel that writes to runs
anywhere in the pool. MSG_ZEROCOPY is not used: over loopback the kernel copies all the same.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import TransferError
from kv_transfer.coding import Coding
from kv_transfer.messages import Piece
from kv_transfer.pieces import Extent, Rows, Slots, piece_bytes, runs, tokens_of
from kv_transfer.transports import vectors as vectored
from kv_transfer.transports.batches import Batch, Staging, batches, pack
from kv_transfer.transports.pacing import unpace_within_host
from kv_transfer.transports.vectors import Vectors, joined, of_arrays, of_runs

BATCH_BYTES = 2 << 20
"""Received by one call, and then copied and summed while it is still in the processor's cache. What is sent in place is
named more at a time (batches.BATCH_BYTES): between two calls nothing goes onto the wire."""
QUICK_BYTES = 2 << 20
"""Moved between socket and pool sooner than a thread is woken and heard of."""
MIN_VECTOR_BYTES = 2048
"""Shorter runs cost more as vectors than packed, in processor time of either end on loopback. Runs of 3 kB, blocks of
eight tokens of a small model, still cost a quarter less as vectors."""
IDLE_TIMEOUT_S = 3.0
"""A peer that moves no byte for so long is given up. Less than a taker allows between two pieces, so that another
transport gets its chance."""
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 2,
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: 2,
    socket.TCP_USER_TIMEOUT: int(IDLE_TIMEOUT_S * 1000),
    socket.TCP_NODELAY: 1,
}


def prepare(connection: socket.socket) -> None:
    """What either end sets: nothing waits for small frames, no wait is longer than IDLE_TIMEOUT_S, and an idle
    connection to a peer that can't be reached any more ends within seconds. OSError if it has ended already."""
    unpace_within_host(connection)
    limit = struct.pack("ll", int(IDLE_TIMEOUT_S), int(IDLE_TIMEOUT_S % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def send(connection: socket.socket, vectors: Vectors) -> None:
    """All of the vectors, in order. TransferError when the other end takes nothing for IDLE_TIMEOUT_S or is gone."""
    with _told("took"):
        vectored.send(connection, vectors)


def send_frame(connection: socket.socket, frame: bytes, *, more: bool = False) -> None:
    """As `send`; with `more` it may wait for what is sent next."""
    with _told("took"):
        connection.sendall(frame, socket.MSG_MORE if more else 0)


def receive(connection: socket.socket, buffer: memoryview) -> None:
    """Fill it. TransferError when nothing comes for IDLE_TIMEOUT_S or the other end is gone."""
    with _told("sent"):
        while len(buffer):
            if not (received := connection.recv_into(buffer, 0, socket.MSG_WAITALL)):
                raise TransferError("the other end has closed the connection")
            buffer = buffer[received:]


def receive_frame(connection: socket.socket, nbytes: int) -> bytes:
    frame = bytearray(nbytes)
    receive(connection, memoryview(frame))
    return bytes(frame)


@contextmanager
def _told(did: str) -> Iterator[None]:
    """What the kernel says of the other end, as TransferError."""
    try:
        yield
    except BlockingIOError as error:
        raise TransferError(f"the other end {did} no byte for {IDLE_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise TransferError(f"the connection broke: {error.strerror or error}") from error


def batched(coding: Coding, pieces: Sequence[Piece]) -> Iterator[Batch]:
    """What is received at a time."""
    return batches(coding, pieces, BATCH_BYTES)


class Window:
    """The tokens of a sequence in the giver's pool, as what is sent. `slots` are by token."""

    def __init__(self, rows: Rows, slots: Slots, staging: Staging) -> None:
        self._rows = rows
        self._slots = slots
        self._staging = staging
        self._spans: dict[tuple[int, int], NDArray[np.int64]] = {}

    def send_at_once(self, connection: socket.socket, head: bytes, pieces: Sequence[Piece]) -> Vectors | None:
        """A frame and the pieces after it, as far as the socket has room for them now. Returns what is left; None, with
        nothing sent, if they have to be packed."""
        if (in_place := self._in_place(pieces)) is None:
            return None
        with _told("took"):
            return vectored.send_at_once(connection, joined([of_arrays([np.frombuffer(head, np.uint8)]), in_place]))

    def send(self, connection: socket.socket, pieces: Sequence[Piece]) -> None:
        """The bytes of the pieces: from where they lie if that is the fastest, else packed one by one."""
        in_place = self._in_place(pieces)
        if in_place is not None:
            send(connection, in_place)
            return
        for piece in pieces:
            buffer = self._staging.take(piece_bytes(self._rows, piece))
            pack(buffer, self._rows, self._slots, [piece])
            send(connection, vectors_of([buffer]))

    def _in_place(self, pieces: Sequence[Piece]) -> Vectors | None:
        """Vectors over the runs of the pieces in canonical order; None where a contiguous buffer is better, or the only
        way because the rows are not in this process's memory, or not in one place."""
        rows = self._rows
        if not isinstance(rows, np.ndarray):
            return None
        extents = _joined(pieces)
        count = sum(2 * extent.num_layers * len(self._spans_of(extent)) for extent in extents)
        if count * MIN_VECTOR_BYTES > sum(piece_bytes(rows, extent) for extent in extents):
            return None
        parts = [of_runs(rows, _planes(rows, extent), self._spans_of(extent)) for extent in extents]
        return joined(parts)

    def _spans_of(self, extent: Extent) -> NDArray[np.int64]:
        """[runs, 2]: where each run of an extent's tokens begins in the keys or values of a layer and how long it is,
        in bytes. Those of one token range share them."""
        tokens = extent.token, extent.num_tokens
        if tokens not in self._spans:
            own = tokens_of(self._slots, extent)
            self._spans[tokens] = runs(own, own)[:, 1:] * int(self._rows.shape[-1])
        return self._spans[tokens]


def vectors_of(buffers: Sequence[torch.Tensor]) -> Vectors:
    """Of contiguous bytes in host memory."""
    return of_arrays([buffer.numpy() for buffer in buffers])


def _joined(pieces: Sequence[Piece]) -> list[Extent]:
    """The pieces, in order, as few extents: canonical order is layer by layer, so what follows in the next layers for
    the same tokens is one of them."""
    found: list[Extent] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and last[:2] == (piece.token, piece.num_tokens) and last.layer + last.num_layers == piece.layer:
            found[-1] = last._replace(num_layers=last.num_layers + piece.num_layers)
        else:
            found.append(Extent(piece.token, piece.num_tokens, piece.layer, piece.num_layers))
    return found


def _planes(rows: NDArray[np.uint8], extent: Extent) -> NDArray[np.int64]:
    """[2 * layers]: the first byte of the keys and of the values of each of the extent's layers."""
    layer, plane = rows.strides[:2]
    layers = np.arange(extent.layer, extent.layer + extent.num_layers) * layer
    planes: NDArray[np.int64] = (layers[:, None] + np.array([0, plane])).reshape(-1)
    return planes
