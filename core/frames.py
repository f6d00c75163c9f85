"""Frames over one TCP connection: what a link (core.links) is made of.

A frame is a byte that says its kind, the length of its body in four bytes, little-endian, and the body. A connection
notices that the network between the two ends is cut: every KEEPALIVE_S each end says something, and what has not been
acknowledged for KEEPALIVE_TIMEOUT_S ends it. It is the kernel that acknowledges, so a process that is busy for longer
than that is not taken for gone, even if its kernel has no room for more.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, cast

KEEPALIVE_S = 1.0
KEEPALIVE_TIMEOUT_S = 4.0
"""Less than a worker may be silent (core.wire). A wire that is cut for a few seconds costs no link: to open another
takes a wire that stays whole for as long."""
MAX_BODY_BYTES = 256 * 2**20
MAX_OPENING_BYTES = 256
"""Of whoever connects, until it has said what it wants."""
MAX_UNREAD_BYTES = 16 * 2**20
"""The other end is not heard any further while as much waits to be read."""
_HEADER = struct.Struct("<BI")
_TCP_INFO = struct.Struct("=4B20xI28xI")
"""The beginning of the kernel's tcp_info: state, congestion state, retransmits, probes; the segments in flight; the
milliseconds since the last acknowledgement."""
_UNANSWERED_PROBES = 2
"""A kernel answers no two within half a second."""


class Kind(IntEnum):
    OPEN = 1
    """The first frame of whoever connects: the name of the service it wants."""
    MESSAGE = 2
    ALIVE = 3
    """Nothing is said."""
    END = 4
    """The last frame of an end that has said all."""
    FAILURE = 5
    """The same, of one that gave up: why."""


_KINDS = frozenset(Kind)


class Frame(NamedTuple):
    kind: Kind
    body: bytes


class _Sending(NamedTuple):
    """How it is with what an end has sent, as its kernel sees it."""

    in_flight: bool
    """Something that the other end had room for is not acknowledged."""
    unanswered: bool
    """The other end had no room left and has stopped answering whether it has."""


def _sending(end: socket.socket) -> _Sending:
    """It is `end` that sends."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    _, _, _, num_probes, num_segments, silent_ms = _TCP_INFO.unpack(info)
    silent = num_probes >= _UNANSWERED_PROBES and silent_ms > 1000 * KEEPALIVE_TIMEOUT_S
    return _Sending(num_segments > 0, silent)


class Connection(asyncio.Protocol):
    """One end, to be used on its loop. `on_made` is called with it once it is connected; without, it is the end that
    has connected itself."""

    def __init__(self, on_made: Callable[[Connection], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when the connection is no more, whatever ended it."""
        self.peer = ""
        self._loop = loop
        self._on_made = on_made
        self._max_body_bytes = MAX_BODY_BYTES if on_made is None else MAX_OPENING_BYTES
        self._transport: asyncio.Transport | None = None
        self._unparsed = bytearray()
        self._unread: deque[Frame] = deque()
        self._unread_bytes = 0
        self._heard = asyncio.Event()
        self._paused = False
        self._has_sent = False
        self._alive: asyncio.TimerHandle | None = None

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """In order. Once the connection has ended it is dropped: the other end can no longer hear."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_HEADER.pack(kind, len(body)) + body)
            self._has_sent = True

    async def receive(self) -> Frame | None:
        """The next frame that says something; None when the connection has ended and all is read. One task at a
        time."""
        while not self._unread:
            if self.ended.done():
                return None
            self._heard.clear()
            await self._heard.wait()
        frame = self._unread.popleft()
        self._unread_bytes -= len(frame.body)
        if self._paused and self._unread_bytes < MAX_UNREAD_BYTES // 2:
            self._paused = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()
        return frame

    def close(self) -> None:
        """When all that was sent is on its way."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """At once: what was sent may be lost."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its type
        host, port = transport.get_extra_info("peername")[:2]
        self.peer = f"{host}:{port}"
        end = transport.get_extra_info("socket")
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_timeout(end, KEEPALIVE_TIMEOUT_S)
        self._alive = self._loop.call_later(KEEPALIVE_S, self._say_alive)
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        at = 0
        while len(self._unparsed) - at >= _HEADER.size:
            number, length = _HEADER.unpack_from(self._unparsed, at)
            if number not in _KINDS or length > self._max_body_bytes:
                self._hear(Frame(Kind.FAILURE, b"what came is no frame of a link"))
                self.abort()
                break
            body = at + _HEADER.size
            if len(self._unparsed) < body + length:
                break
            at = body + length
            self._hear(Frame(Kind(number), bytes(self._unparsed[body:at])))
        del self._unparsed[:at]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  how it ended makes no difference
        if self._alive is not None:
            self._alive.cancel()
        if not self.ended.done():
            self.ended.set_result(None)
        self._heard.set()

    # -----------------------------------------------------------------------------------------------------------------

    def _hear(self, frame: Frame) -> None:
        if frame.kind is Kind.ALIVE:
            return
        if frame.kind is Kind.OPEN:
            self._max_body_bytes = MAX_BODY_BYTES
        self._unread.append(frame)
        self._unread_bytes += len(frame.body)
        if self._unread_bytes > MAX_UNREAD_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._heard.set()

    def _say_alive(self) -> None:
        self._look_after_the_other_end()
        if not self._has_sent:
            self.send(Kind.ALIVE)
        self._has_sent = False
        self._alive = self._loop.call_later(KEEPALIVE_S, self._say_alive)

    def _look_after_the_other_end(self) -> None:
        """The kernel's time limit is set for what is in flight only: it would hold for an end that has no room left,
        too, although that answers."""
        if self._transport is None:
            return
        end = self._transport.get_extra_info("socket")
        sending = _sending(end)
        _set_timeout(end, KEEPALIVE_TIMEOUT_S if sending.in_flight else 0)
        if sending.unanswered:
            self.abort()


def _set_timeout(end: socket.socket, seconds: float) -> None:
    """Zero is none."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
