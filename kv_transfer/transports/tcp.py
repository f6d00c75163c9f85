"""TCP: connections of the transport's own beside the link, KV sent straight out of the giver's pool.

The taker connects to the port that the giver announced, presents the token of the link, and asks for the pieces of one
job at a time per connection (tcp_wire.py). A thread receives them and copies them to the slots. Being quiet is quick:
`shutdown` wakes the thread, whatever the peer does, and what the kernel still holds for it is no more than a socket
buffer.

Of a transfer that has more to come all is asked for at once, and the giver pushes it as it is sealed: KV is on its way
before the taker has heard of it. The connection is the transfer's own until its last job.

A connection that has seen any error or cancel is thrown away, and the next job makes a new one.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from contextlib import suppress
from functools import partial
from typing import ClassVar

import torch

from core.errors import TransferError, said_by_system
from core.links import host_and_port
from kv_transfer.messages import FromGiver, Hello
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import PullJob, Transport, Unusable, finished
from kv_transfer.transports.batches import Staging, land
from kv_transfer.transports.lane import Lane
from kv_transfer.transports.tcp_io import (
    IDLE_TIMEOUT_S,
    QUICK_BYTES,
    batched,
    prepare,
    receive,
    receive_frame,
    send_frame,
)

MAX_PULLS = 2
"""Jobs asked for one by one that are pulled at a time over one link: while the pieces of one are hashed the other's
arrive."""
MAX_PUSHES = 4
"""Transfers of one link whose KV the giver pushes at a time. Their jobs wait for nobody's turn: what a giver can't be
rid of in time it gives up."""


class Tcp(Transport):
    """`giver_address` is host:port of the link. Raises Unusable when the giver has no data plane there."""

    name: ClassVar[str] = "tcp"

    def __init__(self, giver: Hello, giver_address: str) -> None:
        if giver.tcp is None:
            raise Unusable("the giver does not listen for connections that fetch KV")
        self._host, _ = host_and_port(giver_address)
        self._endpoint = giver.tcp
        self._idle: list[_Connection] = []
        self._pushed: dict[str, _Connection | None] = {}
        """By transfer; None while a job of it is pulled."""
        self._busy: set[_Connection] = set()
        self._turns = asyncio.Semaphore(MAX_PULLS)
        self._closed = False

    async def pull(self, job: PullJob) -> None:
        if not job.pieces:
            return
        if job.transfer_id in self._pushed or (job.more and len(self._pushed) < MAX_PUSHES):
            job.on_began()
            await self._pull_pushed(job)
        else:
            async with self._turns:
                job.on_began()
                connection = await self._connection()
                await self._fetch(connection, job, push=False)
                self._idle.append(connection)

    async def _pull_pushed(self, job: PullJob) -> None:
        connection = self._pushed.get(job.transfer_id)
        self._pushed[job.transfer_id] = None
        try:
            if connection is not None:
                self._idle.append(connection)  # the first that is looked at
            connection = await self._connection()
            await self._fetch(connection, job, push=job.more)
        except BaseException:
            self._pushed.pop(job.transfer_id, None)
            raise
        self._have(job, connection)

    def pull_at_once(self, job: PullJob) -> bool:
        """What was pushed and is here already."""
        connection = self._pushed.get(job.transfer_id)
        if connection is None or job.nbytes > QUICK_BYTES or not connection.is_here(job):
            return False
        job.on_began()
        try:
            connection.fetch(job)
        except BaseException:
            self.forget(job.transfer_id)
            raise
        self._have(job, connection)
        return True

    def _have(self, job: PullJob, connection: _Connection) -> None:
        """A job of a transfer that is pushed has ended well."""
        if job.more:
            self._pushed[job.transfer_id] = connection
        else:
            del self._pushed[job.transfer_id]
            connection.has_all()
            self._idle.append(connection)

    async def _fetch(self, connection: _Connection, job: PullJob, *, push: bool) -> None:
        """The connection is closed unless this returns."""
        self._busy.add(connection)
        try:
            self._check_open()
            connection.ask(job, push=push)  # here, so that the giver is at work while our thread wakes
            await finished(connection.lane.run(partial(connection.fetch, job)), connection.stop)
            self._check_open()
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)

    def _check_open(self) -> None:
        if self._closed:
            raise TransferError("the link to the giver has ended")

    def on_message(self, message: FromGiver) -> None:
        """All that the giver has to say comes over the connections."""

    def forget(self, transfer_id: str) -> None:
        if (connection := self._pushed.pop(transfer_id, None)) is not None:
            connection.close()

    def close(self) -> None:
        self._closed = True
        for connection in self._busy:
            connection.stop()
        while self._idle:
            self._idle.pop().close()
        for transfer_id in list(self._pushed):
            self.forget(transfer_id)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.fresh():
                return connection
            connection.close()
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                return _Connection(await _connected(self._host, self._endpoint.port), self._endpoint.token)
        except TimeoutError as error:
            raise TransferError(f"nobody answers at {self._host}, port {self._endpoint.port}") from error
        except OSError as error:
            raise TransferError(
                f"cannot connect to {self._host}, port {self._endpoint.port}: {said_by_system(error)}"
            ) from error


class _Connection:
    """An open connection and what is kept with it. One job at a time: `ask`, then `fetch` in a thread."""

    def __init__(self, end: socket.socket, token: bytes) -> None:
        self.socket = end
        self.lane = Lane("kv-tcp")
        self._unsent = wire.encode_greeting(token)
        self._number = 0
        self._ask: wire.Ask | None = None
        """What the giver has still to grant."""
        self._coming = wire.Ask(0, 0)
        """What it has granted and we have not received."""
        self._staging = Staging(torch.device("cpu"))
        self._stopped = False

    def fresh(self) -> bool:
        """Nothing has come since the last job: neither its end nor bytes that nobody asked for."""
        try:
            came = self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(came) and self._ask is not None

    def close(self) -> None:
        """When `fetch` is over."""
        self.socket.close()
        self.lane.close()

    def stop(self) -> None:
        """`fetch` returns soon, without the giver's help."""
        self._stopped = True
        with suppress(OSError):  # not connected any more
            self.socket.shutdown(socket.SHUT_RDWR)

    def ask(self, job: PullJob, *, push: bool) -> None:
        """For the job, or with `push` for all of its transfer from there on; not again while that is coming. Returns at
        once: a request is small and the connection has nothing else to send."""
        if self._ask is not None:
            return
        self._number = (self._number + 1) % 2**32
        ask = wire.Ask(self._number, job.first) if push else wire.Ask(self._number, job.first, job.last, job.nbytes)
        send_frame(self.socket, self._unsent + wire.encode_request(ask, job.transfer_id))
        self._unsent, self._ask = b"", ask

    def has_all(self) -> None:
        """Nothing more is to come of what is being pushed."""
        self._ask = None

    def is_here(self, job: PullJob) -> bool:
        """Whether `fetch` would have nothing to wait for, and no codec to work for."""
        if job.coding.codec != "none":
            return False
        here, coming = _num_unread(self.socket), self._coming
        if not coming.nbytes and self._ask is not None and here >= wire.REPLY_BYTES:
            here -= wire.REPLY_BYTES
            with suppress(TransferError):  # `fetch` will find the same
                coming = wire.decode_reply(self.socket.recv(wire.REPLY_BYTES, socket.MSG_PEEK), self._ask).granted
        return job.last <= coming.last and job.nbytes <= here

    def fetch(self, job: PullJob) -> None:
        while job.pieces:
            if not self._coming.nbytes:
                self._coming = self._granted()
            part = job.part(job.first, min(job.last, self._coming.last))
            self._begin(part)
            for batch in batched(part.coding, part.pieces):
                buffer = self._staging.take(batch.nbytes)
                receive(self.socket, buffer.numpy().data)
                land(part, batch, buffer)
                if self._stopped:
                    raise TransferError("stopped")
            job = job.part(part.last)

    def _begin(self, part: PullJob) -> None:
        """This is all that comes or the beginning of it."""
        coming, rest = self._coming, self._coming.nbytes - part.nbytes
        if coming.first != part.first or rest < 0 or (rest == 0) != (coming.last == part.last):
            raise TransferError(
                f"the giver sends pieces {coming.first} to {coming.last} as {coming.nbytes} bytes; of them pieces "
                f"{part.first} to {part.last} are {part.nbytes}"
            )
        self._coming = coming._replace(first=part.last, nbytes=rest)

    def _granted(self) -> wire.Ask:
        ask = self._ask
        assert ask is not None
        reply = wire.decode_reply(receive_frame(self.socket, wire.REPLY_BYTES), ask)
        if reply.reason_bytes:
            reason = wire.decode_reason(receive_frame(self.socket, reply.reason_bytes))
            raise TransferError(f"the giver refuses: {reason}")
        self._ask = ask._replace(first=reply.granted.last) if ask.stands else None
        return reply.granted


def _num_unread(end: socket.socket) -> int:
    """Bytes that have come."""
    return int.from_bytes(fcntl.ioctl(end, termios.FIONREAD, bytes(4)), sys.byteorder)


async def _connected(host: str, port: int) -> socket.socket:
    """A blocking socket; until it is connected the wait for it can be cancelled."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    end = socket.socket(family, kind, protocol)
    try:
        end.setblocking(False)
        await loop.sock_connect(end, address)
        prepare(end)
        end.setblocking(True)
    except BaseException:
        end.close()
        raise
    return end
