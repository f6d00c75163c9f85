"""Links over a network that is cut, slow or lossy."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from msgspec import Struct

from bench.hosts import relay
from bench.hosts.namespaces import Host
from core import frames, links
from core.links import Link, LinkClient, LinkServer

pytestmark = pytest.mark.skipif(bool(relay.missing()), reason=f"two hosts on one machine: {relay.missing()}")

TIMEOUT_S = 60.0


class Ping(Struct, frozen=True, tag=True):
    number: int


class Hosts(NamedTuple):
    wire: relay.Wire
    client: LinkClient
    other: Host
    """Of the client."""
    ended: asyncio.Event
    """At the server a link has."""

    async def open(self) -> Link[Ping, Ping]:
        with self.other.entered():
            return await self.client.open("Echo", Ping, Ping, timeout_s=TIMEOUT_S)


@asynccontextmanager
async def hosts() -> AsyncIterator[Hosts]:
    """One serves links that say everything back, to a client on the other."""
    ended = asyncio.Event()

    async def echo(link: Link[Ping, Ping]) -> None:
        async for message in link:
            link.send(message)
        ended.set()

    with relay.two_hosts(seed=3) as (one, other, wire):
        server = LinkServer()
        server.add_service("Echo", Ping, echo)
        with one.entered():
            client = LinkClient(await server.start(one.address))
        yield Hosts(wire, client, other, ended)
        await client.close()
        await server.stop()


@pytest.mark.parametrize("talks", [False, True])
async def test_a_network_that_is_cut_ends_the_link_at_both_ends(talks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "KEEPALIVE_S", 0.5)
    monkeypatch.setattr(frames, "KEEPALIVE_TIMEOUT_S", 0.5)
    async with hosts() as found:
        link = await found.open()
        link.send(Ping(1))
        messages = aiter(link)
        assert await asyncio.wait_for(anext(messages), TIMEOUT_S) == Ping(1)
        await asyncio.sleep(frames.KEEPALIVE_S)
        found.wire.condition = relay.Condition(cut=True)
        began = time.monotonic()
        if talks:
            link.send(Ping(2))
        assert await asyncio.wait_for(anext(messages, None), TIMEOUT_S) is None
        await asyncio.wait_for(found.ended.wait(), TIMEOUT_S)
        assert time.monotonic() - began < frames.KEEPALIVE_S + frames.KEEPALIVE_TIMEOUT_S + 2.0


async def test_a_network_that_is_cut_is_noticed_while_the_other_end_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "KEEPALIVE_S", 0.2)
    monkeypatch.setattr(frames, "KEEPALIVE_TIMEOUT_S", 0.5)
    with relay.two_hosts(seed=3) as (one, other, wire):
        made: asyncio.Future[frames.Connection] = asyncio.get_running_loop().create_future()
        with one.entered():
            listening = socket.create_server((one.address, 0))
        server = await asyncio.get_running_loop().create_server(
            lambda: frames.Connection(made.set_result), sock=listening
        )
        with other.entered(), socket.create_connection(listening.getsockname()[:2]):
            connection = await made
            connection.send(frames.Kind.MESSAGE, bytes(32 * 2**20))  # more than sockets have room for
            await asyncio.sleep(4 * frames.KEEPALIVE_TIMEOUT_S)
            assert not connection.ended.done()
            wire.condition = relay.Condition(cut=True)
            await asyncio.wait_for(connection.ended, TIMEOUT_S)
        server.close()


async def test_a_link_is_opened_soon_after_the_network_is_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system alone would ask after 1, 3 and 7 s."""
    monkeypatch.setattr(links, "TRY_S", 0.3)
    async with hosts() as found:
        found.wire.condition = relay.Condition(cut=True)
        opening = asyncio.create_task(found.open())
        await asyncio.sleep(1.2)
        found.wire.condition = relay.Condition()
        link = await asyncio.wait_for(opening, 1.2)
        link.close()
        assert [message async for message in link] == []


async def test_a_link_outlives_a_network_that_is_bad_for_a_while() -> None:
    async with hosts() as found:
        link = await found.open()
        found.wire.condition = relay.Condition(delay_s=0.1, loss=0.05)
        messages = aiter(link)
        for number in range(20):
            link.send(Ping(number))
            assert await asyncio.wait_for(anext(messages), TIMEOUT_S) == Ping(number)
        found.wire.condition = relay.Condition(cut=True)
        await asyncio.sleep(0.5)
        found.wire.condition = relay.Condition()
        link.send(Ping(20))
        assert await asyncio.wait_for(anext(messages), TIMEOUT_S) == Ping(20)
