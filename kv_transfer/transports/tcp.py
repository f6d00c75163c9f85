"""TCP: connections of the transport's own beside the link, KV sent straight out of the giver's pool.

The taker connects to the port that the giver announced, presents the token of the link, and asks for the pieces of one
job at a time per connection (tcp_wire.py). A thread receives them and copies them to the slots. Being quiet is quick:
`shutdown` wakes the thread, whatever the peer does, and what the kernel still holds for it is no more than a socket
buffer.

A connection that has seen any error or cancel is thrown away, and the next job makes a new one.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from functools import partial
from typing import ClassVar

import torch

from core.errors import TransferError, said_by_system
from core.links import host_and_port
from kv_transfer.messages import FromGiver, Hello
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import PullJob, Transport, Unusable, settled
from kv_transfer.transports.batches import Staging, land
from kv_transfer.transports.lane import Lane
from kv_transfer.transports.tcp_io import (
    IDLE_TIMEOUT_S,
    batched,
    prepare,
    receive,
    receive_frame,
    send_frame,
)

MAX_CONNECTIONS = 2
"""Jobs pulled at a time over one link: while the pieces of one are hashed the other's arrive."""


class Tcp(Transport):
    """`giver_address` is host:port of the link. Raises Unusable when the giver has no data plane there."""

    name: ClassVar[str] = "tcp"

    def __init__(self, giver: Hello, giver_address: str) -> None:
        if giver.tcp is None:
            raise Unusable("the giver does not listen for connections that fetch KV")
        self._host, _ = host_and_port(giver_address)
        self._endpoint = giver.tcp
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._turns = asyncio.Semaphore(MAX_CONNECTIONS)
        self._closed = False

    async def pull(self, job: PullJob) -> None:
        if not job.pieces:
            return
        async with self._turns:
            job.on_began()
            await self._pull(job)

    async def _pull(self, job: PullJob) -> None:
        connection = await self._connection()
        if self._closed:
            connection.close()
            raise TransferError("the link to the giver has ended")
        self._busy.add(connection)
        try:
            await self._fetch(connection, job)
            if self._closed:
                raise TransferError("the link to the giver has ended")
            self._idle.append(connection)
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)

    async def _fetch(self, connection: _Connection, job: PullJob) -> None:
        ask = connection.ask(job)  # here, so that the giver is at work while our thread wakes
        work = connection.lane.run(partial(connection.fetch, job, ask))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            connection.stop()
            await settled(work)
            raise

    def on_message(self, message: FromGiver) -> None:
        """All that the giver has to say comes over the connections."""

    def close(self) -> None:
        self._closed = True
        for connection in self._busy:
            connection.stop()
        while self._idle:
            self._idle.pop().close()

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
        self._staging = Staging(torch.device("cpu"))
        self._stopped = False

    def fresh(self) -> bool:
        """Nothing has come since the last job: neither its end nor bytes that nobody asked for."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """When `fetch` is over."""
        self.socket.close()
        self.lane.close()

    def stop(self) -> None:
        """`fetch` returns soon, without the giver's help."""
        self._stopped = True
        with suppress(OSError):  # not connected any more
            self.socket.shutdown(socket.SHUT_RDWR)

    def ask(self, job: PullJob) -> wire.Ask:
        """Returns at once: a request is small and the connection has nothing else to send."""
        self._number = (self._number + 1) % 2**32
        nbytes = sum(map(job.coding.wire_bytes, job.pieces))
        ask = wire.Ask(self._number, job.first, job.first + len(job.pieces), nbytes)
        send_frame(self.socket, self._unsent + wire.encode_request(ask, job.transfer_id))
        self._unsent = b""
        return ask

    def fetch(self, job: PullJob, ask: wire.Ask) -> None:
        self._expect_grant(ask)
        for batch in batched(job.coding, job.pieces):
            buffer = self._staging.take(batch.nbytes)
            receive(self.socket, buffer.numpy().data)
            land(job, batch, buffer)
            if self._stopped:
                raise TransferError("stopped")

    def _expect_grant(self, ask: wire.Ask) -> None:
        reason_bytes = wire.decode_reply(receive_frame(self.socket, wire.REPLY_BYTES), ask)
        if reason_bytes:
            reason = wire.decode_reason(receive_frame(self.socket, reason_bytes))
            raise TransferError(f"the giver refuses: {reason}")


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
