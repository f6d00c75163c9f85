"""TCP between pools, and against ends that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from sides import STATE, TIMEOUT_S, Gate, Sides, connected, layout, pool_of_noise, tokens

from core.errors import ChecksumMismatch, ConfigError, TransferError
from kv_transfer.coding import Coding
from kv_transfer.frames import Frames
from kv_transfer.messages import Hello, TcpEndpoint
from kv_transfer.pieces import Extent, Rows, cut, piece_bytes, rows_of, seal, slots_of
from kv_transfer.transports import tcp_io, tcp_server, vectors
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import PullJob, Unusable
from kv_transfer.transports.reading import Reading
from kv_transfer.transports.tcp import Tcp
from kv_transfer.transports.tcp_server import TcpServer

pytestmark = pytest.mark.asyncio(loop_scope="module")  # gRPC's poller outlives a loop and would call into a closed one

NUM_TOKENS, THEIRS, OURS = 50, [5, 6, 9, 2], [60, 3, 4, 1]
LAYOUT = layout()
BOTH_WAYS = pytest.mark.parametrize("min_vector_bytes", [1, 1 << 20], ids=["in place", "packed"])


@dataclass
class Taken:
    """A job of one transfer, and what came of it."""

    source: Rows
    target: Rows
    job: PullJob = field(init=False)
    verified: list[int] = field(default_factory=list)

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

    @property
    def nbytes(self) -> int:
        return sum(piece_bytes(self.target, piece) for piece in self.job.pieces)


@pytest.fixture
def taken() -> Taken:
    return Taken(rows_of(pool_of_noise(LAYOUT, seed=1)), rows_of(pool_of_noise(LAYOUT, seed=2)))


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


@asynccontextmanager
async def serving(taken: Taken) -> AsyncIterator[tuple[TcpServer, TcpEndpoint, Reads]]:
    """A server of one link, and what is read over it."""
    server, reads = TcpServer(taken.source, "127.0.0.1"), Reads()

    def start(transfer_id: str) -> Reading:
        if transfer_id != "t":
            raise TransferError(f"transfer {transfer_id} is not under way here")
        reads.begin()
        job = taken.job
        return Reading("t", job.pieces, job.giver_slots, job.coding, Frames(), reads.end)

    try:
        yield server, server.admit(start), reads
    finally:
        await server.close()
        assert not reads.under_way


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends within the time of a test, then, was not ended by a peer's silence."""
    monkeypatch.setattr(tcp_io, "IDLE_TIMEOUT_S", 10 * TIMEOUT_S)
    monkeypatch.setitem(tcp_io._KEEPALIVE, socket.TCP_USER_TIMEOUT, int(10_000 * TIMEOUT_S))


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


# --- it arrives ------------------------------------------------------------------------------------------------------


@BOTH_WAYS
async def test_pieces_arrive_in_their_slots_and_nowhere_else(
    min_vector_bytes: int, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_io, "MIN_VECTOR_BYTES", min_vector_bytes)
    monkeypatch.setattr(tcp_io, "BATCH_BYTES", 5000)
    expected = taken.target.copy()
    expected[:, :, taken.job.taker_slots] = taken.source[:, :, taken.job.giver_slots]
    async with serving(taken) as (_, endpoint, _), taking(endpoint) as transport:
        await transport.pull(taken.job)
    np.testing.assert_array_equal(taken.target, expected)
    assert taken.verified == list(range(len(taken.job.pieces)))


async def test_more_runs_than_one_system_call_takes_arrive(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_io, "MIN_VECTOR_BYTES", 1)
    monkeypatch.setattr(vectors, "MAX_VECTORS", 3)
    async with serving(taken) as (_, endpoint, _), taking(endpoint) as transport:
        await transport.pull(taken.job)
    assert len(taken.verified) == len(taken.job.pieces)


