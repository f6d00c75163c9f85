"""Hand-offs between two processes, one of which dies or stops."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import other_process
import pytest
import pytest_asyncio
from other_process import GIVER_SEED, LAYOUT, TAKER_SEED
from sides import STATE, TIMEOUT_S, Gate, connected, pool_of_noise, time_of_hand_offs, tokens, wanted

from core.errors import LeaseExpired, TransferError
from kv_transfer import pieces
from kv_transfer.taker import Taker
from kv_transfer.transports import base, batches, tcp, tcp_io, torch_distributed

pytestmark = pytest.mark.asyncio(loop_scope="module")

EACH = pytest.mark.parametrize("transport", ["shared_memory", "tcp", "torch_distributed"])
WRITES = {
    "shared_memory": (base, "copy_summed"),
    "tcp": (tcp, "land"),
    "torch_distributed": (torch_distributed, "land"),
}
"""Where each transport writes to the taker's blocks."""

THEIRS, OURS, NUM_TOKENS = [5, 6, 9, 2], [60, 3, 4, 1], 61


@pytest.fixture(autouse=True)
def _small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", pieces.PIECE_BYTES)  # put back what the next line changes
    monkeypatch.setattr(batches, "BATCH_BYTES", batches.BATCH_BYTES)
    monkeypatch.setattr(batches, "MESSAGE_BYTES", batches.MESSAGE_BYTES)
    monkeypatch.setattr(tcp_io, "BATCH_BYTES", tcp_io.BATCH_BYTES)
    monkeypatch.setattr(tcp_io, "MIN_VECTOR_BYTES", tcp_io.MIN_VECTOR_BYTES)
    other_process.many_small_messages()


