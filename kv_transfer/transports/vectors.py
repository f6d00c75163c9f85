"""Places in memory as the kernel takes them, and sent from there without a Python object for each."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Places: TypeAlias = NDArray[np.uint64]  # [n, 2] of address and length, none of them empty: the C type iovec

MAX_VECTORS = 1024
"""IOV_MAX of Linux."""

_libc = ctypes.CDLL(None, use_errno=True)  # calls let other threads run


class _Message(ctypes.Structure):
    """The C type msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("num_vectors", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_sendmsg = _libc.sendmsg
_sendmsg.argtypes = (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)
_sendmsg.restype = ctypes.c_ssize_t


class Vectors(NamedTuple):
    places: Places
    memory: object
    """Where they are; it lives for as long as they do."""


def of_arrays(arrays: Sequence[NDArray[np.uint8]]) -> Vectors:
    """Contiguous ones."""
    places = [(array.ctypes.data, array.nbytes) for array in arrays]
    return Vectors(np.array(places, np.uint64).reshape(-1, 2), arrays)


def of_runs(memory: NDArray[np.uint8], offsets: NDArray[np.int64], runs: NDArray[np.int64]) -> Vectors:
    """The same `runs`, [r, 2] of first byte and length, from every one of the `offsets` into the memory on, one offset
    after the other."""
    places = np.empty((len(offsets), len(runs), 2), np.uint64)
    places[..., 0] = memory.ctypes.data + offsets[:, None] + runs[:, 0]
    places[..., 1] = runs[:, 1]
    return Vectors(places.reshape(-1, 2), memory)


def send(end: socket.socket, vectors: Vectors) -> None:
    """All of them, in order. OSError as of a socket's sendmsg; BlockingIOError when its time to send is over."""
    left = vectors.places
    while len(left):
        left = _after(left, _moved(end, left))


def send_at_once(end: socket.socket, vectors: Vectors) -> Vectors:
    """As many of them as the kernel takes without waiting. Returns the others; OSError as `send`."""
    left = vectors.places
    try:
        while len(left):
            left = _after(left, _moved(end, left, socket.MSG_DONTWAIT))
    except BlockingIOError:
        pass
    return vectors._replace(places=left)


def joined(parts: Sequence[Vectors]) -> Vectors:
    """One after the other."""
    return Vectors(np.concatenate([part.places for part in parts]), [part.memory for part in parts])


def _moved(end: socket.socket, places: Places, flags: int = 0) -> int:
    """How many bytes one call moves."""
    part = np.ascontiguousarray(places[:MAX_VECTORS])
    message = _Message(vectors=part.ctypes.data, num_vectors=len(part))
    while (moved := int(_sendmsg(end.fileno(), ctypes.byref(message), socket.MSG_NOSIGNAL | flags))) < 0:
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))  # of the class that belongs to the number
    return moved


def _after(places: Places, moved: int) -> Places:
    """What is left of them when the first `moved` bytes have been dealt with."""
    if moved == int(places[:MAX_VECTORS, 1].sum()):
        return places[MAX_VECTORS:]
    ends = np.cumsum(places[:MAX_VECTORS, 1])
    done = int(np.searchsorted(ends, moved, side="right"))
    left = places[done:]
    if begun := moved - (int(ends[done - 1]) if done else 0):
        left = left.copy()
        left[0, 0] += begun
        left[0, 1] -= begun
    return left
