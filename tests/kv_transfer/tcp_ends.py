"""Either end of TCP between two pools, with nobody at the other one or somebody who does not keep to the protocol."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from sides import TIMEOUT_S, layout

from core.errors import TransferError
from kv_transfer.coding import Coding
from kv_transfer.frames import Frames
from kv_transfer.messages import Hello, TcpEndpoint
from kv_transfer.pieces import Extent, Rows, cut, piece_bytes, seal, slots_of
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import PullJob
from kv_transfer.transports.reading import Reading
from kv_transfer.transports.tcp import Tcp
from kv_transfer.transports.tcp_server import TcpServer

NUM_TOKENS, THEIRS, OURS = 50, [5, 6, 9, 2], [60, 3, 4, 1]
LAYOUT = layout()


@dataclass
class Taken:
    """A job of one transfer, and what came of it."""

    source: Rows
    target: Rows
    job: PullJob = field(init=False)
    verified: list[int] = field(default_factory=list)
    num_sealed: int | None = None
    """So many pieces the giver has sealed; by default all. None of a transfer that has ended: -1."""

    def __post_init__(self) -> None:
        theirs, ours = (slots_of(table, LAYOUT.block_size, NUM_TOKENS) for table in (THEIRS, OURS))
        pieces = seal(self.source, theirs, list(cut(LAYOUT, Extent(0, NUM_TOKENS, 0, LAYOUT.num_layers), 3000)))
        self.job = PullJob(
            transfer_id="t",
            first=0,
            pieces=pieces,
            rows=self.target,
            giver_slots=theirs,
            taker_slots=ours,
            coding=Coding("none", LAYOUT),
            on_began=lambda: None,
            on_verified=self.verified.append,
            on_decoded=lambda _: None,
        )

    def read(self, reads: Reads) -> Reading:
        """By the giver's end of a transport."""
        reads.begin()
        job = self.job
        return Reading("t", job.pieces[: self.num_sealed], job.giver_slots, job.coding, Frames(), reads.end)

    def assert_all_here(self) -> None:
        np.testing.assert_array_equal(self.target[:, :, self.job.taker_slots], self.source[:, :, self.job.giver_slots])
        assert self.verified == list(range(len(self.job.pieces)))

    @property
    def nbytes(self) -> int:
        return sum(piece_bytes(self.target, piece) for piece in self.job.pieces)


def hello(port: int, token: bytes) -> Hello:
    return Hello(layout=LAYOUT, num_blocks=64, device="cpu", tcp=TcpEndpoint(port, token))


@dataclass
class Reads:
    """Of the giver's blocks."""

    begun: int = 0
    under_way: int = 0

    def begin(self) -> None:
        self.begun += 1
        self.under_way += 1

    def end(self) -> None:
        self.under_way -= 1

    async def over(self, times: int) -> None:
        """Returns when nothing is read, after as many reads."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.begun < times or self.under_way:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(taken: Taken) -> AsyncIterator[tuple[TcpServer, TcpEndpoint, Reads]]:
    """A server of one link, and what is read over it."""
    server, reads = TcpServer(taken.source, "127.0.0.1"), Reads()

    def start(transfer_id: str) -> Reading:
        if transfer_id != "t" or taken.num_sealed == -1:
            raise TransferError(f"transfer {transfer_id} is not under way here")
        return taken.read(reads)

    try:
        yield server, server.admit(start), reads
    finally:
        await server.close()
        assert not reads.under_way


@asynccontextmanager
async def taking(endpoint: TcpEndpoint) -> AsyncIterator[Tcp]:
    transport = Tcp(hello(endpoint.port, endpoint.token), "127.0.0.1:1")
    try:
        yield transport
    finally:
        transport.close()


async def dialogue(endpoint: TcpEndpoint, said: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    writer.write(said)
    with suppress(OSError):  # it has hung up already
        writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)
    writer.close()
    await writer.wait_closed()
    return answer


@asynccontextmanager
async def stuffed(server: TcpServer, endpoint: TcpEndpoint, taken: Taken) -> AsyncIterator[socket.socket]:
    """A taker that has asked for more than sockets hold, and reads nothing."""
    server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # connections take after it
    ask = wire.Ask(1, 0, len(taken.job.pieces), taken.nbytes)
    with socket.socket() as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        end.connect(("127.0.0.1", endpoint.port))
        end.sendall(wire.encode_greeting(endpoint.token) + wire.encode_request(ask, "t"))
        yield end


Answer = Callable[[wire.Ask, Taken], bytes]


@asynccontextmanager
async def false_giver(taken: Taken, answer: Answer, *, then_close: bool = True) -> AsyncIterator[Tcp]:
    """A taker's transport to something that answers each request with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(wire.GREETING_BYTES)
        request = wire.decode_request(await reader.readexactly(wire.REQUEST_BYTES))
        writer.write(answer(request.ask, taken))
        if then_close:
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, taking(TcpEndpoint(server.sockets[0].getsockname()[1], bytes(wire.TOKEN_BYTES))) as transport:
        yield transport


def half(ask: wire.Ask, taken: Taken) -> bytes:
    return wire.encode_grant(ask) + bytes(ask.nbytes // 2)
