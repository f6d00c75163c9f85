"""Hand-offs that end early, whoever ends them: nothing leaks, and nothing touches blocks that are free."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sides import STATE, TIMEOUT_S, Gate, assert_same, connected, time_of_hand_offs, tokens, wanted

from core.errors import LeaseExpired, TransferError
from kv_transfer import giving, pieces
from kv_transfer.messages import SequenceState
from kv_transfer.taker import Taker, Withdrawn
from kv_transfer.transports import base, pair_server, shared_memory, tcp, tcp_io, torch_distributed

pytestmark = pytest.mark.usefixtures("tcp_on_the_pools", "tcp_by_threads")

SLOW_TO_SEND = pytest.mark.parametrize(
    ("transport", "module", "sends"),
    [("tcp", tcp_io.Window, "send"), ("torch_distributed", pair_server, "pack")],
)


async def test_a_withdrawn_offer_is_heard_whenever_it_is_asked_for() -> None:
    async with connected() as sides:
        early = asyncio.create_task(sides.take("early", [1], 10))
        await wanted(sides, "early")
        sides.giver.withdraw("early", "the prompt was aborted")
        with pytest.raises(Withdrawn, match="the prompt was aborted"):
            await early
        sides.giver.withdraw("late", "the prompt was aborted")
        with pytest.raises(Withdrawn, match="the prompt was aborted"):
            await sides.take("late", [1], 10)
        sides.offer("held", [5], 10)
        sides.giver.withdraw("held", "the prompt was aborted")
        assert await sides.end() == ("held", "aborted")


async def test_only_one_worker_takes_a_transfer() -> None:
    async with connected() as sides:
        first = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        other = Taker(sides.taker_pool)
        with pytest.raises(TransferError, match="another decode worker takes it"):
            await other.take("t", sides.address, [2], start_token=0, num_tokens=10, deadline=time.time() + 10)
        await other.close()
        sides.offer("t", [5], 10)
        assert await first == STATE
        assert await sides.end() == ("t", "committed")


async def test_a_cancel_before_the_offer_frees_the_blocks_once_they_are_offered() -> None:
    async with connected() as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        while "t" not in sides.giver._ended:
            await asyncio.sleep(0)
        sides.offer("t", [5], 10)
        assert await sides.end() == ("t", "aborted")


@pytest.mark.parametrize(
    ("transport", "module", "writes"),
    [
        ("shared_memory", base, "copy_summed"),
        ("tcp", tcp, "land"),
        ("torch_distributed", torch_distributed, "land"),
    ],
)
async def test_a_cancel_returns_only_when_the_copy_has_stopped(
    transport: str, module: Any, writes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "QUICK_PIECES", 0)
    async with connected(transports=[transport]) as sides:
        gate = Gate(monkeypatch, module, writes)
        sides.offer("t", [5], 10)
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await gate.reached.wait()
        taking.cancel()
        assert await sides.end() == ("t", "aborted")  # the giver need not wait for the taker's copy
        taking.cancel()  # insisting does not help
        await asyncio.sleep(0)
        assert not taking.done()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert sides.taker.counters.aborted == 1


@SLOW_TO_SEND
async def test_a_cancel_does_not_wait_for_a_giver_that_is_slow_to_send(
    transport: str, module: Any, sends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(transports=[transport]) as sides:
        gate = Gate(monkeypatch, module, sends)
        before = tokens(sides.taker_pool, [1], 0, 10)
        sides.offer("t", [5], 10)
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await gate.reached.wait()
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(taking, TIMEOUT_S / 2)  # less than the gate is closed
        assert sides.ends.empty(), "the giver freed blocks that its transport still reads"
        gate.opened.set()
        assert await sides.end() == ("t", "aborted")
        np.testing.assert_array_equal(tokens(sides.taker_pool, [1], 0, 10), before)
        sides.offer("next", [6], 10)
        await sides.take("next", [2], 10)
        assert await sides.end() == ("next", "committed")


async def test_an_offer_nobody_takes_expires() -> None:
    async with time_of_hand_offs(), connected(lease_s=0.1) as sides:
        sides.offer("t", [5], 10)
        assert await sides.end() == ("t", "expired")
        assert sides.giver.counters.expired == 1
        with pytest.raises(LeaseExpired, match="already expired"):
            await sides.take("t", [1], 10)


async def test_a_taker_that_waits_keeps_its_lease() -> None:
    async with time_of_hand_offs(), connected(lease_s=0.2) as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        for clock in ("one lease", "two leases", "three leases"):
            sides.offer(clock, [9], 10)
            assert await sides.end() == (clock, "expired")
        sides.offer("t", [5], 10)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")


async def test_an_offer_waits_longer_than_a_lease_for_a_taker_without_blocks() -> None:
    async with time_of_hand_offs(), connected(lease_s=0.2) as sides:
        reserved, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.offer("t", [5], 10)
        for clock in ("one lease", "two leases", "three leases"):
            sides.offer(clock, [9], 10)
            assert await sides.end() == (clock, "expired")
        reserved.set_result(sides.taker.reservation([1], start_token=0, num_tokens=10))
        assert await expecting == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, [5], [1], 0, 10)


async def test_an_offer_does_not_outlive_a_taker_that_leaves_while_it_waits() -> None:
    async with connected() as sides:
        _, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.offer("t", [5], 10)
        await sides.taker.close()
        with pytest.raises(TransferError, match="is gone"):
            await expecting
        assert await sides.end() == ("t", "failed")


async def test_a_cancelled_wait_for_blocks_ends_the_offer() -> None:
    async with connected() as sides:
        _, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.offer("t", [5], 10)
        expecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await expecting
        assert await sides.end() == ("t", "aborted")


async def test_blocks_that_never_come_end_the_offer() -> None:
    async with connected() as sides:
        reserved, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.offer("t", [5], 10)
        reserved.set_exception(ValueError("no blocks"))
        with pytest.raises(ValueError, match="no blocks"):
            await expecting
        assert await sides.end() == ("t", "aborted")


@pytest.mark.parametrize("finished", [True, False])
async def test_a_taker_without_blocks_hears_of_a_withdrawal_and_whether_the_request_has_finished(
    finished: bool,
) -> None:
    async with connected() as sides:
        reserved, early = sides.expect("early")
        await wanted(sides, "early")
        sides.giver.withdraw("early", "dropped", finished=finished)
        sides.giver.withdraw("late", "dropped", finished=finished)
        for ending in (early, sides.expect("late")[1]):
            with pytest.raises(Withdrawn, match="dropped") as ended:
                await ending
            assert ended.value.finished is finished
        assert not reserved.done()


async def test_a_deadline_ends_the_wait_for_blocks() -> None:
    async with time_of_hand_offs() as clock, connected() as sides:
        sides.offer("before", [6], 10)  # the link is open when the deadline begins to run
        await sides.take("before", [2], 10)
        assert await sides.end() == ("before", "committed")
        clock.held = True
        _, expecting = sides.expect("t", wait_s=0.5)
        await wanted(sides, "t")
        sides.offer("t", [5], 10)
        clock.held = False
        with pytest.raises(LeaseExpired, match="the deadline of the request has passed"):
            await expecting
        assert await sides.end() == ("t", "aborted")


async def test_a_deadline_ends_the_wait() -> None:
    async with connected() as sides:
        with pytest.raises(LeaseExpired, match="the deadline of the request has passed"):
            await sides.take("t", [1], 10, wait_s=0.2)
        assert sides.taker.counters.expired == 1


@SLOW_TO_SEND
async def test_a_copy_that_makes_no_progress_is_given_up(
    transport: str, module: Any, sends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(transports=[transport], stall_s=0.1) as sides:
        gate = Gate(monkeypatch, module, sends)
        sides.offer("t", [5], 10)
        with pytest.raises(TransferError, match=r"no piece arrived for 0\.1 s"):
            await sides.take("t", [1], 10)
        gate.opened.set()
        assert await sides.end() == ("t", "aborted")


async def test_kv_without_the_token_to_go_on_from_is_of_no_use() -> None:
    async with connected() as sides:
        sides.giver.open("t", [1], 10)
        sides.giver.complete("t", SequenceState(token_ids=[]))
        with pytest.raises(TransferError, match="without the token to go on from"):
            await sides.take("t", [2], 10)
        assert await sides.end() == ("t", "aborted")
        assert sides.taker.counters.failed == 1


async def test_a_giver_whose_leases_never_end_is_refused() -> None:
    async with connected(lease_s=math.inf) as sides:
        with pytest.raises(TransferError, match="leases of inf s"):
            await sides.take("t", [2], 10)
        assert sides.taker.counters.failed == 1


async def test_a_piece_that_no_giver_cuts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as sides:
        monkeypatch.setattr(giving, "cut", lambda _, extent: [extent])
        monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
        sides.offer("t", [1, 2], 20)
        with pytest.raises(TransferError, match="is larger than"):
            await sides.take("t", [3, 4], 20)
        assert await sides.end() == ("t", "aborted")


async def test_a_pair_that_fails_as_its_pull_is_cancelled_is_looked_after() -> None:
    loop = asyncio.get_running_loop()
    unseen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    pair: Any = SimpleNamespace(failed=loop.create_future())
    work: asyncio.Future[None] = loop.create_future()
    pulling = asyncio.create_task(torch_distributed._unless_failed(pair, work))
    await asyncio.sleep(0)
    work.set_exception(TransferError("timed out"))
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    del work, pulling
    gc.collect()
    await asyncio.sleep(0)
    loop.set_exception_handler(None)
    assert not unseen
