"""What the decode role does with its blocks when a transfer ends, however it ends."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from core.draft_state import DraftState, PackedTensor
from core.errors import ChecksumMismatch
from core.types import Request, SamplingParams
from core.wire import Receive
from decode_workers.worker import DecodeWorker
from engine.engine import Engine
from engine.sequence import Sequence
from kv_transfer.messages import SequenceState
from kv_transfer.taker import Taken, Taker, Withdrawn

DRAFT_STATES = {"hybrid": DraftState("", {"index": PackedTensor("int64", (1,), bytes(8))})}
STATE = SequenceState(token_ids=[7], draft_states=DRAFT_STATES)


class Recorder:
    """Takes an engine's commands down."""

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.commands.append((name, *arguments, *named.items()))


class Outcomes:
    """A taker whose transfers end as told."""

    def __init__(self) -> None:
        self.ending: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        self.expected: list[str] = []
        self.reserved: asyncio.Future[Any] | None = None
        self.deadline = 0.0

    async def expect(
        self, transfer_id: str, _: str, reserved: asyncio.Future[Any], *, deadline: float, trace: str
    ) -> Taken:
        self.expected.append(transfer_id)
        self.deadline = deadline
        self.reserved = reserved
        return await self.ending

    def reservation(self, block_ids: list[int], *, start_token: int, num_tokens: int) -> tuple[Any, ...]:
        return (block_ids, start_token, num_tokens)


class Harness:
    def __init__(self) -> None:
        self.engine, self.taker = Recorder(), Outcomes()
        self.failed: list[tuple[str, str]] = []
        self.settled: list[str] = []
        self.worker = DecodeWorker(
            cast("Engine", self.engine),
            cast("Taker", self.taker),
            lambda *failure: self.failed.append(failure),
            self.settled.append,
        )
        request = Request(
            request_id="r", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=4), deadline=0.0
        )
        self.sequence = Sequence(request)
        self.worker.receive(Receive(request, transfer_id="t", prefill_address="p:1", within_s=60.0))
        ((command, self.reserved),) = self.engine.commands
        assert command == "reserve"
        self.engine.commands.clear()

    def grant(self) -> None:
        self.worker.granted(self.sequence)

    async def settle(self) -> list[tuple[Any, ...]]:
        await self.worker.close()
        await asyncio.sleep(0)
        return self.engine.commands


@pytest.mark.parametrize("exact", [True, False])
async def test_kv_that_has_arrived_joins_the_batch_as_what_it_is(exact: bool) -> None:
    h = Harness()
    h.grant()
    h.taker.ending.set_result(Taken(STATE, exact))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await h.settle() == [("join", "r", [7], ("exact", exact), ("draft_states", DRAFT_STATES))]
    assert h.failed == []


async def test_an_abort_between_the_end_of_a_transfer_and_its_news_ends_the_sequence() -> None:
    h = Harness()
    h.grant()
    await asyncio.sleep(0)
    h.taker.ending.set_result(Taken(STATE, exact=True))
    (transfer,) = h.worker._transfers.values()
    while not transfer.task.done():
        await asyncio.sleep(0)
    h.worker.abort("r")  # its news comes in the next turn
    assert ("abort", "r") in await h.settle()


async def test_no_blocks_are_claimed_before_the_prefill_side_has_its_own() -> None:
    h = Harness()
    assert h.reserved.deferred
    h.worker.opened("r")
    assert h.engine.commands == [("undefer", "r")]
    h.worker.abort("r")
    await h.settle()


async def test_a_reservation_is_settled_when_it_has_its_blocks_and_when_it_has_ended() -> None:
    h = Harness()
    assert h.settled == []
    h.grant()
    assert h.settled == ["r"]
    h.worker.abort("r")
    await h.settle()
    assert h.settled == ["r", "r"]


async def test_what_is_left_of_the_time_counts_and_not_what_the_gateways_clock_says() -> None:
    h = Harness()
    assert h.reserved.request.deadline == 0.0
    before = time.time()
    await asyncio.sleep(0)
    assert before + 50 < h.taker.deadline < before + 70
    h.worker.abort("r")
    await h.settle()


async def test_the_prefill_side_hears_of_a_taker_before_there_are_blocks() -> None:
    h = Harness()
    await asyncio.sleep(0)
    assert h.taker.expected == ["t"]
    assert h.taker.reserved is not None
    assert not h.taker.reserved.done()
    h.grant()
    assert h.taker.reserved.result() == ([], 0, 3)
    h.worker.abort("r")
    await h.settle()


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_an_abort_at_any_moment_frees_the_blocks_once(steps: int) -> None:
    """Zero steps: the transfer's task is cancelled before it has begun."""
    h = Harness()
    h.grant()
    for _ in range(steps):
        await asyncio.sleep(0)
    h.worker.abort("r")
    assert await h.settle() == [("abort", "r")]
    assert h.failed == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ChecksumMismatch("piece 3 is wrong"), [("r", "piece 3 is wrong")]),
        (Withdrawn("ended at the first token", finished=True), []),
        (Withdrawn("aborted", finished=False), [("r", "aborted")]),
        (ValueError("a defect"), [("r", "a defect")]),
    ],
)
@pytest.mark.parametrize("granted", [True, False])
async def test_a_failed_transfer_frees_the_blocks_before_the_gateway_hears(
    granted: bool, error: Exception, told: list[tuple[str, str]]
) -> None:
    h = Harness()
    if granted:
        h.grant()
    h.taker.ending.set_exception(error)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await h.settle() == [("abort", "r")]
    assert h.failed == told


async def test_an_abort_before_the_grant_goes_to_the_engine() -> None:
    h = Harness()
    h.worker.abort("r")
    h.grant()
    assert await h.settle() == [("abort", "r")]


async def test_a_grant_that_crosses_a_failure_is_ignored() -> None:
    h = Harness()
    h.taker.ending.set_exception(ChecksumMismatch("wrong"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    h.grant()
    assert await h.settle() == [("abort", "r")]
    assert h.failed == [("r", "wrong")]


async def test_a_sequence_the_engine_has_ended_is_no_longer_waited_for() -> None:
    h = Harness()
    await asyncio.sleep(0)
    h.worker.rejected("r")
    await h.settle()
    assert h.taker.ending.cancelled()
    assert h.failed == []
