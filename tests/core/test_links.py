"""Links between processes: what is sent arrives in order, and every end is noticed."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import pytest_asyncio
from msgspec import Struct

from core import frames, links
from core.errors import ConfigError, InternalError, Unavailable
from core.links import Link, LinkClient, LinkServer

TIMEOUT_S = 60.0


class Ping(Struct, frozen=True, tag=True):
    number: int


class Pong(Struct, frozen=True, tag=True):
    number: int


class Note(Struct, frozen=True, tag=True):
    text: str


ServerLink = Link[Ping, Pong]
ClientLink = Link[Pong, Ping]


async def echo(link: ServerLink) -> None:
    async for message in link:
        link.send(Pong(message.number))


@asynccontextmanager
async def connected(handler: Callable[[ServerLink], Awaitable[None]]) -> AsyncIterator[tuple[ClientLink, LinkClient]]:
    server = LinkServer()
    server.add_service("Echo", Ping, handler)
    client = LinkClient(await server.start("127.0.0.1"))
    try:
        yield await client.open("Echo", Pong, Ping), client
    finally:
        await client.close()
        await server.stop()


async def received(link: Link[Any, Any]) -> list[Any]:
    return [message async for message in link]


@pytest_asyncio.fixture(autouse=True)
async def no_task_is_left_behind() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    before = asyncio.all_tasks()
    yield
    leftover = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    if leftover:
        _, leftover = await asyncio.wait(leftover, timeout=TIMEOUT_S)
    assert not leftover
    assert not complaints


async def test_messages_arrive_in_order_both_ways() -> None:
    async with connected(echo) as (link, _):
        for number in range(1000):
            link.send(Ping(number))
        link.close()
        assert await received(link) == [Pong(number) for number in range(1000)]


async def test_what_was_sent_before_close_still_arrives() -> None:
    seen: asyncio.Future[list[Ping]] = asyncio.get_running_loop().create_future()

    async def collect(link: ServerLink) -> None:
        seen.set_result(await received(link))

    async with connected(collect) as (link, _):
        link.send(Ping(1))
        link.send(Ping(2))
        link.close()
        link.send(Ping(3))  # dropped
        assert await asyncio.wait_for(seen, TIMEOUT_S) == [Ping(1), Ping(2)]


async def test_a_handler_that_returns_closes_the_link() -> None:
    async def greet(link: ServerLink) -> None:
        link.send(Pong(7))

    async with connected(greet) as (link, _):
        assert await asyncio.wait_for(received(link), TIMEOUT_S) == [Pong(7)]
        assert link.closed
        assert link.error is None


async def test_two_links_to_one_address_end_apart() -> None:
    async with connected(echo) as (first, client):
        second: ClientLink = await client.open("Echo", Pong, Ping)
        first.close()
        assert await received(first) == []
        second.send(Ping(5))
        second.close()
        assert await received(second) == [Pong(5)]


async def test_a_handler_that_raises_is_logged_and_named_at_the_other_end(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(link: ServerLink) -> None:
        raise ZeroDivisionError("boom")

    async with connected(fail) as (link, _):
        with caplog.at_level(logging.WARNING, "core.links"):
            assert await asyncio.wait_for(received(link), TIMEOUT_S) == []
        assert link.error is not None
        assert "ZeroDivisionError in the handler of Echo" in link.error
    assert any(record.exc_info and "boom" in str(record.exc_info[1]) for record in caplog.records)


async def test_a_message_the_server_cannot_decode_breaks_the_link() -> None:
    raised: asyncio.Future[InternalError] = asyncio.get_running_loop().create_future()

    async def expect(link: ServerLink) -> None:
        try:
            await received(link)
        except InternalError as error:
            raised.set_result(error)
            raise

    async with connected(expect) as (link, _):
        link.send(Pong(1))  # type: ignore[arg-type]
        assert await asyncio.wait_for(received(link), TIMEOUT_S) == []
        assert link.error is not None
        assert "malformed message" in link.error
        assert "Invalid value 'Pong'" in str(await raised)


async def test_a_message_the_client_cannot_decode_raises_in_its_iteration() -> None:
    async def babble(link: ServerLink) -> None:
        link.send(Ping(1))  # type: ignore[arg-type]
        await received(link)

    async with connected(babble) as (link, _):
        with pytest.raises(InternalError, match="malformed message from 127"):
            await asyncio.wait_for(received(link), TIMEOUT_S)
        assert link.closed


async def test_closing_the_client_ends_iteration_on_both_sides() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def wait_for_end(link: ServerLink) -> None:
        started.set()
        await received(link)
        ended.set()

    async with connected(wait_for_end) as (link, client):
        reader = asyncio.create_task(received(link))
        await asyncio.wait_for(started.wait(), TIMEOUT_S)
        await client.close()
        assert await asyncio.wait_for(reader, TIMEOUT_S) == []
        await asyncio.wait_for(ended.wait(), TIMEOUT_S)


async def test_stopping_the_server_ends_the_link_at_the_client() -> None:
    server = LinkServer()
    server.add_service("Echo", Ping, echo)
    client = LinkClient(await server.start("127.0.0.1"))
    link: ClientLink = await client.open("Echo", Pong, Ping)
    link.send(Ping(1))
    messages = aiter(link)
    assert await anext(messages) == Pong(1)
    await server.stop()
    assert await asyncio.wait_for(anext(messages, None), TIMEOUT_S) is None
    await client.close()


@pytest.mark.parametrize("reads", [True, False])
async def test_a_farewell_waits_for_what_was_sent_and_not_for_who_does_not_read(reads: bool) -> None:
    leave, notes = asyncio.Event(), [Note(str(number) * 100_000) for number in range(40)]  # more than is in flight

    async def tell(link: Link[Ping, Note]) -> None:
        for note in notes:
            link.send(note)
        await leave.wait()

    server = LinkServer()
    server.add_service("Echo", Ping, tell)
    client = LinkClient(await server.start("127.0.0.1"))
    link: Link[Note, Ping] = await client.open("Echo", Note, Ping)
    messages = aiter(link)
    first = await anext(messages)

    async def rest() -> list[Note]:
        return [message async for message in messages]

    reading = asyncio.create_task(rest()) if reads else None
    leave.set()
    await asyncio.wait_for(server.farewell("Echo", TIMEOUT_S if reads else 0.05), TIMEOUT_S)
    await server.stop()
    if reading is not None:
        assert [first, *await reading] == notes
    await client.close()


async def test_a_farewell_lasts_until_the_last_message_has_been_taken() -> None:
    async def tell(link: Link[Ping, Note]) -> None:
        link.send(Note("first"))
        link.send(Note("last"))

    server = LinkServer()
    server.add_service("Echo", Ping, tell)
    client = LinkClient(await server.start("127.0.0.1"))
    link: Link[Note, Ping] = await client.open("Echo", Note, Ping)
    messages = aiter(link)
    assert await anext(messages) == Note("first")
    farewell = asyncio.create_task(server.farewell("Echo", TIMEOUT_S))
    await asyncio.wait({farewell}, timeout=0.2)
    assert not farewell.done(), "the last one is on its way, and a server that stops now may drop it"
    assert [message async for message in messages] == [Note("last")]
    await asyncio.wait_for(farewell, 1.0)
    await server.stop()
    await client.close()


async def test_a_handler_that_ignores_the_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.links.HANDLER_GRACE_S", 0.05)
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def ignore(link: ServerLink) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with connected(ignore) as (link, client):
        link.send(Ping(1))
        await asyncio.wait_for(started.wait(), TIMEOUT_S)
        await client.close()
        await asyncio.wait_for(cancelled.wait(), TIMEOUT_S)


async def test_cancelling_the_reader_cancels_it() -> None:
    async with connected(echo) as (link, _):
        link.send(Ping(1))
        reader = asyncio.create_task(received(link))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader


PEER = """
import asyncio, sys
from msgspec import Struct
from core.links import LinkClient, LinkServer

