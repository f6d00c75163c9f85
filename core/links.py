"""Links: typed two-way message streams between processes, over TCP.

One connection each (core.frames), with MessagePack bodies. A link says when the other end is gone: a killed process
closes the socket at once, a cut network is noticed by keep-alive within KEEPALIVE_S + KEEPALIVE_TIMEOUT_S, or a few
times that where the other end had not read for a while. `send` never blocks; what waits to be sent is bounded by what
one side owes the other.

How a link ends. Either end may `close`: what it sent before still arrives, then the other end's iteration ends. On the
accepting side the handler's return closes the link, and the other end has HANDLER_GRACE_S to take what is on its way;
when the link ends first, the handler's iteration ends and it has HANDLER_GRACE_S to return before it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from core.errors import ConfigError, InternalError, SlipstreamError, Unavailable, said_by_system
from core.frames import Connection, Kind
from core.wire import decoder, encode

logger = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

REVISION = 1
"""Of frames and of how links begin and end."""
TRY_S = 1.5
"""To connect, before it is tried anew: the system asks again after 1, 3 and 7 s, and a wire that was cut may be whole
for a moment only."""
OPEN_WITHIN_S = 2.0
"""For whoever connects to say what it wants."""
HANDLER_GRACE_S = 2.0


class Link(Generic[In, Out]):
    """One end of a stream. `async for message in link` ends when the stream does and raises InternalError on a message
    that can't be decoded; only one task may iterate. `peer` names the other end."""

    def __init__(self, connection: Connection, incoming: type[In]) -> None:
        self.peer = connection.peer
        self.closed = False
        self.error: str | None = None
        """Why the other end broke the link, when it did not just close or die."""
        self._decode = decoder(incoming).decode
        self._connection = connection

    def send(self, message: Out) -> None:
        """In order. After close it is dropped: the other end can no longer hear."""
        if not self.closed:
            self._connection.send(Kind.MESSAGE, encode(message))

    def close(self, failure: str | None = None) -> None:
        """Say that nothing more follows, or why. What was sent before still arrives."""
        if not self.closed:
            self.closed = True
            if failure is None:
                self._connection.send(Kind.END)
            else:
                self._connection.send(Kind.FAILURE, failure.encode())

    async def __aiter__(self) -> AsyncIterator[In]:
        try:
            while (frame := await self._connection.receive()) is not None and frame.kind is Kind.MESSAGE:
                yield self._decoded(frame.body)
            if frame is not None and frame.kind is Kind.FAILURE:
                self.error = frame.body.decode(errors="replace")
                logger.warning("link to %s broke: %s", self.peer, self.error)
            self._ended()
        finally:
            self.close()

    def _ended(self) -> None:
        """All that the other end had to say is read."""

    def _decoded(self, raw: bytes) -> In:
        try:
            return self._decode(raw)
        except msgspec.DecodeError as error:
            self.error = f"malformed message: {error}"
            self.close(self.error)
            raise InternalError(f"malformed message from {self.peer}: {error}") from error


class _OpenedLink(Link[In, Out]):
    """The end that has connected. It disconnects, too, so that the other one knows that all has been taken."""

    def _ended(self) -> None:
        self.close()
        self._connection.close()


OnLink = Callable[[Link[In, Out]], Awaitable[None]]


