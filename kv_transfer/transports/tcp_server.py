"""The giver's side of TCP: a listening socket of its own, next to the one that links come in by.

A connection belongs to the link whose token it presents first, and asks for transfers of that link only. Until then it
has GREETING_S and GREETING_BYTES, and only MAX_STRANGERS such connections are held at a time. Requests are read on the
event loop, where the state machines are; what they ask for is sent by a thread, straight out of the pool. So blocks are
read for as long as the network takes, and when a transfer ends meanwhile its connection is cut to get them back. While
a request stands nothing is read.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from core.errors import ConfigError, TransferError
from kv_transfer.messages import TcpEndpoint
from kv_transfer.pieces import Rows
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import settled
from kv_transfer.transports.batches import Staging, batches
from kv_transfer.transports.lane import Lane
from kv_transfer.transports.reading import Reading
from kv_transfer.transports.tcp_io import QUICK_BYTES, Window, prepare, send, send_frame, vectors_of

logger = logging.getLogger(__name__)

GREETING_S = 2.0
MAX_STRANGERS = 64
CUT_AFTER_S = 0.5
"""What a transfer that has ended has to stop by itself: the taker hears of the end over the link, and stops. Cut at
once, it would often see a connection that breaks for no reason."""
READ_BYTES = wire.GREETING_BYTES + wire.REQUEST_BYTES + wire.MAX_ID_BYTES
"""As much as a taker has to say before it has been answered."""
ACCEPT_PAUSE_S = 0.1
"""Before accepting again when the process has no descriptors left."""


StartReading = Callable[[str], Reading]
"""From a transfer id; raises TransferError, with the reason, if it may not be read."""


@dataclass(eq=False)
class _Link:
    token: bytes
    start_reading: StartReading
    connections: set[_Connection] = field(default_factory=set)


@dataclass
class _Standing:
    """A request that goes on: what it has still to be answered with."""

    link: _Link
    transfer_id: str
    ask: wire.Ask


class _Answer(NamedTuple):
    """One that was begun: its `rest` is for a thread, and then the reading ends."""

    reading: Reading
    rest: Callable[[], None]


class _Connection:
    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.transfer_id: str | None = None
        """What is being sent."""
        self.standing: _Standing | None = None
        self.begun: _Answer | None = None
        """To what stands, and nobody is at it yet."""
        self.ending: asyncio.TimerHandle | None = None
        """Will cut it, unless it has been sent until then."""
        self.staging = Staging(torch.device("cpu"))
        self.lane = Lane("kv-tcp-send")
        self._loop = asyncio.get_running_loop()
        self._unread = b""
        self._ended = False
        self._heard = asyncio.Event()
        self._loop.add_reader(end.fileno(), self._hear)
        end.setblocking(True)  # for the thread that sends. Last, as uvloop has what it polls not block

    def cut(self) -> None:
        """Whoever waits for it, thread or loop, stops waiting."""
        with suppress(OSError):  # not connected any more
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """When nothing is being sent."""
        self._end()
        self.socket.close()
        self.lane.close()

    async def read(self, nbytes: int, *, may_end: bool = False) -> bytes:
        """Exactly as many bytes; none if the other end has closed the connection before the first and `may_end`."""
        while len(self._unread) < nbytes:
            if self._ended and may_end and not self._unread:
                return b""
            if self._ended:
                raise TransferError(f"the connection ended {nbytes - len(self._unread)} bytes before a frame did")
            await self.woken()
        frame, self._unread = self._unread[:nbytes], self._unread[nbytes:]
        return frame

    @property
    def heard(self) -> bool:
        """Whether there is something to read, or the end."""
        return bool(self._unread) or self._ended

    async def woken(self) -> None:
        """Returns when something was heard, or `wake` called."""
        self._heard.clear()
        await self._heard.wait()

    def wake(self) -> None:
        self._heard.set()

    def _hear(self) -> None:
        """There is something to read, or the end. Who says more than a request at a time is not heard out."""
        try:
            more = self.socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # it is broken
            more = b""
        self._unread += more
        if not more or len(self._unread) > READ_BYTES:
            self._end()
        self._heard.set()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._loop.remove_reader(self.socket.fileno())


class TcpServer:
    """Listens on `host`, at a free port, until `close`. Raises ConfigError if it can't. Make and use it on one running
    event loop."""

    def __init__(self, rows: Rows, host: str) -> None:
        self._rows = rows
        self._loop = asyncio.get_running_loop()
        self._links: list[_Link] = []
        self._connections: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._strangers = asyncio.Semaphore(MAX_STRANGERS)
        self._listener = _listen(host)
        self._port = int(self._listener.getsockname()[1])
        self._accepting = self._loop.create_task(self._accept())

    def admit(self, start_reading: StartReading) -> TcpEndpoint:
        """What the taker at the other end of a link needs to connect."""
        link = _Link(secrets.token_bytes(wire.TOKEN_BYTES), start_reading)
        self._links.append(link)
        return TcpEndpoint(self._port, link.token)

    def dismiss(self, endpoint: TcpEndpoint) -> None:
        """The link has ended: so do its connections."""
        for link in [link for link in self._links if link.token == endpoint.token]:
            self._links.remove(link)
            for connection in link.connections:
                connection.cut()

    def stop(self, transfer_id: str) -> None:
        """The transfer has ended: read its blocks no longer than CUT_AFTER_S. `Reading.end` follows."""
        for connection in self._connections:
            if connection.transfer_id == transfer_id and connection.ending is None:
                connection.ending = self._loop.call_later(CUT_AFTER_S, connection.cut)

    def look(self, transfer_id: str) -> None:
        """There is more of the transfer, or it has ended. Of the former what is little has been sent when this returns,
        as far as sockets have room for it: the taker, told after this, has no need to wait for it."""
        for connection in self._connections:
            standing = connection.standing
            if standing is not None and standing.transfer_id == transfer_id:
                if connection.transfer_id is None:
                    with suppress(TransferError):  # whoever is woken meets it too
                        connection.begun = self._go_on(connection, standing)
                connection.wake()

    async def close(self) -> None:
        """Returns when nothing is read or sent any more."""
        self._accepting.cancel()
        await asyncio.wait({self._accepting})
        self._listener.close()
        for connection in self._connections:
            connection.cut()
        if self._serving:
            await asyncio.wait(self._serving)

    async def _accept(self) -> None:
        while True:
            await self._strangers.acquire()
            try:
                accepted, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:
                logger.error("cannot accept a connection for KV: %s", error)
                self._strangers.release()
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            task = self._loop.create_task(self._serve(_Connection(accepted)))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, connection: _Connection) -> None:
        self._connections.add(connection)
        link = None
        try:
            link = await self._admitted(connection)
            link.connections.add(connection)
            await self._answer_all(connection, link)
        except (TransferError, OSError) as error:
            logger.info("a connection that fetches KV was dropped: %s", error)
        finally:
            if link is not None:
                link.connections.discard(connection)
            self._connections.discard(connection)
            connection.close()

    async def _admitted(self, connection: _Connection) -> _Link:
        """The link that the connection belongs to."""
        try:
            prepare(connection.socket)
            async with asyncio.timeout(GREETING_S):
                greeting = await connection.read(wire.GREETING_BYTES)
        except TimeoutError as error:
            raise TransferError(f"no greeting within {GREETING_S:g} s") from error
        finally:
            self._strangers.release()
        token = wire.decode_greeting(greeting)
        for link in self._links:
            if hmac.compare_digest(link.token, token):
                return link
        raise TransferError("its token belongs to no link")

    async def _answer_all(self, connection: _Connection, link: _Link) -> None:
        while frame := await connection.read(wire.REQUEST_BYTES, may_end=True):
            ask, id_bytes = wire.decode_request(frame)
            transfer_id = wire.decode_transfer_id(await connection.read(id_bytes))
            try:
                reading = _granted(link, transfer_id, ask)
            except TransferError as error:
                connection.socket.send(wire.encode_refusal(ask, error.message), socket.MSG_DONTWAIT)
                continue
            if reading is not None and (answer := self._begin(connection, ask.number, reading)) is not None:
                await self._finish(connection, answer)
            if ask.stands:
                rest = ask if reading is None else ask._replace(first=reading.last)
                await self._push(connection, _Standing(link, transfer_id, rest))

    async def _push(self, connection: _Connection, standing: _Standing) -> None:
        """What is sealed, until the taker has something else to say or the transfer ends."""
        connection.standing = standing
        while connection.begun or not connection.heard:
            answer, connection.begun = connection.begun, None
            try:
                answer = answer or self._go_on(connection, standing)
            except TransferError:  # it has ended, which the taker hears over the link, or the connection has
                break
            if answer is None:
                await connection.woken()
            else:
                await self._finish(connection, answer)
        connection.standing = None

    def _go_on(self, connection: _Connection, standing: _Standing) -> _Answer | None:
        """Answers with what is sealed by now, if there is something, as `_begin`."""
        reading = _granted(standing.link, standing.transfer_id, standing.ask)
        if reading is None:
            return None
        standing.ask = standing.ask._replace(first=reading.last)
        return self._begin(connection, standing.ask.number, reading)

    def _begin(self, connection: _Connection, number: int, reading: Reading) -> _Answer | None:
        """Answers, at once if it is little and the socket has room for it: None then, and the reading has ended."""
        window = Window(self._rows, reading.slots, connection.staging)
        grant = wire.encode_grant(wire.Ask(number, reading.first, reading.last, reading.nbytes))
        quick = reading.coding.codec == "none" and reading.nbytes <= QUICK_BYTES
        try:
            left = window.send_at_once(connection.socket, grant, reading.pieces) if quick else None
        except TransferError:
            reading.end()
            raise
        if left is not None and not len(left.places):
            reading.end()
            return None
        connection.transfer_id = reading.transfer_id
        if left is None:
            return _Answer(reading, partial(_send, connection, window, grant, reading))
        return _Answer(reading, partial(send, connection.socket, left))

    async def _finish(self, connection: _Connection, answer: _Answer) -> None:
        sending = connection.lane.run(answer.rest)
        await settled(sending)
        connection.transfer_id = None
        if connection.ending is not None:
            connection.ending.cancel()
            connection.ending = None
        answer.reading.end()
        sending.result()


def _send(connection: _Connection, window: Window, grant: bytes, reading: Reading) -> None:
    send_frame(connection.socket, grant, more=True)  # by itself it would only wake the taker early
    for batch in batches(reading.coding, reading.pieces):
        if batch.framed:
            send(connection.socket, vectors_of(reading.frames(batch)))
        else:
            window.send(connection.socket, reading.pieces[batch.first : batch.last])


def _granted(link: _Link, transfer_id: str, ask: wire.Ask) -> Reading | None:
    """What is asked for; None while there is nothing of it, if it stands."""
    reading, found = link.start_reading(transfer_id), None
    try:
        found = reading.since(ask.first) if ask.stands else reading.part(ask.first, ask.last, ask.nbytes)
    finally:
        if found is None:
            reading.end()
    return found


def _listen(host: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
            listener.listen(MAX_STRANGERS)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} for who fetches KV: {error.strerror or error}") from error
    return listener
