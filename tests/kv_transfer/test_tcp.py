"""TCP between pools."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import msgspec
import numpy as np
import pytest
from sides import STATE, TIMEOUT_S, Gate, Sides, connected, pool_of_noise, tokens
from tcp_ends import LAYOUT, NUM_TOKENS, OURS, THEIRS, Taken, dialogue, serving, taking

from core.errors import ChecksumMismatch, ConfigError, TransferError
from kv_transfer.messages import Hello, TcpEndpoint
from kv_transfer.pieces import rows_of
from kv_transfer.transports import tcp_io, vectors
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import Unusable
from kv_transfer.transports.tcp import Tcp
from kv_transfer.transports.tcp_server import TcpServer

# --- it arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_vector_bytes", [1, 1 << 20], ids=["in place", "packed"])
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


async def test_sends_of_the_giver_wait_for_room(taken: Taken) -> None:
    """uvloop has sockets that it polls not block: what a socket buffer does not hold then failed at once."""
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(taken.job)
        (connection,) = server._connections
        assert os.get_blocking(connection.socket.fileno())


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


# --- it cannot begin -------------------------------------------------------------------------------------------------


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