class LinkServer:
    """Accepts links, one service name per kind. A handler runs for as long as its link lives; its return closes it,
    its exception breaks it: it is logged here and named in `error` at the other end."""

    def __init__(self) -> None:
        self._services: dict[str, Callable[[Connection], Awaitable[None]]] = {}
        self._listening: asyncio.Server | None = None
        self._serving: dict[asyncio.Task[None], Connection] = {}
        self._open: dict[str, set[asyncio.Future[None]]] = {}
        """Of each service, its links: done once they have ended."""

    def add_service(self, name: str, incoming: type[In], on_link: OnLink[In, Out]) -> None:
        """Call before start. `incoming` is the union of messages the other end may send."""

        async def serve(connection: Connection) -> None:
            await self._serve(name, Link(connection, incoming), connection, on_link)

        self._services[name] = serve

    async def start(self, host: str, port: int = 0) -> str:
        """Listen; return "host:port". Raises ConfigError if the port is taken."""
        loop = asyncio.get_running_loop()
        try:
            self._listening = await loop.create_server(lambda: Connection(self._accept), host, port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {said_by_system(error)}; choose another port or host"
            ) from error
        return f"{host}:{self._listening.sockets[0].getsockname()[1]}"

    async def farewell(self, name: str, within_s: float) -> None:
        """Returns once the links of a service, whose handlers have been told to return, have ended, and with them all
        that was sent over them before has been taken by the other end; or when the time is over."""
        if links := self._open.get(name):
            await asyncio.wait(set(links), timeout=within_s)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new links, give open ones `grace_s` to end, end the rest; returns when every handler has."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if self._serving and grace_s:
            await asyncio.wait(set(self._serving), timeout=grace_s)
        for connection in self._serving.values():
            connection.abort()
        if self._serving:
            await asyncio.wait(set(self._serving), timeout=2 * HANDLER_GRACE_S)

    def _accept(self, connection: Connection) -> None:
        task = asyncio.create_task(self._welcome(connection))
        self._serving[task] = connection
        task.add_done_callback(self._serving.pop)

    async def _welcome(self, connection: Connection) -> None:
        try:
            serve = await self._wanted(connection)
            if serve is not None:
                await serve(connection)
        finally:
            connection.close()

    async def _wanted(self, connection: Connection) -> Callable[[Connection], Awaitable[None]] | None:
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                frame = await connection.receive()
        except TimeoutError:
            logger.info("%s has connected and said nothing", connection.peer)
            return None
        if frame is None:
            return None
        revision, _, name = frame.body.decode(errors="replace").partition(" ")
        if frame.kind is not Kind.OPEN or revision != str(REVISION):
            refusal = f"links of revision {REVISION} are spoken here; run one version of Slipstream on all nodes"
        elif name not in self._services:
            refusal = f"there is no service {name!r} here"
        else:
            return self._services[name]
        connection.send(Kind.FAILURE, refusal.encode())
        return None

    async def _serve(self, name: str, link: Link[In, Out], connection: Connection, on_link: OnLink[In, Out]) -> None:
        links = self._open.setdefault(name, set())
        links.add(connection.ended)
        connection.ended.add_done_callback(links.discard)
        handler = asyncio.create_task(_handle(name, link, on_link))
        await asyncio.wait({handler, connection.ended}, return_when=asyncio.FIRST_COMPLETED)
        # Whichever ended first, the other is given time: to return, or to take what was sent and disconnect.
        await asyncio.wait({handler, connection.ended}, timeout=HANDLER_GRACE_S)
        if not handler.done():
            handler.cancel()
            await asyncio.wait({handler}, timeout=HANDLER_GRACE_S)


async def _handle(name: str, link: Link[In, Out], on_link: OnLink[In, Out]) -> None:
    """The handler; what goes wrong in it is told to the other end."""
    try:
        await on_link(link)
    except SlipstreamError as error:
        logger.error("%s link from %s broke: %s", name, link.peer, error)
        link.close(error.message)
    except Exception as error:
        logger.exception("%s link from %s broke", name, link.peer)
        link.close(f"{type(error).__name__} in the handler of {name}; see the log of that process")
    finally:
        link.close()


def host_and_port(address: str) -> tuple[str, int]:
    """Of an address that links are opened to, as 127.0.0.1:4711 or [::1]:4711."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class LinkClient:
    """Opens links to one address. Owns their connections."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._connections: set[Connection] = set()

    async def open(self, name: str, incoming: type[In], outgoing: type[Out], timeout_s: float = 5.0) -> Link[In, Out]:  # noqa: ARG002
        """`outgoing` names the union of messages the other end expects. Raises Unavailable if nobody answers within
        `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while (connection := await self._connected()) is None:
                    pass
        except TimeoutError as error:
            raise Unavailable(f"no answer from {self.address} within {timeout_s:g} s") from error
        except OSError as error:
            raise Unavailable(f"no answer from {self.address}: {said_by_system(error)}") from error
        self._connections.add(connection)
        connection.ended.add_done_callback(lambda _: self._connections.discard(connection))
        connection.send(Kind.OPEN, f"{REVISION} {name}".encode())
        return _OpenedLink(connection, incoming)

    async def _connected(self) -> Connection | None:
        """None if nobody has answered for a while."""
        host, port = host_and_port(self.address)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TRY_S):
                _, connection = await loop.create_connection(Connection, host, port)
                return connection
        return None

    async def close(self) -> None:
        """End every link opened here, at once: what they have queued may be lost."""
        ends = [connection.ended for connection in self._connections]
        for connection in self._connections:
            connection.abort()
        if ends:
            await asyncio.wait(ends)
