"""Frames, and those who do not speak in them."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import pytest

from core import frames, links
from core.links import LinkServer

TIMEOUT_S = 60.0
MUCH = 32 * 2**20
"""More than sockets have room for."""


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\x02\x00\x10\x00\x00",
        b"\x02\x01\x00\x00\x00x",
    ],
    ids=["http", "http2", "much before it opens", "no opening"],
)
async def test_who_does_not_speak_as_a_link_is_sent_away(said: bytes) -> None:
    server = LinkServer()
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1")).split(":"))
    writer.write(said)
    with suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), TIMEOUT_S)
    writer.close()
    await server.stop()


async def test_a_stranger_who_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "OPEN_WITHIN_S", 0.05)
    server = LinkServer()
    reader, writer = await asyncio.open_connection(*(await server.start("127.0.0.1")).split(":"))
    assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
    writer.close()
    await server.stop()


async def test_frames_are_found_however_they_are_cut_up() -> None:
    """One byte at a time, and several at once."""
    frame = frames._HEADER.pack(frames.Kind.MESSAGE, 3) + b"abc"
    alive = frames._HEADER.pack(frames.Kind.ALIVE, 0)
    for size in (1, 2, 7, 100):
        connection, stream = frames.Connection(), frame + alive + frame + frame
        for at in range(0, len(stream), size):
            connection.data_received(stream[at : at + size])
        assert [await connection.receive() for _ in range(3)] == [(frames.Kind.MESSAGE, b"abc")] * 3


async def test_a_process_whose_loop_stands_still_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although what it is sent has filled the buffers of its kernel."""
    monkeypatch.setattr(frames, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(frames, "KEEPALIVE_TIMEOUT_S", 0.5)
    made: asyncio.Future[frames.Connection] = asyncio.get_running_loop().create_future()
    server = await asyncio.get_running_loop().create_server(lambda: frames.Connection(made.set_result), "127.0.0.1")
    with socket.create_connection(server.sockets[0].getsockname()) as end:
        connection = await made
        connection.send(frames.Kind.MESSAGE, bytes(MUCH))
        await asyncio.sleep(5 * frames.KEEPALIVE_TIMEOUT_S)
        assert not connection.ended.done()
        whole = frames._HEADER.size + MUCH
        received = 0
        while received < whole:
            received += len(await asyncio.to_thread(end.recv, whole))
        connection.abort()
    server.close()