async def test_one_connection_serves_one_job_after_another(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        for _ in range(3):
            await transport.pull(taken.job)
            assert len(server._connections) == 1


async def test_a_connection_that_was_closed_meanwhile_is_replaced(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(taken.job)
        (connection,) = server._connections
        (idle,) = transport._idle
        connection.cut()
        while server._connections or idle.fresh():
            await asyncio.sleep(0.001)
        await transport.pull(taken.job)


async def test_a_piece_that_is_not_what_was_sealed_is_seen(taken: Taken) -> None:
    first, *rest = taken.job.pieces
    taken.job.pieces[:] = [msgspec.structs.replace(first, checksum=first.checksum ^ 1), *rest]
    async with serving(taken) as (_, endpoint, _), taking(endpoint) as transport:
        with pytest.raises(ChecksumMismatch):
            await transport.pull(taken.job)
    assert not taken.verified


# --- a taker that does not keep to it --------------------------------------------------------------------------------


async def test_a_wrong_token_gets_no_byte(taken: Taken) -> None:
    async with serving(taken) as (_, endpoint, _):
        wrong = bytes([endpoint.token[0] ^ 1]) + endpoint.token[1:]
        async with taking(TcpEndpoint(endpoint.port, wrong)) as transport:
            with pytest.raises(TransferError, match=r"closed the connection|connection broke"):
                await transport.pull(taken.job)
        request = wire.encode_request(wire.Ask(1, 0, 1, 1), "t")
        assert await dialogue(endpoint, wire.encode_greeting(wrong)) == b""
        assert await dialogue(endpoint, wire.encode_greeting(endpoint.token) + request)  # the right one is answered


async def test_a_token_is_worth_nothing_after_its_link(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(taken.job)
        server.dismiss(endpoint)
        while server._connections:
            await asyncio.sleep(0.001)
        with pytest.raises(TransferError):
            await transport.pull(taken.job)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere.example\r\nAccept: */*\r\n\r\n",
        b"",
        b"SSKV",
        bytes(wire.GREETING_BYTES),
    ],
    ids=["http", "nothing", "the beginning of a greeting", "zeros"],
)
async def test_who_does_not_greet_is_dropped_without_an_answer(said: bytes, taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _):
        with suppress(ConnectionResetError):  # it had said more than was read
            assert await dialogue(endpoint, said) == b""
        while server._connections:
            await asyncio.sleep(0.001)


async def test_who_says_nothing_is_dropped_in_time(
    taken: Taken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp_server, "GREETING_S", 0.05)
    with caplog.at_level(logging.INFO, "kv_transfer"):
        async with serving(taken) as (_, endpoint, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
            assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
            writer.close()
            await writer.wait_closed()
    assert "no greeting within 0.05 s" in caplog.text


@pytest.mark.parametrize(
    ("ask", "transfer_id", "reason"),
    [
        (wire.Ask(1, 0, 1, 1), "t", "no pieces of transfer t"),
        (wire.Ask(1, 0, 1000, 2**62), "t", "no pieces of transfer t"),
        (wire.Ask(1, 1000, 1001, 1), "t", "no pieces of transfer t"),
        (wire.Ask(1, 0, 1, 1), "u", "u is not under way"),
    ],
    ids=["another length", "too many", "beyond the last", "another transfer"],
)
async def test_what_cannot_be_had_is_refused_with_the_reason(
    ask: wire.Ask, transfer_id: str, reason: str, taken: Taken
) -> None:
    async with serving(taken) as (_, endpoint, reads):
        answer = await dialogue(endpoint, wire.encode_greeting(endpoint.token) + wire.encode_request(ask, transfer_id))
        assert wire.decode_reply(answer[: wire.REPLY_BYTES], ask) == len(answer) - wire.REPLY_BYTES
        assert reason in answer[wire.REPLY_BYTES :].decode()
        assert not reads.under_way


@pytest.mark.parametrize("cut_at", [1, wire.REQUEST_BYTES - 1, wire.REQUEST_BYTES, wire.REQUEST_BYTES + 2])
async def test_a_request_that_breaks_off_reads_nothing(cut_at: int, taken: Taken) -> None:
    async with serving(taken) as (_, endpoint, _):
        request = wire.encode_request(wire.Ask(1, 0, 1, 1), "a name")
        assert await dialogue(endpoint, wire.encode_greeting(endpoint.token) + request[:cut_at]) == b""


@pytest.mark.usefixtures("patient")
async def test_who_asks_on_without_hearing_the_answers_is_dropped(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, reads), stuffed(server, endpoint, taken) as end:
        while not reads.begun:
            await asyncio.sleep(0.001)
        (connection,) = server._connections
        end.sendall(bytes(2 * tcp_server.READ_BYTES))
        while not connection._ended:
            await asyncio.sleep(0.001)
        assert len(connection._unread) <= 2 * tcp_server.READ_BYTES
        connection.cut()


async def test_a_request_that_comes_in_bits_is_answered(taken: Taken) -> None:
    ask = wire.Ask(1, 0, len(taken.job.pieces), taken.nbytes)
    async with serving(taken) as (_, endpoint, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        for byte in wire.encode_greeting(endpoint.token) + wire.encode_request(ask, "t"):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert wire.decode_reply(await reader.readexactly(wire.REPLY_BYTES), ask) == 0
        assert len(await reader.readexactly(ask.nbytes)) == taken.nbytes
        writer.close()
        await writer.wait_closed()


async def test_a_taker_that_stops_reading_loses_the_connection_and_the_blocks_are_free(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_io, "IDLE_TIMEOUT_S", 0.1)
    async with serving(taken) as (server, endpoint, reads), stuffed(server, endpoint, taken):
        async with asyncio.timeout(TIMEOUT_S):
            while not reads.begun or reads.under_way:
                await asyncio.sleep(0.001)


@pytest.mark.usefixtures("patient")
async def test_a_transfer_that_ends_is_read_no_longer(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "CUT_AFTER_S", 0.05)
    async with serving(taken) as (server, endpoint, reads), stuffed(server, endpoint, taken):
        while not any(connection.transfer_id for connection in server._connections):
            await asyncio.sleep(0.001)
        server.stop("another")
        assert reads.under_way
        server.stop("t")
        async with asyncio.timeout(TIMEOUT_S):
            while reads.under_way:
                await asyncio.sleep(0.001)


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


# --- a giver that does not keep to it --------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda ask, _: wire.encode_grant(ask._replace(nbytes=ask.nbytes + 1)), "announces"),
        (lambda ask, _: wire.encode_grant(ask._replace(nbytes=2**60)), "announces"),
        (lambda ask, _: wire.encode_grant(ask._replace(number=ask.number + 1)), "the giver answers request"),
        (lambda ask, _: b"HTTP/1.1 400 Bad Request\r\n\r\n\r\n\r\n", "does not speak this protocol"),
        (lambda ask, _: wire.encode_grant(ask)[:-1], "closed the connection"),
        (lambda ask, _: wire.encode_refusal(ask, "not today"), "the giver refuses: not today"),
        (lambda ask, _: b"", "closed the connection"),
    ],
    ids=["one byte more", "oversize", "another request", "http", "half a header", "a refusal", "nothing"],
)
async def test_an_answer_to_something_else_writes_no_byte(answer: Answer, reason: str, taken: Taken) -> None:
    before = taken.target.copy()
    async with false_giver(taken, answer) as transport:
        with pytest.raises(TransferError, match=reason):
            await transport.pull(taken.job)
    np.testing.assert_array_equal(taken.target, before)
    assert not taken.verified


async def test_a_payload_that_breaks_off_verifies_nothing_that_did_not_come(taken: Taken) -> None:
    async with false_giver(taken, half) as transport:
        with pytest.raises(TransferError):
            await transport.pull(taken.job)
    assert not taken.verified


async def test_a_giver_that_falls_silent_is_given_up(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_io, "IDLE_TIMEOUT_S", 0.1)
    # What came is no KV: it goes unnoticed only because nothing is complete.
    monkeypatch.setattr(tcp_io, "BATCH_BYTES", taken.nbytes)
    async with asyncio.timeout(TIMEOUT_S), false_giver(taken, half, then_close=False) as transport:
        with pytest.raises(TransferError, match=r"sent no byte for 0\.1 s"):
            await transport.pull(taken.job)


@pytest.mark.usefixtures("patient")
async def test_a_cancel_ends_the_wait_for_a_silent_giver_at_once(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_io, "BATCH_BYTES", taken.nbytes)
    reached, loop = asyncio.Event(), asyncio.get_running_loop()

    def heard(ask: wire.Ask, taken: Taken) -> bytes:
        loop.call_soon_threadsafe(reached.set)
        return half(ask, taken)

    async with false_giver(taken, heard, then_close=False) as transport:
        pulling = asyncio.create_task(transport.pull(taken.job))
        await reached.wait()
        pulling.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(asyncio.CancelledError):
                await pulling
        assert not transport._idle, "a connection that was cancelled is used again"
        after = taken.target.copy()
    np.testing.assert_array_equal(taken.target, after)


async def test_nobody_at_the_port_is_said(taken: Taken) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # so that nobody else gets it
        port = silent.getsockname()[1]
        async with taking(TcpEndpoint(port, bytes(wire.TOKEN_BYTES))) as transport:
            with pytest.raises(TransferError, match=f"cannot connect to 127.0.0.1, port {port}: Connection refused"):
                await transport.pull(taken.job)


async def test_a_giver_without_a_data_plane_is_no_giver_for_tcp() -> None:
    with pytest.raises(Unusable, match="does not listen"):
        Tcp(Hello(layout=LAYOUT, num_blocks=64, device="cpu"), "127.0.0.1:1")


async def test_an_address_of_somebody_else_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        TcpServer(rows_of(pool_of_noise(LAYOUT)), "192.0.2.1")


# --- in a hand-off ---------------------------------------------------------------------------------------------------


async def gated(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> tuple[Gate, asyncio.Task[Any]]:
    """A transfer whose giver is held before it sends."""
    gate = Gate(monkeypatch, tcp_io.Window, "send")
    sides.offer("t", THEIRS, NUM_TOKENS)
    pulling = asyncio.create_task(sides.take("t", OURS, NUM_TOKENS))
    await gate.reached.wait()
    return gate, pulling


async def test_blocks_are_kept_until_the_thread_that_sends_them_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["tcp"]) as sides:
        gate, pulling = await gated(sides, monkeypatch)
        sides.giver.withdraw("t", "the prompt was aborted")
        with pytest.raises(TransferError, match="the prompt was aborted"):
            await pulling
        assert sides.ends.empty(), "the giver freed blocks that a thread still reads"
        gate.opened.set()
        assert await sides.end() == ("t", "aborted")


async def test_one_link_cannot_read_the_transfers_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["tcp"]) as sides:
        gate, pulling = await gated(sides, monkeypatch)
        assert sides.giver._tcp is not None
        foreign = sides.giver._tcp.admit(lambda transfer_id: sides.giver._read(transfer_id, object()))  # type: ignore[arg-type]
        ask = wire.Ask(1, 0, 1, 1)
        answer = await dialogue(foreign, wire.encode_greeting(foreign.token) + wire.encode_request(ask, "t"))
        assert b"not under way here" in answer
        gate.opened.set()
        assert await pulling == STATE
        assert await sides.end() == ("t", "committed")


async def test_the_data_plane_goes_with_the_link() -> None:
    async with connected(transports=["tcp"]) as sides:
        sides.offer("t", THEIRS, NUM_TOKENS)
        await sides.take("t", OURS, NUM_TOKENS)
        assert await sides.end() == ("t", "committed")
        np.testing.assert_array_equal(
            tokens(sides.taker_pool, OURS, 0, NUM_TOKENS), tokens(sides.giver_pool, THEIRS, 0, NUM_TOKENS)
        )
        assert sides.giver._tcp is not None
        assert len(sides.giver._tcp._connections) == 1
        await sides.taker.close()
        async with asyncio.timeout(TIMEOUT_S):
            while sides.giver._tcp._connections or sides.giver._tcp._links:
                await asyncio.sleep(0.001)