class Ping(Struct, frozen=True, tag=True):
    number: int

class Pong(Struct, frozen=True, tag=True):
    number: int

async def echo(link):
    async for message in link:
        link.send(Pong(message.number))

async def serve():
    server = LinkServer()
    server.add_service("Echo", Ping, echo)
    print(await server.start("127.0.0.1"), flush=True)
    await asyncio.Event().wait()

async def connect(address):
    link = await LinkClient(address).open("Echo", Pong, Ping)
    link.send(Ping(1))
    async for message in link:
        print("up", flush=True)

asyncio.run(connect(sys.argv[1]) if len(sys.argv) > 1 else serve())
"""


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PEER, *arguments, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)).decode().strip()


@pytest.fixture
def no_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noticed all the same was told by the socket, at once."""
    monkeypatch.setattr(frames, "KEEPALIVE_S", 10 * TIMEOUT_S)


@pytest.mark.usefixtures("no_keepalive")
async def test_a_killed_server_process_is_noticed_at_once() -> None:
    process = await spawn()
    client = LinkClient(await first_line(process))
    link: ClientLink = await client.open("Echo", Pong, Ping)
    link.send(Ping(1))
    messages = aiter(link)
    assert await anext(messages) == Pong(1)
    process.send_signal(signal.SIGKILL)
    assert await asyncio.wait_for(anext(messages, None), TIMEOUT_S) is None
    assert link.error is None
    await process.wait()
    await client.close()


