"""Links: typed two-way message streams between processes, over gRPC.

One gRPC bidirectional stream each, with MessagePack bodies. A link says when the other end is gone: a killed process
closes the socket at once, a cut network is noticed by keep-alive within KEEPALIVE_S + KEEPALIVE_TIMEOUT_S. gRPC bounds
what is in flight; `send` never blocks, its queue is bounded by what one side owes the other.

How a link ends. Either end may `close`: what it sent before still arrives, then the other end's iteration ends. On the
accepting side the handler's return closes the link, and the other end has HANDLER_GRACE_S to take what is on its way;
when the link ends first, the handler's iteration ends and it has HANDLER_GRACE_S to return before it is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import grpc
import msgspec

from core.errors import ConfigError, InternalError, SlipstreamError, Unavailable
from core.wire import decoder, encode

logger = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

KEEPALIVE_S = 2.0
KEEPALIVE_TIMEOUT_S = 2.0
HANDLER_GRACE_S = 2.0
_OPTIONS = [
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.max_receive_message_length", 256 * 2**20),
    ("grpc.max_send_message_length", 256 * 2**20),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""How gRPC reports that the other end died, was stopped or can't be reached any more."""
_LAST = b""
"""Follows the last message of a handler that has returned; no message is empty."""


class Link(Generic[In, Out]):
    """One end of a stream. `async for message in link` ends when the stream does and raises InternalError on a message
    that can't be decoded; only one task may iterate. `peer` names the other end."""

    def __init__(self, peer: str, incoming: type[In]) -> None:
        self.peer = peer
        self.closed = False
        self.error: str | None = None
        """Why the other end broke the link, when it did not just close or die."""
        self._decode = decoder(incoming).decode
        self._incoming: AsyncIterator[bytes] | None = None
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()

    def send(self, message: Out) -> None:
        """Queue a message, in order. After close it is dropped: the other end can no longer hear."""
        if not self.closed:
            self._outgoing.put_nowait(encode(message))

    def close(self) -> None:
        """Say that nothing more follows. What was queued before is still sent."""
        if not self.closed:
            self.closed = True
            self._outgoing.put_nowait(None)

    def attach(self, incoming: AsyncIterator[bytes]) -> None:
        """Read from this stream; called once by whoever makes the link."""
        self._incoming = incoming

    async def outgoing(self) -> AsyncIterator[bytes]:
        """The raw messages queued by send, until close."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def __aiter__(self) -> AsyncIterator[In]:
        try:
            async for raw in self._raw():
                yield self._decoded(raw)
        finally:
            self.close()

    async def _raw(self) -> AsyncIterator[bytes]:
        assert self._incoming is not None, "a link is attached before it is handed out"
        try:
            async for raw in self._incoming:
                yield raw
        except grpc.aio.AioRpcError as error:
            if error.code() not in _GONE:
                self.error = f"{error.code().name}: {error.details()}"
                logger.warning("link to %s broke: %s", self.peer, self.error)
        except asyncio.CancelledError:
            # gRPC raises this in the reader when the channel is closed under it; that is an end like any other.
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise

    def _decoded(self, raw: bytes) -> In:
        try:
            return self._decode(raw)
        except msgspec.DecodeError as error:
            self.error = f"malformed message: {error}"
            raise InternalError(f"malformed message from {self.peer}: {error}") from error


OnLink = Callable[[Link[In, Out]], Awaitable[None]]


class LinkServer:
    """Accepts links, one service name per kind. A handler runs for as long as its link lives; its return closes it,
    its exception breaks it: it is logged here and named in `error` at the other end."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        self._handlers: set[asyncio.Task[str | None]] = set()
        self._open: dict[str, set[asyncio.Future[None]]] = {}
        """Of each service, its links: done once they have ended."""

    def add_service(self, name: str, incoming: type[In], on_link: OnLink[In, Out]) -> None:
        """Call before start. `incoming` is the union of messages the other end may send."""

        async def serve(raw: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            self._watch(name, context)
            link: Link[In, Out] = Link(context.peer(), incoming)
            link.attach(raw)
            handler = self._run(name, link, on_link)
            try:
                async for message in link.outgoing():
                    yield message
                if failure := await asyncio.shield(handler):
                    await context.abort(grpc.StatusCode.INTERNAL, failure)
                yield _LAST
                await asyncio.sleep(HANDLER_GRACE_S)  # who has read that ends the call, and this with it
            finally:
                await _finish(handler)

        method = grpc.stream_stream_rpc_method_handler(serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(f"slipstream.{name}", {"Open": method}),)
        )

    def _watch(self, name: str, context: grpc.aio.ServicerContext) -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        links = self._open.setdefault(name, set())
        links.add(ended)
        ended.add_done_callback(links.discard)
        context.add_done_callback(lambda _: ended.set_result(None))

    def _run(self, name: str, link: Link[In, Out], on_link: OnLink[In, Out]) -> asyncio.Task[str | None]:
        """The handler as a task that returns what went wrong, for the other end to read."""

        async def handle() -> str | None:
            try:
                await on_link(link)
            except SlipstreamError as error:
                logger.error("%s link from %s broke: %s", name, link.peer, error)
                return error.message
            except Exception as error:
                logger.exception("%s link from %s broke", name, link.peer)
                return f"{type(error).__name__} in the handler of {name}; see the log of that process"
            finally:
                link.close()
            return None

        task = asyncio.create_task(handle())
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        return task

    async def start(self, host: str, port: int = 0) -> str:
        """Listen; return "host:port". Raises ConfigError if the port is taken."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: the port is in use; choose another") from error
        await self._server.start()
        return f"{host}:{bound}"

    async def farewell(self, name: str, within_s: float) -> None:
        """Returns once the links of a service, whose handlers have been told to return, have ended, and with them all
        that was sent over them before has been taken by the other end; or when the time is over."""
        if links := self._open.get(name):
            await asyncio.wait(set(links), timeout=within_s)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new links, give open ones `grace_s` to end, end the rest; returns when every handler has."""
        await self._server.stop(grace_s)
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=2 * HANDLER_GRACE_S)


async def _finish(handler: asyncio.Task[str | None]) -> None:
    """Let a handler see the end of its link; cancel it if it does not return."""
    if not handler.done():
        await asyncio.wait({handler}, timeout=HANDLER_GRACE_S)
    handler.cancel()


async def _until_last(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> AsyncIterator[bytes]:
    """What the handler at the other end sends. The call is ended here, so that the server knows that all has come: it
    knows its own status to be on its way only, and gRPC drops what is on its way from a server that stops."""
    async for raw in call:
        if raw == _LAST:
            call.cancel()
            return
        yield raw


class LinkClient:
    """Opens links to one address. Owns the channel."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)

    async def open(self, name: str, incoming: type[In], outgoing: type[Out], timeout_s: float = 5.0) -> Link[In, Out]:  # noqa: ARG002
        """`outgoing` names the union of messages the other end expects. Raises Unavailable if nobody answers within
        `timeout_s`."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"no answer from {self.address} within {timeout_s:g} s") from error
        link: Link[In, Out] = Link(self.address, incoming)
        method = self._channel.stream_stream(f"/slipstream.{name}/Open")
        link.attach(_until_last(method(link.outgoing())))
        return link

    async def close(self) -> None:
        """End every link opened here, at once: what they have queued may be lost."""
        await self._channel.close()
