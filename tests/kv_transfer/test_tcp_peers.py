"""TCP against ends that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

import numpy as np
import pytest
from sides import TIMEOUT_S
from tcp_ends import Answer, Taken, dialogue, false_giver, half, serving, stuffed, taking

from core.errors import TransferError
from kv_transfer.messages import TcpEndpoint
from kv_transfer.transports import tcp_io, tcp_server
from kv_transfer.transports import tcp_wire as wire


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends within the time of a test, then, was not ended by a peer's silence."""
    monkeypatch.setattr(tcp_io, "IDLE_TIMEOUT_S", 10 * TIMEOUT_S)
    monkeypatch.setitem(tcp_io._KEEPALIVE, socket.TCP_USER_TIMEOUT, int(10_000 * TIMEOUT_S))


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
        (wire.Ask(1, 0), "u", "u is not under way"),
    ],
    ids=["another length", "too many", "beyond the last", "another transfer", "all of another transfer"],
)
async def test_what_cannot_be_had_is_refused_with_the_reason(
    ask: wire.Ask, transfer_id: str, reason: str, taken: Taken
) -> None:
    async with serving(taken) as (_, endpoint, reads):
        answer = await dialogue(endpoint, wire.encode_greeting(endpoint.token) + wire.encode_request(ask, transfer_id))
        assert wire.decode_reply(answer[: wire.REPLY_BYTES], ask).reason_bytes == len(answer) - wire.REPLY_BYTES
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
        assert wire.decode_reply(await reader.readexactly(wire.REPLY_BYTES), ask).granted == ask
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