class Other:
    """A process of other_process.py."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe

    async def line(self) -> str:
        line: str = await asyncio.wait_for(asyncio.to_thread(self._pipe.recv), TIMEOUT_S)
        return line

    def offer(self, transfer_id: str) -> None:
        self._pipe.send(f"{transfer_id} {','.join(map(str, THEIRS))} {NUM_TOKENS}")

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    async def kill(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.join)


@asynccontextmanager
async def other(*arguments: object) -> AsyncIterator[Other]:
    """Forked from a process in which nothing runs, but which has imported all: that would take each of them seconds."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([other_process.__name__])
    ours, theirs = forks.Pipe()
    with ours, theirs:
        process = forks.Process(target=other_process.run, args=(theirs, *map(str, arguments)), daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the first start is that of who forks, too
            process.start()
        theirs.close()
        started = Other(process, ours)
        try:
            yield started
        finally:
            await started.kill()


@asynccontextmanager
async def taking_here(transport: str, **options: float) -> AsyncIterator[Taker]:
    pool = pool_of_noise(LAYOUT, seed=TAKER_SEED)
    taker = Taker(pool, transports=[transport], **options)
    try:
        yield taker
    finally:
        await taker.close()
        pool.close()


async def take(taker: Taker, address: str, transfer_id: str) -> None:
    taken = await taker.take(
        transfer_id, address, OURS, start_token=0, num_tokens=NUM_TOKENS, deadline=time.time() + TIMEOUT_S
    )
    assert taken == (STATE, True)
    np.testing.assert_array_equal(
        tokens(taker._pool, OURS, 0, NUM_TOKENS),
        tokens(pool_of_noise(LAYOUT, seed=GIVER_SEED), THEIRS, 0, NUM_TOKENS),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spare() -> AsyncIterator[tuple[Other, str]]:
    """A giver that no test ends, and its address."""
    async with other("giver", 10) as giver:
        yield giver, await giver.line()


async def hand_over(spare: tuple[Other, str], taker: Taker, transfer_id: str) -> None:
    giver, address = spare
    giver.offer(transfer_id)
    await take(taker, address, transfer_id)
    assert await giver.line() == f"{transfer_id} committed"


@EACH
async def test_the_kv_of_another_process_arrives_bit_for_bit(transport: str, spare: tuple[Other, str]) -> None:
    async with taking_here(transport) as taker:
        await hand_over(spare, taker, f"{transport}-alone")


@EACH
async def test_a_giver_killed_in_the_middle_fails_the_transfer_and_the_next_goes_elsewhere(
    transport: str, spare: tuple[Other, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with taking_here(transport) as taker, other("giver", 10) as doomed:
        address = await doomed.line()
        gate = Gate(monkeypatch, *WRITES[transport])
        doomed.offer("t")
        taking = asyncio.create_task(take(taker, address, "t"))
        await gate.reached.wait()
        lost = taker._peers[address].result()._reader
        assert lost is not None
        await doomed.kill()
        await asyncio.wait_for(asyncio.shield(lost), TIMEOUT_S / 2)  # noticed while the copy still hangs
        assert not taking.done()
        gate.opened.set()
        with pytest.raises(TransferError, match="is gone"):
            await asyncio.wait_for(taking, TIMEOUT_S)
        assert (taker.counters.committed, taker.counters.failed) == (0, 1)
        await hand_over(spare, taker, f"{transport}-instead")


@EACH
async def test_a_taker_killed_in_the_middle_frees_the_givers_blocks_once(transport: str) -> None:
    async with connected(LAYOUT, LAYOUT, transports=[transport]) as sides:
        arguments = ("taker", transport, sides.address, "t", ",".join(map(str, OURS)), NUM_TOKENS)
        async with other(*arguments) as doomed:
            await wanted(sides, "t")  # it may take longer to start than a lease lasts
            sides.offer("t", THEIRS, NUM_TOKENS)
            assert await doomed.line() == "pulling"
            assert sides.ends.empty()
            await doomed.kill()
            assert await sides.end() == ("t", "failed")
        sides.offer("u", THEIRS, NUM_TOKENS)
        await sides.take("u", OURS, NUM_TOKENS)
        assert await sides.end() == ("u", "committed")


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGKILL, "failed"), (signal.SIGSTOP, "expired")], ids=["dies", "falls silent"]
)
async def test_an_offer_ends_when_the_taker_that_waits_for_blocks(number: int, outcome: str) -> None:
    async with (
        time_of_hand_offs(),
        connected(LAYOUT, LAYOUT, lease_s=0.8) as sides,
        other("waiter", sides.address, "t") as doomed,
    ):
        assert await doomed.line() == "waiting"
        await wanted(sides, "t")
        sides.offer("t", THEIRS, NUM_TOKENS)
        sides.offer("clock", [1], 10)
        assert await sides.end() == ("clock", "expired")  # a lease has passed and "t" still stands
        doomed.signal(number)
        assert await sides.end() == ("t", outcome)


async def test_a_giver_that_stops_answering_costs_one_lease() -> None:
    async with time_of_hand_offs(), other("giver", 0.8) as giver, taking_here("shared_memory") as taker:
        address = await giver.line()
        giver.offer("t")
        await take(taker, address, "t")
        giver.signal(signal.SIGSTOP)
        with pytest.raises(LeaseExpired, match=r"the giver has not answered for 0\.8 s"):
            await asyncio.wait_for(take(taker, address, "u"), TIMEOUT_S)


async def test_a_giver_that_stops_in_the_middle_of_a_send_is_given_up_after_the_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        time_of_hand_offs() as clock,
        other("giver", 10) as giver,
        taking_here("torch_distributed", stall_s=0.3) as taker,
    ):
        address = await giver.line()
        clock.held = True  # until the first piece has come, which takes a pair
        gate = Gate(monkeypatch, torch_distributed, "land")
        giver.offer("t")
        taking = asyncio.create_task(take(taker, address, "t"))
        await gate.reached.wait()
        giver.signal(signal.SIGSTOP)
        gate.opened.set()
        clock.held = False
        with pytest.raises(TransferError, match=r"no piece arrived for 0\.3 s"):
            await asyncio.wait_for(taking, TIMEOUT_S)
        giver.signal(signal.SIGCONT)
        assert await giver.line() == "t aborted"
