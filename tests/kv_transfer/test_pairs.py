"""torch.distributed between two pools, with nothing but its own messages between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from sides import TIMEOUT_S, pool_of_noise
from tcp_ends import LAYOUT, Reads, Taken

from core.errors import TransferError
from kv_transfer.messages import ClosePair, FromGiver, Hello, OpenPair, PairKey, Pull, ToGiver
from kv_transfer.transports import batches, pairs
from kv_transfer.transports.base import Unusable
from kv_transfer.transports.pair_server import PairServer
from kv_transfer.transports.pairs import GIVER_RANK
from kv_transfer.transports.torch_distributed import TorchDistributed


@dataclass
class Ends:
    server: PairServer
    transport: TorchDistributed
    reads: Reads = field(default_factory=Reads)
    asked: list[Pull] = field(default_factory=list)


@asynccontextmanager
async def joined(taken: Taken) -> AsyncIterator[Ends]:
    """Both ends, for the transfer of `taken`; what they say arrives in the next turn of the loop."""
    loop, pool = asyncio.get_running_loop(), pool_of_noise(LAYOUT)
    theirs = Hello(layout=LAYOUT, num_blocks=64, device="cpu")

    def to_taker(message: FromGiver) -> None:
        loop.call_soon(ends.transport.on_message, message)

    def to_giver(message: ToGiver) -> None:
        loop.call_soon(hear, message)

    def hear(message: ToGiver) -> None:
        match message:
            case OpenPair():
                ends.server.open(message)
            case PairKey():
                ends.server.on_key(message)
            case ClosePair(pair_id):
                ends.server.close_pair(pair_id)
            case Pull():
                ends.asked.append(message)
                ends.server.pull(message, taken.read(ends.reads))

    ends = Ends(
        PairServer(taken.source, pool, to_taker),
        TorchDistributed(theirs, pool, "127.0.0.1:1", to_giver),
    )
    try:
        yield ends
    finally:
        ends.transport.close()
        ends.server.close()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not true():
            await asyncio.sleep(0.001)


async def test_what_is_asked_for_while_more_is_sent_comes_after_it(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch, and so a Pull, for each piece; two of them under way."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 1)
    monkeypatch.setattr(batches, "MESSAGE_BYTES", 1)
    async with joined(taken) as ends:
        await ends.transport.pull(taken.job)
        taken.assert_all_here()
        assert [ask.first for ask in ends.asked] == list(range(len(taken.job.pieces)))
        await ends.reads.over(len(taken.job.pieces))


async def test_a_pull_over_a_pair_that_failed_ends_its_reading(taken: Taken) -> None:
    async with joined(taken) as ends:
        await ends.transport.pull(taken.job.part(0, 2))
        await ends.reads.over(1)
        (pair,) = ends.server._pairs.values()
        pair.end._group = None
        with pytest.raises(TransferError):  # by a closed connection, or as the giver says
            await ends.transport.pull(taken.job.part(2))
        await ends.reads.over(1)
        assert not ends.transport._pairs
        await until(lambda: not ends.server._pairs)


async def test_a_taker_whose_pair_failed_takes_another(taken: Taken) -> None:
    async with joined(taken) as ends:
        await ends.transport.pull(taken.job.part(0, 2))
        (pair,) = ends.transport._idle
        pair.end._group = None
        with pytest.raises(TransferError, match="the pair has failed before"):
            await ends.transport.pull(taken.job.part(2))
        assert not ends.transport._pairs
        await ends.transport.pull(taken.job.part(2))
        taken.assert_all_here()
        await until(lambda: len(ends.server._pairs) == 1)


async def test_a_pull_that_comes_before_the_giver_has_joined_waits_for_it(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The taker's end may be connected first."""
    make = pairs._gloo

    def late(store: Any, rank: int, *rest: Any) -> Any:
        group = make(store, rank, *rest)
        if rank == GIVER_RANK:
            threading.Event().wait(0.1)
        return group

    monkeypatch.setattr(pairs, "_gloo", late)
    async with joined(taken) as ends:
        await ends.transport.pull(taken.job)
        taken.assert_all_here()


async def test_a_host_that_has_no_address_leaves_the_giver_to_other_transports() -> None:
    theirs = Hello(layout=LAYOUT, num_blocks=64, device="cpu")
    with pytest.raises(Unusable, match=r"nowhere\.invalid cannot be reached from here"):
        TorchDistributed(theirs, pool_of_noise(LAYOUT), "nowhere.invalid:1", lambda _: None)
