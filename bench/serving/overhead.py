"""What the load generator itself costs: CPU per streamed token, measured against a server that only plays a script.

    python -m bench.serving.overhead [--streams 32] [--tokens 200] [--tick-ms 10]

The server is a process of its own that writes one chunk to every stream per tick, as a decode step would.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

import click
import uvloop

from bench.serving.client import Client
from bench.serving.http import HttpClient
from bench.serving.load import offer

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"demo-model",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)
_LAST = (
    b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":%d,"total_tokens":%d}}\n\ndata: [DONE]\n\n'
)


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _serve(ready: Connection, tokens: int, tick: float) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                await reader.readexactly(length)
                writer.write(_HEAD)
                for _ in range(tokens):
                    writer.write(_http_chunk(_CHUNK))
                    await asyncio.sleep(tick)
                writer.write(_http_chunk(_LAST % (tokens, tokens + 8)) + b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _serve_process(ready: Connection, tokens: int, tick: float) -> None:
    uvloop.run(_serve(ready, tokens, tick))


async def _measure(port: int, streams: int) -> tuple[float, float, int]:
    http = HttpClient(f"http://127.0.0.1:{port}/v1/completions", {})
    try:
        requests = [http.request(b"{}", str(i)) for i in range(streams)]
        run = await offer(Client(http, 600.0, keep_text=False), requests, [0.0] * streams)
    finally:
        http.close()
    return run.cpu, run.duration, sum(t.output_tokens for t in run.timelines if t.completed)


@click.command()
@click.option("--streams", default=32, show_default=True, help="Requests at a time.")
@click.option("--tokens", default=200, show_default=True, help="Chunks of each answer.")
@click.option("--tick-ms", default=10.0, show_default=True, help="Time between two chunks of a stream.")
def main(streams: int, tokens: int, tick_ms: float) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve_process, args=(theirs, tokens, tick_ms / 1e3), daemon=True)
    server.start()
    try:
        cpu, duration, received = uvloop.run(_measure(ours.recv(), streams))
    finally:
        server.terminate()
        server.join()
    click.echo(f"{received} tokens in {duration:.2f} s: {cpu / received * 1e6:.1f} us of CPU per token")


if __name__ == "__main__":
    main()
