"""How fast a transport moves KV that is sealed already: what is left of a hand-off without its words and the giver's
sums, and what a bare loop of the transport's primitive compares to."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from bench.transfer.lender import BLOCK_SIZE, scattered
from bench.transfer.sides import Lender
from core.links import LinkClient
from engine.kv_cache import KVPool
from kv_transfer.coding import Coding
from kv_transfer.messages import (
    REVISION,
    SERVICE,
    Committed,
    Complete,
    FromGiver,
    Hello,
    Offer,
    Piece,
    Renew,
    Sealed,
    ToGiver,
    Want,
)
from kv_transfer.peers import TakerLink
from kv_transfer.pieces import Rows, Runs, copy, layers_of, rows_of, slots_of
from kv_transfer.transports.base import PullJob, Transport
from kv_transfer.transports.batches import device_identity
from kv_transfer.transports.choice import makers
from kv_transfer.transports.names import TransportName

AT_ONCE = 2
"""Pulls in flight, so that the wire does not stand still between two of them: a bare loop's does not either."""
RENEW_S = 1.0


class Unchecked(PullJob):
    """Pieces are taken as they come, to see what their checksums cost."""

    def read(self, index: int, theirs: Rows) -> None:
        self._copy(index, layers_of(theirs, self.pieces[index]), self.runs_of(index, gathered=False))

    def landed(self, index: int, part: Rows) -> None:
        self._copy(index, part, self.runs_of(index, gathered=True))

    def _copy(self, index: int, theirs: Rows, pairs: Runs) -> None:
        copy(layers_of(self.rows, self.pieces[index]), theirs, pairs, streamed=True)
        self.on_verified(index)


class Kind(NamedTuple):
    """How pieces are pulled."""

    job: type[PullJob] = PullJob
    at_once: int = AT_ONCE
    """In flight: the next is asked for when one has ended."""


KINDS = {"checksum": Kind(), "no_checksum": Kind(Unchecked)}


async def measure_wire(
    lender: Lender,
    pool: KVPool,
    name: TransportName,
    num_tokens: int,
    rounds: int,
    kinds: Mapping[str, Kind] = KINDS,
) -> dict[str, float]:
    """Seconds per pull of each kind, medians of `rounds` of each of those in flight. The same transfer is pulled again
    and again, from blocks anywhere in the lender's pool to blocks anywhere in ours."""
    took: dict[str, float] = {}
    async with _link(lender, pool) as (link, giver, heard):
        threads = ThreadPoolExecutor(2, thread_name_prefix="kv-pull")
        transport = makers(giver, lender.address, pool, link.send, threads)[name]()
        transfer_id = f"{name}-{num_tokens}-{time.monotonic_ns()}-alone"
        try:
            lender.lend(transfer_id, num_tokens)
            lender.computed_at()
            link.send(Want(transfer_id, 0))
            block_ids, pieces = await _offered(heard)
            beside = [asyncio.create_task(work) for work in (_pass_on(heard, transport), _renew(link, transfer_id))]

            async def pull(job: PullJob) -> float:
                """When it has ended."""
                await transport.pull(replace(job))
                return time.perf_counter()

            for label, kind in kinds.items():
                job = _job(kind.job, pool, transfer_id, pieces, block_ids, num_tokens)
                took[label] = await _median(partial(pull, job), kind, rounds)
            for task in beside:
                task.cancel()
            link.send(Committed(transfer_id))
        finally:
            transport.close()
            threads.shutdown()
    return took


async def _median(pull: Callable[[], Awaitable[float]], kind: Kind, rounds: int) -> float:
    """Seconds per pull, from the end of one to the end of the one in its turn. The first ones connect."""
    await asyncio.gather(*(pull() for _ in range(kind.at_once)))

    async def one_after_another() -> list[float]:
        return [await pull() for _ in range(rounds)]

    started = [time.perf_counter()] * kind.at_once
    ended = await asyncio.gather(*(one_after_another() for _ in range(kind.at_once)))
    ends = sorted(itertools.chain(started, *ended))
    took = [later - end for end, later in zip(ends, ends[kind.at_once :], strict=False)]
    return statistics.median(took) / kind.at_once


def _job(
    kind: type[PullJob], pool: KVPool, transfer_id: str, pieces: list[Piece], block_ids: list[int], num_tokens: int
) -> PullJob:
    return kind(
        transfer_id=transfer_id,
        first=0,
        pieces=pieces,
        rows=rows_of(pool),
        giver_slots=slots_of(block_ids, BLOCK_SIZE, num_tokens),
        taker_slots=slots_of(scattered(-(-num_tokens // BLOCK_SIZE), 2), BLOCK_SIZE, num_tokens),
        coding=Coding("none", pool.layout),
        on_began=lambda: None,
        on_verified=lambda _: None,
        on_decoded=lambda _: None,
    )


@asynccontextmanager
async def _link(lender: Lender, pool: KVPool) -> AsyncIterator[tuple[TakerLink, Hello, AsyncIterator[FromGiver]]]:
    """A taker's link to the lender, without the taker."""
    client = LinkClient(lender.address)
    try:
        link: TakerLink = await client.open(SERVICE, FromGiver, ToGiver)  # type: ignore[arg-type]
        device = device_identity(pool.device)
        link.send(Hello(revision=REVISION, layout=pool.layout, num_blocks=pool.num_blocks, device=device))
        heard = aiter(link)
        giver = await anext(heard)
        assert isinstance(giver, Hello), giver
        yield link, giver, heard
        link.close()
    finally:
        await client.close()


async def _offered(heard: AsyncIterator[FromGiver]) -> tuple[list[int], list[Piece]]:
    """The giver's block table and all pieces of the transfer that was asked for."""
    block_ids: list[int] = []
    pieces: list[Piece] = []
    async for message in heard:
        match message:
            case Offer():
                block_ids = message.block_ids
            case Sealed():
                pieces += message.pieces
            case Complete(last=last):
                pieces += last
                break
    return block_ids, pieces


async def _pass_on(heard: AsyncIterator[FromGiver], transport: Transport) -> None:
    async for message in heard:
        transport.on_message(message)


async def _renew(link: TakerLink, transfer_id: str) -> None:
    while True:
        link.send(Renew(transfer_id, time.monotonic()))
        await asyncio.sleep(RENEW_S)
