"""What a message between two processes costs: links (core.links) beside streams of gRPC with the same bodies.

    python -m bench.links [--rounds 2000] [--runs 3] [--json]

An end in a process of its own answers each message of 300 bytes. One message is under way at a time, and after every
fourth round there is a rest of 2 ms. Both loops are uvloop's, as those of workers are. The two kinds take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

import grpc
import uvloop
from msgspec import Struct, msgpack

from core.links import Link, LinkClient, LinkServer

BODY = b"x" * 300
WARM_UP = 100
REST_EVERY, REST_S = 4, 0.002
METHOD = "/slipstream.Bench/Open"


class Message(Struct, frozen=True, tag=True):
    body: bytes


Exchange = Callable[[], Awaitable[None]]
_decoder = msgpack.Decoder(Message)


async def _answer_link(link: Link[Message, Message]) -> None:
    async for message in link:
        link.send(message)


async def _serve_links() -> tuple[str, Callable[[], Awaitable[None]]]:
    server = LinkServer()
    server.add_service("Bench", Message, _answer_link)
    return await server.start("127.0.0.1"), server.stop


@asynccontextmanager
async def _over_link(address: str) -> AsyncIterator[Exchange]:
    client = LinkClient(address)
    link: Link[Message, Message] = await client.open("Bench", Message, Message)
    messages = aiter(link)

    async def exchange() -> None:
        link.send(Message(BODY))
        await anext(messages)

    yield exchange
    await client.close()


async def _serve_grpc() -> tuple[str, Callable[[], Awaitable[None]]]:
    server = grpc.aio.server()

    async def answer(raw: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for message in raw:
            yield msgpack.encode(_decoder.decode(message))

    handler = grpc.method_handlers_generic_handler(
        METHOD.split("/")[1], {METHOD.split("/")[2]: grpc.stream_stream_rpc_method_handler(answer)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def stop() -> None:
        await server.stop(None)

    return f"127.0.0.1:{port}", stop


@asynccontextmanager
async def _over_grpc(address: str) -> AsyncIterator[Exchange]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(METHOD)()

        async def exchange() -> None:
            await call.write(msgpack.encode(Message(BODY)))
            _decoder.decode(await call.read())

        yield exchange
        call.cancel()


KINDS = {"link": (_serve_links, _over_link), "grpc": (_serve_grpc, _over_grpc)}


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def serve(kind: str, pipe: Connection) -> None:
    """The other end: says its address, then at every word how much processor time it has used, until the pipe ends."""

    async def run() -> None:
        address, stop = await KINDS[kind][0]()
        pipe.send(address)
        while await asyncio.to_thread(_hear, pipe):
            pipe.send(_cpu_s())
        await stop()

    uvloop.run(run())


def _hear(pipe: Connection) -> bool:
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def measure(kind: str, rounds: int) -> dict[str, float]:
    """Microseconds: of a round, median and 99th percentile, and of processor time per round at either end."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = uvloop.run(_measure(kind, pipe.recv(), pipe, rounds))
        return found
    finally:
        pipe.close()
        process.join()


async def _measure(kind: str, address: str, pipe: Connection, rounds: int) -> dict[str, float]:
    def cpu_s() -> tuple[float, float]:
        pipe.send(True)
        return _cpu_s(), pipe.recv()

    async with KINDS[kind][1](address) as exchange:
        for _ in range(WARM_UP):
            await exchange()
        before, took = cpu_s(), []
        for number in range(rounds):
            started = time.perf_counter()
            await exchange()
            took.append(time.perf_counter() - started)
            if number % REST_EVERY == 0:
                await asyncio.sleep(REST_S)
        after = cpu_s()
    per_round = [1e6 * (late - early) / rounds for early, late in zip(before, after, strict=True)]
    return {
        "round_us": 1e6 * statistics.median(took),
        "p99_us": 1e6 * statistics.quantiles(took, n=100)[98],
        "cpu_asking_us": per_round[0],
        "cpu_answering_us": per_round[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rounds < 2 or options.runs < 1:
        parser.error("--rounds must be 2 at least, and --runs 1")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    runs = [{kind: measure(kind, options.rounds) for kind in KINDS} for _ in range(options.runs)]
    found = {
        kind: {name: statistics.median(run[kind][name] for run in runs) for name in runs[0][kind]} for kind in KINDS
    }
    if options.json:
        print(json.dumps(found | {"runs": runs}, indent=2))
        return
    for kind, figures in found.items():
        print(kind, ", ".join(f"{name} {value:.0f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
