"""Vectors: what the kernel is told to move, and what is left when it moved a part."""

from __future__ import annotations

import ctypes
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.transports import vectors
from kv_transfer.transports.vectors import of_arrays, of_runs, send

Ends = tuple[socket.socket, socket.socket]


@contextmanager
def joined() -> Iterator[Ends]:
    """Two sockets that wait for each other, but not for ever."""
    one, other = socket.socketpair()
    with one, other:
        for end in (one, other):
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 5, 0))
        yield one, other


@pytest.fixture
def ends() -> Iterator[Ends]:
    with joined() as both:
        yield both


@st.composite
def runs_of(draw: st.DrawFn) -> np.ndarray:
    """Runs of bytes that lie anywhere in a plane of 4096 and don't overlap."""
    cuts = sorted(draw(st.sets(st.integers(0, 4096), min_size=2, max_size=40)))
    spans = [(start, stop - start) for start, stop in zip(cuts[::2], cuts[1::2], strict=False)]
    return np.array(draw(st.permutations(spans)), np.int64).reshape(-1, 2)


@settings(deadline=None, max_examples=60)
@given(runs=runs_of(), planes=st.permutations(range(4)), at_a_time=st.integers(1, 7), buffer=st.integers(1, 4096))
def test_what_is_sent_from_runs_comes_one_run_after_the_other(
    runs: np.ndarray, planes: list[int], at_a_time: int, buffer: int
) -> None:
    source = np.random.default_rng(0).integers(0, 256, (4, 4096), np.uint8)
    expected = b"".join(source[plane, start : start + n].tobytes() for plane in planes for start, n in runs.tolist())
    with joined() as (one, other), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "MAX_VECTORS", at_a_time)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)  # so that calls move parts
        sending = threading.Thread(target=send, args=(one, of_runs(source, 4096 * np.array(planes), runs)))
        sending.start()
        assert other.recv(len(expected), socket.MSG_WAITALL) == expected
        sending.join()


@settings(deadline=None, max_examples=60)
@given(runs=runs_of(), at_a_time=st.integers(1, 7), buffer=st.integers(1, 8192))
def test_what_the_kernel_has_no_room_for_is_left_and_can_be_sent_later(
    runs: np.ndarray, at_a_time: int, buffer: int
) -> None:
    source = np.random.default_rng(0).integers(0, 256, (4, 4096), np.uint8)
    whole = vectors.joined([of_arrays([np.frombuffer(b"head", np.uint8)]), of_runs(source, 4096 * np.arange(4), runs)])
    expected = b"head" + b"".join(source[plane, start : start + n].tobytes() for plane in range(4) for start, n in runs)
    with joined() as (one, other), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "MAX_VECTORS", at_a_time)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        left = vectors.send_at_once(one, whole)
        num_left = int(left.places[:, 1].sum())
        num_here = len(expected) - num_left
        came = other.recv(num_here, socket.MSG_WAITALL) if num_here else b""
        sending = threading.Thread(target=send, args=(one, left))
        sending.start()
        rest = other.recv(num_left, socket.MSG_WAITALL) if num_left else b""
        assert came + rest == expected
        sending.join()


def test_a_call_that_moves_a_part_is_gone_on_from_there(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def a_byte(descriptor: int, message: Any, flags: int) -> int:
        calls.append(flags)
        address, _ = (ctypes.c_uint64 * 2).from_address(message._obj.vectors)
        return ends[0].send(ctypes.string_at(address, 1))

    monkeypatch.setattr(vectors, "_sendmsg", a_byte)
    send(ends[0], of_arrays([np.frombuffer(part, np.uint8) for part in (b"abc", b"d", b"efgh")]))
    assert ends[1].recv(9) == b"abcdefgh"
    assert len(calls) == 8


def test_who_sends_to_a_closed_end_is_told_and_lives_on(ends: Ends) -> None:
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        send(ends[0], of_arrays([np.zeros(5, np.uint8)]))


def test_a_wait_is_no_longer_than_the_socket_allows(ends: Ends) -> None:
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 20_000))
    with pytest.raises(BlockingIOError):
        send(ends[0], of_arrays([np.zeros(8 << 20, np.uint8)]))


def test_a_signal_does_not_end_a_wait(ends: Ends) -> None:
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    came: list[bytes] = []
    reading = threading.Thread(target=lambda: came.append(ends[1].recv(1 << 20, socket.MSG_WAITALL)))
    handled = signal.signal(signal.SIGALRM, lambda *_: reading.start())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        send(ends[0], of_arrays([np.ones(1 << 20, np.uint8)]))
    finally:
        signal.signal(signal.SIGALRM, handled)
    reading.join()
    assert came == [b"\1" * (1 << 20)]
