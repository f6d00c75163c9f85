"""Giver and taker together, over a real link, in one process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from sides import STATE, Gate, Sides, connected, layout, tokens

from core.errors import ChecksumMismatch, LayoutMismatch, LeaseExpired, TransferError
from core.links import LinkServer
from kv_transfer import giver as giver_module
from kv_transfer.messages import SERVICE, ToGiver
from kv_transfer.pieces import rows_of
from kv_transfer.taker import Taker, Withdrawn
from kv_transfer.transports import batches, pair_server, shared_memory, torch_distributed

pytestmark = pytest.mark.asyncio(loop_scope="module")  # gRPC's poller outlives a loop and would call into a closed one

BOTH = pytest.mark.parametrize("transport", ["shared_memory", "torch_distributed"])


def assert_same(sides: Sides, theirs: list[int], ours: list[int], start: int, stop: int) -> None:
    np.testing.assert_array_equal(
        tokens(sides.taker_pool, ours, start, stop), tokens(sides.giver_pool, theirs, start, stop)
    )


async def wanted(sides: Sides, transfer_id: str) -> None:
    """Returns when the giver has heard of a transfer."""
    while transfer_id not in sides.giver._live:
        await asyncio.sleep(0)


# --- it arrives ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("offer_first", [True, False])
async def test_the_kv_arrives_bit_for_bit_and_the_giver_is_free(transport: str, offer_first: bool) -> None:
    async with connected(transports=[transport]) as sides:
        theirs, ours = [5, 6, 9, 2], [60, 3, 4, 1]
        if offer_first:
            sides.giver.offer("t", theirs, 50, STATE)
        taking = asyncio.create_task(sides.take("t", ours, 50))
        if not offer_first:
            await wanted(sides, "t")
            sides.giver.offer("t", theirs, 50, STATE)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, theirs, ours, 0, 50)
        moved = 50 * sides.giver_pool.layout.token_bytes
        assert sides.giver.counters.committed == sides.taker.counters.committed == 1
        assert sides.giver.counters.bytes == sides.taker.counters.bytes == moved
        assert sides.taker.counters.seconds > 0


@BOTH
@pytest.mark.parametrize(("theirs", "ours"), [(16, 8), (8, 32), (32, 16)])
async def test_block_sizes_may_differ(transport: str, theirs: int, ours: int) -> None:
    async with connected(layout(theirs), layout(ours), transports=[transport]) as sides:
        theirs_table, ours_table = list(range(40, 40 + 128 // theirs)), list(range(20, 20 - 128 // ours, -1))
        sides.giver.offer("t", theirs_table, 117, STATE)
        await sides.take("t", ours_table, 117)
        assert await sides.end() == ("t", "committed")
        assert_same(sides, theirs_table, ours_table, 0, 117)


@BOTH
async def test_tokens_that_are_cached_here_are_neither_moved_nor_touched(transport: str) -> None:
    async with connected(transports=[transport]) as sides:
        before = tokens(sides.taker_pool, [1, 2, 3, 4], 0, 32)
        sides.giver.offer("t", [9, 8, 7, 6], 60, STATE)
        await sides.take("t", [1, 2, 3, 4], 60, start=32)
        assert await sides.end() == ("t", "committed")
        assert_same(sides, [9, 8, 7, 6], [1, 2, 3, 4], 32, 60)
        np.testing.assert_array_equal(tokens(sides.taker_pool, [1, 2, 3, 4], 0, 32), before)
        assert sides.taker.counters.bytes == 28 * sides.giver_pool.layout.token_bytes


@BOTH
async def test_a_prompt_that_is_cached_whole_commits_without_a_byte(transport: str) -> None:
    async with connected(transports=[transport]) as sides:
        sides.giver.offer("t", [9, 8], 32, STATE)
        assert await sides.take("t", [1, 2], 32, start=32) == STATE
        assert await sides.end() == ("t", "committed")
        assert sides.taker.counters.bytes == 0


@BOTH
async def test_many_transfers_share_one_link(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 2000)  # several batches to each
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1000)
    async with connected(transports=[transport]) as sides:
        tables = {f"t{n}": [2 * n, 2 * n + 1] for n in range(32)}
        taking = [asyncio.create_task(sides.take(name, table, 30)) for name, table in tables.items()]
        for name, table in tables.items():
            sides.giver.offer(name, table[::-1], 30, STATE)
        await asyncio.gather(*taking)
        assert {await sides.end() for _ in tables} == {(name, "committed") for name in tables}
        for table in tables.values():
            assert_same(sides, table[::-1], table, 0, 30)
        assert len(sides.taker._peers) == 1


# --- it is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "other"), ("dtype", "float16"), ("num_layers", 4), ("num_kv_heads", 1), ("head_size", 16)],
)
async def test_caches_that_mean_different_things_are_not_joined(field: str, value: Any) -> None:
    async with connected(layout(), layout(**{field: value})) as sides:
        with pytest.raises(LayoutMismatch) as refused:
            await sides.take("t", [1], 10)
        assert refused.value.field == field


async def test_a_prompt_of_another_length_is_not_taken() -> None:
    async with connected() as sides:
        sides.giver.offer("t", [1, 2], 20, STATE)
        with pytest.raises(TransferError, match="the two sides disagree about the prompt"):
            await sides.take("t", [1, 2], 21)
        assert await sides.end() == ("t", "aborted")
        assert sides.taker.counters.failed == 1


async def test_nobody_listening_is_a_transfer_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as sides:
        monkeypatch.setattr(sides, "address", "127.0.0.1:1")
        with pytest.raises(LeaseExpired, match="deadline"):
            await sides.take("t", [1], 10, wait_s=0.2)


async def test_blocks_that_cannot_hold_the_tokens_are_a_mistake_of_the_caller() -> None:
    async with connected() as sides:
        with pytest.raises(ValueError, match="do not fit 1 blocks of 16"):
            await sides.take("t", [1], 17)


@BOTH
async def test_kv_that_is_not_what_was_sealed_is_never_committed(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> list[Any]:
        first, *rest = seal(*arguments)
        return [msgspec.structs.replace(first, checksum=first.checksum ^ 1), *rest]

    seal = giver_module.seal
    monkeypatch.setattr(giver_module, "seal", wrong)
    async with connected(transports=[transport]) as sides:
        sides.giver.offer("t", [1, 2], 20, STATE)
        with pytest.raises(ChecksumMismatch, match=r"piece 0 of transfer t \(tokens 0 to 19, layers 0 to 2\)"):
            await sides.take("t", [3, 4], 20)
        assert await sides.end() == ("t", "aborted")
        assert (sides.taker.counters.committed, sides.taker.counters.failed) == (0, 1)


async def test_blocks_reused_under_the_copy_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["shared_memory"], lease_s=30) as sides:
        gate = Gate(monkeypatch, shared_memory, "copy")
        sides.giver.offer("t", [1, 2], 20, STATE)
        taking = asyncio.create_task(sides.take("t", [3, 4], 20))
        await gate.reached.wait()
        rows_of(sides.giver_pool)[0, 0, 16 : 16 + 8] ^= 255  # somebody else writes to block 1
        gate.opened.set()
        with pytest.raises(ChecksumMismatch):
            await taking
        assert (await sides.end())[0] == "t"


# --- it ends early ---------------------------------------------------------------------------------------------------


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
        sides.giver.offer("held", [5], 10, STATE)
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
        sides.giver.offer("t", [5], 10, STATE)
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
        sides.giver.offer("t", [5], 10, STATE)
        assert await sides.end() == ("t", "aborted")


@pytest.mark.parametrize(
    ("transport", "module", "writes"),
    [("shared_memory", shared_memory, "copy"), ("torch_distributed", torch_distributed, "unpack")],
)
async def test_a_cancel_returns_only_when_the_copy_has_stopped(
    transport: str, module: Any, writes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(transports=[transport]) as sides:
        gate = Gate(monkeypatch, module, writes)
        sides.giver.offer("t", [5], 10, STATE)
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


async def test_a_cancel_does_not_wait_for_a_giver_that_is_slow_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["torch_distributed"]) as sides:
        gate = Gate(monkeypatch, pair_server, "pack")
        before = tokens(sides.taker_pool, [1], 0, 10)
        sides.giver.offer("t", [5], 10, STATE)
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await gate.reached.wait()
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(taking, 2)
        assert sides.ends.empty(), "the giver freed blocks that its transport still reads"
        gate.opened.set()
        assert await sides.end() == ("t", "aborted")
        np.testing.assert_array_equal(tokens(sides.taker_pool, [1], 0, 10), before)
        sides.giver.offer("next", [6], 10, STATE)
        await sides.take("next", [2], 10)
        assert await sides.end() == ("next", "committed")


async def test_an_offer_nobody_takes_expires() -> None:
    async with connected(lease_s=0.05) as sides:
        sides.giver.offer("t", [5], 10, STATE)
        assert await sides.end() == ("t", "expired")
        assert sides.giver.counters.expired == 1
        with pytest.raises(LeaseExpired, match="already expired"):
            await sides.take("t", [1], 10)


async def test_a_taker_that_waits_keeps_its_lease() -> None:
    async with connected(lease_s=0.2) as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        for clock in ("one lease", "two leases", "three leases"):
            sides.giver.offer(clock, [9], 10, STATE)
            assert await sides.end() == (clock, "expired")
        sides.giver.offer("t", [5], 10, STATE)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")


async def test_an_offer_waits_longer_than_a_lease_for_a_taker_without_blocks() -> None:
    async with connected(lease_s=0.2) as sides:
        reserved, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.giver.offer("t", [5], 10, STATE)
        for clock in ("one lease", "two leases", "three leases"):
            sides.giver.offer(clock, [9], 10, STATE)
            assert await sides.end() == (clock, "expired")
        reserved.set_result(sides.taker.reservation([1], start_token=0, num_tokens=10))
        assert await expecting == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, [5], [1], 0, 10)


async def test_an_offer_does_not_outlive_a_taker_that_leaves_while_it_waits() -> None:
    async with connected() as sides:
        _, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.giver.offer("t", [5], 10, STATE)
        await sides.taker.close()
        with pytest.raises(TransferError, match="is gone"):
            await expecting
        assert await sides.end() == ("t", "failed")


async def test_a_cancelled_wait_for_blocks_ends_the_offer() -> None:
    async with connected() as sides:
        _, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.giver.offer("t", [5], 10, STATE)
        expecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await expecting
        assert await sides.end() == ("t", "aborted")


async def test_blocks_that_never_come_end_the_offer() -> None:
    async with connected() as sides:
        reserved, expecting = sides.expect("t")
        await wanted(sides, "t")
        sides.giver.offer("t", [5], 10, STATE)
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
    async with connected() as sides:
        _, expecting = sides.expect("t", wait_s=0.5)
        await wanted(sides, "t")
        sides.giver.offer("t", [5], 10, STATE)
        with pytest.raises(LeaseExpired, match="the deadline of the request has passed"):
            await expecting
        assert await sides.end() == ("t", "aborted")


async def test_a_deadline_ends_the_wait() -> None:
    async with connected() as sides:
        with pytest.raises(LeaseExpired, match="the deadline of the request has passed"):
            await sides.take("t", [1], 10, wait_s=0.2)
        assert sides.taker.counters.expired == 1


async def test_a_copy_that_makes_no_progress_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["torch_distributed"], stall_s=0.1) as sides:
        gate = Gate(monkeypatch, pair_server, "pack")
        sides.giver.offer("t", [5], 10, STATE)
        with pytest.raises(TransferError, match=r"no piece arrived for 0\.1 s"):
            await sides.take("t", [1], 10)
        gate.opened.set()
        assert await sides.end() == ("t", "aborted")


# --- transports ------------------------------------------------------------------------------------------------------


def _another_token(sides: Sides) -> None:
    probe = sides.giver._probe
    assert probe is not None
    probe.shared_pool = msgspec.structs.replace(probe.shared_pool, token=b"somebody else")


def _another_host(sides: Sides) -> None:
    probe = sides.giver._probe
    assert probe is not None
    probe.shared_pool = msgspec.structs.replace(probe.shared_pool, host="elsewhere")


def _no_such_process(sides: Sides) -> None:
    probe = sides.giver._probe
    assert probe is not None
    probe.shared_pool = msgspec.structs.replace(probe.shared_pool, pid=2**22 + 1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_another_token, "is not the giver"),
        (_another_host, "on another host"),
        (_no_such_process, "No such file"),
    ],
)
async def test_a_pool_that_cannot_be_mapped_is_taken_by_the_next_transport(
    spoil: Callable[[Sides], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected() as sides:
        spoil(sides)
        sides.giver.offer("t", [5], 10, STATE)
        with caplog.at_level(logging.WARNING, "kv_transfer"):
            await sides.take("t", [1], 10)
        assert await sides.end() == ("t", "committed")
        assert_same(sides, [5], [1], 0, 10)
        assert sides.taker.counters.fallbacks == 1
        assert reason in caplog.text


async def test_no_usable_transport_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["shared_memory"]) as sides:
        _another_host(sides)
        with pytest.raises(TransferError, match="no transport reaches the giver"):
            await sides.take("t", [1], 10)


async def test_a_pull_of_something_else_than_agreed_breaks_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch_distributed.batches

    def short(*arguments: Any) -> list[Any]:
        return [batch._replace(nbytes=batch.nbytes - 1) for batch in honest(*arguments)]

    async with connected(transports=["torch_distributed"]) as sides:
        sides.giver.offer("t", [5], 10, STATE)
        monkeypatch.setattr(torch_distributed, "batches", short)
        with pytest.raises(TransferError, match="the giver dropped the pair: no such pair, or no such batch"):
            await sides.take("t", [1], 10)
        assert await sides.end() == ("t", "aborted")


# --- links -----------------------------------------------------------------------------------------------------------


async def test_a_link_that_breaks_ends_its_transfers_and_is_opened_anew() -> None:
    async with connected() as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        await sides.server.stop()
        with pytest.raises(TransferError, match=r"is gone"):
            await taking
        sides.giver.offer("t", [5], 10, STATE)
        assert await sides.end() == ("t", "failed")

        server = LinkServer()
        server.add_service(SERVICE, ToGiver, sides.giver.on_link)
        host, port = sides.address.split(":")
        await server.start(host, int(port))
        sides.giver.offer("u", [5], 10, STATE)
        await sides.take("u", [1], 10)
        assert await sides.end() == ("u", "committed")
        await sides.taker.close()
        await server.stop()


async def test_closing_the_giver_releases_everything_and_tells_the_taker() -> None:
    async with connected() as sides:
        sides.giver.offer("held", [5], 10, STATE)
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        await sides.giver.close()
        with pytest.raises(TransferError, match="the prefill worker is stopping") as ended:
            await taking
        assert not isinstance(ended.value, Withdrawn), "the request must be served in another way"
        assert await sides.end() == ("held", "failed")


async def test_closing_the_taker_ends_what_it_takes() -> None:
    async with connected() as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        await sides.taker.close()
        with pytest.raises(TransferError):
            await taking
        sides.giver.offer("t", [5], 10, STATE)
        assert (await sides.end())[0] == "t"


async def test_the_memory_of_ended_transfers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giver_module, "MAX_REMEMBERED", 3)
    async with connected() as sides:
        for n in range(10):
            sides.giver.withdraw(f"t{n}", "gone")
        assert list(sides.giver._ended) == ["t7", "t8", "t9"]
        assert not sides.giver._live
        assert dataclasses.asdict(sides.giver.counters) == dataclasses.asdict(type(sides.giver.counters)())
