"""A minimal HTTP/1.1 client for many concurrent streamed answers.

A load generator that shares its cores with the server must not spend them. Bytes go from the socket straight through
httptools into the sink's `feed`, with no task switch per chunk; the one await of a request is for its end.
`python -m bench.serving.overhead` measures the cost per token.
"""

from __future__ import annotations

import asyncio
import ssl
from time import perf_counter
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from core.errors import ConfigError


class RequestFailed(Exception):
    """The exchange broke below HTTP; the message is the reason."""


class Sink(Protocol):
    """Receives one response. Must not raise: it is called from within the parser."""

    def feed(self, data: bytes, now: float) -> None:
        """A piece of the body; `now` is when its bytes left the socket."""
        ...


class _Connection(asyncio.Protocol):
    """One exchange at a time. The callbacks named on_* are httptools'."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[int] | None = None
        self._now = 0.0
        self._in_body = False
        self._until_close = True
        self.heard = False
        """Whether any byte of an answer to the present request has come."""

    async def exchange(self, request: bytes, sink: Sink) -> int:
        """Send, feed the sink, return the status. Raises RequestFailed; the connection is closed after any failure."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._sink = sink
        self._parser = httptools.HttpResponseParser(self)
        self._in_body, self._until_close, self.heard = False, True, False
        self._transport.write(request)
        try:
            return await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._done = None

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        self.heard = True
        if self._done is None:  # a server that speaks out of turn
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is None or self._done.done():
            return
        if exc is None and self._in_body and self._until_close:
            self.on_message_complete()
        else:
            self._fail(f"the server closed the connection{f' ({exc})' if exc else ''}")

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_close = False

    def on_headers_complete(self) -> None:
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._sink.feed(body, self._now)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            return
        if self._until_close or not self._parser.should_keep_alive():
            self.closed = True
            assert self._transport is not None
            self._transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(status)

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RequestFailed(reason))


class HttpClient:
    """Posts to one URL, keeping connections alive. No proxies, redirects or compression."""

    def __init__(self, url: str, headers: dict[str, str], *, insecure: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url: {url!r} is not an http:// or https:// URL")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = _ssl_context(insecure) if parts.scheme == "https" else None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fixed = {"Host": parts.netloc.rpartition("@")[2], "Accept": "text/event-stream"} | headers
        self._head = f"POST {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fixed.items())
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    def request(self, body: bytes, request_id: str) -> bytes:
        """The bytes of a request: made before the clock starts."""
        head = (
            f"{self._head}X-Request-Id: {request_id}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1", "replace") + body

    async def send(self, request: bytes, sink: Sink) -> int:
        """Exchange one request; the body of the answer goes to the sink. Raises RequestFailed or OSError."""
        while (connection := self._take_idle()) is not None:
            try:
                return await self._exchange(connection, request, sink)
            except RequestFailed:
                # A server may close an idle connection as we reuse it. Unheard, the request is sent again.
                if connection.heard:
                    raise
        return await self._exchange(await self.connect(), request, sink)

    async def connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.host, self.port, ssl=self._ssl)
        self._open.add(connection)
        return connection

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._idle.clear()

    async def _exchange(self, connection: _Connection, request: bytes, sink: Sink) -> int:
        try:
            return await connection.exchange(request, sink)
        finally:
            if connection.closed:
                self._open.discard(connection)
            else:
                self._idle.append(connection)

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
            self._open.discard(connection)
        return None


def _ssl_context(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