@pytest.mark.usefixtures("no_keepalive")
async def test_a_killed_client_process_is_noticed_at_once() -> None:
    ended = asyncio.Event()

    async def echo_until_end(link: ServerLink) -> None:
        await echo(link)
        ended.set()

    server = LinkServer()
    server.add_service("Echo", Ping, echo_until_end)
    process = await spawn(await server.start("127.0.0.1"))
    assert await first_line(process) == "up"
    process.send_signal(signal.SIGKILL)
    await asyncio.wait_for(ended.wait(), TIMEOUT_S)
    await process.wait()
    await server.stop()


async def test_nobody_listening_is_unavailable() -> None:
    client = LinkClient("127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"no answer from 127\.0\.0\.1:1: Connection refused"):
        await client.open("Echo", Pong, Ping)
    await client.close()


async def test_a_host_that_does_not_answer_is_unavailable_when_the_time_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # who comes now waits for a place
            client = LinkClient(f"127.0.0.1:{port}")
            with pytest.raises(Unavailable, match=rf"no answer from 127\.0\.0\.1:{port} within 0\.2 s"):
                await client.open("Echo", Pong, Ping, timeout_s=0.2)
            await client.close()


async def test_a_service_that_is_not_there_is_named() -> None:
    async with connected(echo) as (_, client):
        link: ClientLink = await client.open("Other", Pong, Ping)
        assert await asyncio.wait_for(received(link), TIMEOUT_S) == []
        assert link.error == "there is no service 'Other' here"


async def test_another_revision_of_links_is_told_to_run_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(echo) as (_, client):
        with monkeypatch.context() as theirs:
            theirs.setattr(links, "REVISION", links.REVISION + 1)
            link: ClientLink = await client.open("Echo", Pong, Ping)
        assert await asyncio.wait_for(received(link), TIMEOUT_S) == []
        assert link.error is not None
        assert f"links of revision {links.REVISION}" in link.error


async def test_what_comes_as_no_frame_breaks_the_link_at_the_client() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x02\x02\x00\x00\x00")
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()

    stranger = await asyncio.start_server(babble, "127.0.0.1", 0)
    client = LinkClient(f"127.0.0.1:{stranger.sockets[0].getsockname()[1]}")
    link: ClientLink = await client.open("Echo", Pong, Ping)
    with pytest.raises(InternalError, match="malformed message"):  # two bytes of the second are the body of the first
        await asyncio.wait_for(received(link), TIMEOUT_S)
    other: ClientLink = await client.open("Echo", Pong, Ping)
    await client.close()
    assert await asyncio.wait_for(received(other), TIMEOUT_S) == []
    stranger.close()


async def test_who_does_not_read_holds_the_other_end_up_and_gets_all_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "MAX_UNREAD_BYTES", 100_000)
    notes = [Note(str(number % 10) * 100_000) for number in range(200)]
    told = asyncio.Event()

    async def tell(link: Link[Ping, Note]) -> None:
        for note in notes:
            link.send(note)
        told.set()

    server = LinkServer()
    server.add_service("Echo", Ping, tell)
    client = LinkClient(await server.start("127.0.0.1"))
    link: Link[Note, Ping] = await client.open("Echo", Note, Ping)
    await asyncio.wait_for(told.wait(), TIMEOUT_S)
    await asyncio.sleep(0.2)
    assert link._connection._unread_bytes < 1_000_000, "what is not read stays at the other end"
    assert await asyncio.wait_for(received(link), TIMEOUT_S) == notes
    await client.close()
    await server.stop()


async def test_a_taken_port_is_refused_with_its_number() -> None:
    async def nothing(link: ServerLink) -> None:
        return None

    server, other = LinkServer(), LinkServer()
    server.add_service("Echo", Ping, nothing)
    address = await server.start("127.0.0.1")
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
        await other.start("127.0.0.1", port)
    await other.stop()
    await server.stop()
