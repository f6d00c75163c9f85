"""Links: typed two-way message streams between processes, over gRPC.

One gRPC bidirectional stream each, with MessagePack bodies. A link says when the other end is gone: a killed process
closes the socket at once, a cut network is noticed by keep-alive within KEEPALIVE_S + KEEPALIVE_TIMEOUT_S. gRPC bounds
what is in flight; `send` never blocks, its queue is bounded by what one side owes the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import grpc
import msgspec

from core.errors import ConfigError, Unavailable
from core.wire import decoder, encode

In = TypeVar("In")
Out = TypeVar("Out")

KEEPALIVE_S = 2.0
KEEPALIVE_TIMEOUT_S = 2.0
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


class Link(Generic[In, Out]):
    """One end of a stream. `async for message in link` ends when the stream does; `peer` names the other end."""

    def __init__(self, peer: str, incoming: AsyncIterator[bytes], decode: msgspec.msgpack.Decoder[In]) -> None:
        self.peer = peer
        self._incoming = incoming
        self._decode = decode.decode
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    def send(self, message: Out) -> None:
        """Queue a message, in order. After close it is dropped: the other end can no longer hear."""
        if not self.closed:
            self._outgoing.put_nowait(encode(message))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._outgoing.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[bytes]:
        """The raw messages queued by send, until close."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def __aiter__(self) -> AsyncIterator[In]:
        try:
            async for raw in self._incoming:
                yield self._decode(raw)
        except grpc.aio.AioRpcError:
            return  # the other end is gone; the caller sees the stream end
        finally:
            self.close()


OnLink = Callable[[Link[In, Out]], Awaitable[None]]


class LinkServer:
    """Accepts links, one service name per kind. A handler runs for as long as its link lives; its return closes it."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        self._address: str | None = None

    def add_service(self, name: str, incoming: type[In], on_link: OnLink[In, Out]) -> None:
        decode = decoder(incoming)

        async def serve(raw: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            link: Link[In, Out] = Link(context.peer(), raw, decode)
            handler = asyncio.ensure_future(on_link(link))
            handler.add_done_callback(lambda _: link.close())
            try:
                async for message in link.outgoing():
                    yield message
                await handler
            finally:
                handler.cancel()

        method = grpc.stream_stream_rpc_method_handler(serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(f"slipstream.{name}", {"Open": method}),)
        )

    async def start(self, host: str, port: int = 0) -> str:
        """Listen; return "host:port". Raises ConfigError if the port is taken."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: the port is in use; choose another") from error
        await self._server.start()
        return f"{host}:{bound}"

    async def stop(self, grace_s: float = 0.0) -> None:
        await self._server.stop(grace_s)


class LinkClient:
    """Opens links to one address. Owns the channel."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)

    async def open(self, name: str, incoming: type[In], outgoing: type[Out], timeout_s: float = 5.0) -> Link[In, Out]:  # noqa: ARG002
        """Raises Unavailable if nobody answers within `timeout_s`."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"no answer from {self.address} within {timeout_s:g} s") from error
        method = self._channel.stream_stream(f"/slipstream.{name}/Open")
        link: Link[In, Out]
        call = method(_deferred(lambda: link.outgoing()))
        link = Link(self.address, call, decoder(incoming))
        return link

    async def close(self) -> None:
        await self._channel.close()


async def _deferred(make: Callable[[], AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    async for message in make():
        yield message
