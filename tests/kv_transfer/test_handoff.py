"""Giver and taker together, over a real link, in one process: what arrives, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest
from sides import STATE, Gate, assert_same, connected, layout, tokens, wanted

from core.errors import ChecksumMismatch, LayoutMismatch, TransferError
from kv_transfer import sealing
from kv_transfer.messages import REVISION
from kv_transfer.pieces import rows_of
from kv_transfer.transports import base, batches, shared_memory

pytestmark = pytest.mark.usefixtures("tcp_on_the_pools")

EACH = pytest.mark.parametrize("transport", ["shared_memory", "tcp", "torch_distributed"])


@EACH
@pytest.mark.parametrize("offer_first", [True, False])
async def test_the_kv_arrives_bit_for_bit_and_the_giver_is_free(transport: str, offer_first: bool) -> None:
    async with connected(transports=[transport]) as sides:
        theirs, ours = [5, 6, 9, 2], [60, 3, 4, 1]
        if offer_first:
            sides.offer("t", theirs, 50)
        taking = asyncio.create_task(sides.take("t", ours, 50))
        if not offer_first:
            await wanted(sides, "t")
            sides.offer("t", theirs, 50)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, theirs, ours, 0, 50)
        moved = 50 * sides.giver_pool.layout.token_bytes
        assert sides.giver.counters.committed == sides.taker.counters.committed == 1
        assert sides.taker.counters.bytes == moved
        assert sides.taker.counters.seconds > 0


@EACH
@pytest.mark.parametrize(("theirs", "ours"), [(16, 8), (8, 32), (32, 16)])
async def test_block_sizes_may_differ(transport: str, theirs: int, ours: int) -> None:
    async with connected(layout(theirs), layout(ours), transports=[transport]) as sides:
        theirs_table, ours_table = list(range(40, 40 + 128 // theirs)), list(range(20, 20 - 128 // ours, -1))
        sides.offer("t", theirs_table, 117)
        await sides.take("t", ours_table, 117)
        assert await sides.end() == ("t", "committed")
        assert_same(sides, theirs_table, ours_table, 0, 117)


@EACH
async def test_tokens_that_are_cached_here_are_neither_moved_nor_touched(transport: str) -> None:
    async with connected(transports=[transport]) as sides:
        before = tokens(sides.taker_pool, [1, 2, 3, 4], 0, 32)
        sides.offer("t", [9, 8, 7, 6], 60)
        await sides.take("t", [1, 2, 3, 4], 60, start=32)
        assert await sides.end() == ("t", "committed")
        assert_same(sides, [9, 8, 7, 6], [1, 2, 3, 4], 32, 60)
        np.testing.assert_array_equal(tokens(sides.taker_pool, [1, 2, 3, 4], 0, 32), before)
        assert sides.taker.counters.bytes == 28 * sides.giver_pool.layout.token_bytes


@EACH
async def test_a_prompt_that_is_cached_whole_commits_without_a_byte(transport: str) -> None:
    async with connected(transports=[transport]) as sides:
        sides.offer("t", [9, 8], 32)
        assert await sides.take("t", [1, 2], 32, start=32) == STATE
        assert await sides.end() == ("t", "committed")
        assert sides.taker.counters.bytes == 0


@EACH
async def test_many_transfers_share_one_link(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 4000)  # several batches to each, several messages to a batch
    monkeypatch.setattr(batches, "MESSAGE_BYTES", 2000)
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1000)
    async with connected(transports=[transport]) as sides:
        tables = {f"t{n}": [2 * n, 2 * n + 1] for n in range(32)}
        taking = [asyncio.create_task(sides.take(name, table, 30)) for name, table in tables.items()]
        for name, table in tables.items():
            sides.offer(name, table[::-1], 30)
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


async def test_workers_of_two_versions_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.giver.REVISION", REVISION + 1)
    async with connected() as sides:
        with pytest.raises(LayoutMismatch, match=f"revision {REVISION} here and {REVISION + 1} there") as refused:
            await sides.take("t", [1], 10)
        assert refused.value.field == "revision"


async def test_a_prompt_of_another_length_is_not_taken() -> None:
    async with connected() as sides:
        sides.offer("t", [1, 2], 20)
        with pytest.raises(TransferError, match="the two sides disagree about the prompt"):
            await sides.take("t", [1, 2], 21)
        assert await sides.end() == ("t", "aborted")
        assert sides.taker.counters.failed == 1


async def test_nobody_listening_is_a_transfer_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as sides:
        monkeypatch.setattr(sides, "address", "127.0.0.1:1")
        with pytest.raises(TransferError, match=r"the prefill worker at 127\.0\.0\.1:1 does not answer"):
            await sides.take("t", [1], 10)


async def test_blocks_that_cannot_hold_the_tokens_are_a_mistake_of_the_caller() -> None:
    async with connected() as sides:
        with pytest.raises(ValueError, match="do not fit 1 blocks of 16"):
            await sides.take("t", [1], 17)


@EACH
async def test_kv_that_is_not_what_was_sealed_is_never_committed(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> list[Any]:
        first, *rest = seal(*arguments)
        return [msgspec.structs.replace(first, checksum=first.checksum ^ 1), *rest]

    seal = sealing.seal
    monkeypatch.setattr(sealing, "seal", wrong)
    async with connected(transports=[transport]) as sides:
        sides.offer("t", [1, 2], 20)
        with pytest.raises(ChecksumMismatch, match=r"piece 0 of transfer t \(tokens 0 to 19, layers 0 to 2\)"):
            await sides.take("t", [3, 4], 20)
        assert await sides.end() == ("t", "aborted")
        assert (sides.taker.counters.committed, sides.taker.counters.failed) == (0, 1)


async def test_blocks_reused_under_the_copy_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["shared_memory"], lease_s=30) as sides:
        monkeypatch.setattr(shared_memory, "QUICK_PIECES", 0)
        gate = Gate(monkeypatch, base, "copy_summed")
        sides.offer("t", [1, 2], 20)
        taking = asyncio.create_task(sides.take("t", [3, 4], 20))
        await gate.reached.wait()
        rows_of(sides.giver_pool)[0, 0, 16 : 16 + 8] ^= 255  # somebody else writes to block 1
        gate.opened.set()
        with pytest.raises(ChecksumMismatch):
            await taking
        assert (await sides.end())[0] == "t"
