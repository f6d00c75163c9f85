"""A server on loopback that speaks just enough HTTP and says what a script tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Script = Callable[["Exchange"], Awaitable[None]]


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}])


def delta(piece: str | None, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": finish}])


def usage(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


DONE = b"data: [DONE]\n\n"


@dataclass
class Exchange:
    """One request as the server got it, and the means to answer."""

    number: int
    path: str
    headers: dict[str, str]
    body: Any
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def stream(self, *pieces: bytes) -> None:
        """A whole streamed answer, one HTTP chunk for each piece."""
        self.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (*pieces, b""):
            self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))

    async def gone(self) -> None:
        """Until the client hangs up."""
        await self.reader.read()


async def three_words(exchange: Exchange) -> None:
    make = delta if "chat" in exchange.path else text
    exchange.stream(make("a"), make(" b"), make(" c", "length"), usage(7, 3), DONE)


@dataclass
class Server:
    """`script` answers completions; models, /tokenize and /detokenize (one token a character) are built in."""

    script: Script = three_words
    tokenizes: bool = True
    port: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                exchange = await self._read(reader, writer)
                await self._answer(exchange)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = request.split(" ")[1]
        return Exchange(len(self.exchanges), path, headers, json.loads(body or b"null"), reader, writer)

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.path == "/v1/models":
            exchange.reply(200, {"data": [{"id": "tiny"}]})
        elif exchange.path.endswith("tokenize") and not self.tokenizes:
            exchange.reply(404, {"detail": "Not Found"})
        elif exchange.path == "/tokenize":
            exchange.reply(200, {"tokens": [ord(c) for c in exchange.body["prompt"]]})
        elif exchange.path == "/detokenize":
            exchange.reply(200, {"prompt": "".join(map(chr, exchange.body["tokens"]))})
        else:
            self.exchanges.append(exchange)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await self.script(exchange)
            finally:
                self.in_flight -= 1
