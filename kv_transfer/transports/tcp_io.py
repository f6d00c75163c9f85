"""Bytes between sockets and pools: vectors over the runs of a pool, moved by one system call as far as that goes.

Sockets block in a thread. A call returns to the interpreter once it has moved all it was given, about 2 MB, so the
interpreter's lock, which the engine's thread wants too, is asked for once per batch and not once per readiness; an
event loop would be woken for every fraction of a socket buffer. The kernel bounds every wait (IDLE_TIMEOUT_S), and
`shutdown` from another thread ends it at once.

Zero copy: the kernel copies between socket and pool, and nothing else does. Each vector costs its own work in kernel
and interpreter, so where runs are shorter than MIN_VECTOR_BYTES on average a batch goes through a contiguous buffer
instead, and so does KV in GPU memory. Frames of a codec are sent from where they were encoded to, and received into a
buffer. MSG_ZEROCOPY is not used: over loopback the kernel copies all the same.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import TransferError
from kv_transfer.coding import Coding
from kv_transfer.messages import Piece
from kv_transfer.pieces import Rows, Slots, piece_bytes, runs, tokens_of
from kv_transfer.transports.batches import Batch, Staging, batches, pack, unpack

BATCH_BYTES = 2 << 20
"""Moved by one call and then hashed, while it is still in the processor's cache."""
MIN_VECTOR_BYTES = 2048
"""Shorter runs cost more as vectors than packed, in processor time of either end on loopback. Runs of 3 kB, blocks of
eight tokens of a small model, still cost a quarter less as vectors."""
MAX_VECTORS = 1024
"""IOV_MAX of Linux."""

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
    connection to a peer that can't be reached any more ends within seconds."""
    limit = struct.pack("ll", int(IDLE_TIMEOUT_S), int(IDLE_TIMEOUT_S % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def send(connection: socket.socket, vectors: Sequence[memoryview]) -> None:
    """All of the vectors, in order. TransferError when the other end takes nothing for IDLE_TIMEOUT_S or is gone."""
    for part in _by_call(vectors):
        while part:
            try:
                part = _after(part, connection.sendmsg(part))
            except BlockingIOError as error:
                raise TransferError(f"the other end took no byte for {IDLE_TIMEOUT_S:g} s") from error
            except OSError as error:
                raise TransferError(f"the connection broke: {error.strerror or error}") from error


def receive(connection: socket.socket, vectors: Sequence[memoryview]) -> None:
    """Fill the vectors, in order. TransferError when nothing comes for IDLE_TIMEOUT_S or the other end is gone."""
    for part in _by_call(vectors):
        while part:
            try:
                received = connection.recvmsg_into(part, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError as error:
                raise TransferError(f"the other end sent no byte for {IDLE_TIMEOUT_S:g} s") from error
            except OSError as error:
                raise TransferError(f"the connection broke: {error.strerror or error}") from error
            if not received:
                raise TransferError("the other end has closed the connection")
            part = _after(part, received)


def receive_frame(connection: socket.socket, nbytes: int) -> bytes:
    frame = bytearray(nbytes)
    receive(connection, [memoryview(frame)])
    return bytes(frame)


def batched(coding: Coding, pieces: Sequence[Piece]) -> Iterator[Batch]:
    """What is moved at a time."""
    return batches(coding, pieces, BATCH_BYTES)


class Window:
    """The tokens of a sequence in a pool, as what is sent from or received into. `slots` are by token."""

    def __init__(self, rows: Rows, slots: Slots, staging: Staging) -> None:
        self._rows = rows
        self._slots = slots
        self._staging = staging
        self._spans: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def vectors(self, pieces: Sequence[Piece]) -> list[memoryview]:
        """The bytes of the pieces: where they lie if that is the fastest, else packed."""
        in_place = self._in_place(pieces)
        if in_place is not None:
            return in_place
        buffer = self._buffer(pieces)
        pack(buffer, self._rows, self._slots, pieces)
        return [memory_of(buffer)]

    def receive(self, connection: socket.socket, pieces: Sequence[Piece]) -> None:
        """The pieces into their slots: straight, or through a buffer."""
        in_place = self._in_place(pieces)
        if in_place is not None:
            receive(connection, in_place)
            return
        buffer = self._buffer(pieces)
        receive(connection, [memory_of(buffer)])
        unpack(buffer, self._rows, self._slots, pieces)

    def _buffer(self, pieces: Sequence[Piece]) -> torch.Tensor:
        return self._staging.take(sum(piece_bytes(self._rows, piece) for piece in pieces))

    def _in_place(self, pieces: Sequence[Piece]) -> list[memoryview] | None:
        """Vectors over the runs of the pieces in canonical order; None where a contiguous buffer is better, or the only
        way because the rows are not in this process's memory, or not in one place."""
        rows = self._rows
        if not isinstance(rows, np.ndarray):
            return None
        count = sum(2 * piece.num_layers * len(self._spans_of(piece)) for piece in pieces)
        if count * MIN_VECTOR_BYTES > sum(piece_bytes(rows, piece) for piece in pieces):
            return None
        memory, plane = _bytes(rows), rows[0, 0].nbytes
        return [
            memory[base + start : base + stop]
            for piece in pieces
            for base in range(2 * piece.layer * plane, 2 * (piece.layer + piece.num_layers) * plane, plane)
            for start, stop in self._spans_of(piece)
        ]

    def _spans_of(self, piece: Piece) -> list[tuple[int, int]]:
        """First and last byte of each run of a piece's tokens, in the keys or values of a layer. Pieces of one token
        range share them."""
        tokens = piece.token, piece.num_tokens
        if tokens not in self._spans:
            row, own = int(self._rows.shape[-1]), tokens_of(self._slots, piece)
            self._spans[tokens] = [
                (first * row, (first + length) * row) for first, _, length in runs(own, own).tolist()
            ]
        return self._spans[tokens]


def memory_of(buffer: torch.Tensor) -> memoryview:
    """Of contiguous bytes in host memory."""
    return _bytes(buffer.numpy())


def _bytes(array: NDArray[np.uint8]) -> memoryview:
    return array.data.cast("B")


def _by_call(vectors: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    for start in range(0, len(vectors), MAX_VECTORS):
        yield list(vectors[start : start + MAX_VECTORS])


def _after(vectors: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of the vectors when `moved` bytes of them have been dealt with."""
    if moved == sum(map(len, vectors)):
        return []
    for index, vector in enumerate(vectors):
        if moved < len(vector):
            return [vector[moved:], *vectors[index + 1 :]]
        moved -= len(vector)
    return []
