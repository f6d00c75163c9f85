"""A link's transports as one: what happens when the first cannot be used, or breaks."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import pytest
from sides import STATE, Sides, connected, layout, pool_of_noise, tokens

from core.errors import ChecksumMismatch, TransferError
from kv_transfer.codecs.names import CodecName
from kv_transfer.coding import Coding
from kv_transfer.messages import FromGiver, Hello, PairFailed
from kv_transfer.taker import Taker
from kv_transfer.transports import nixl, pairs, tcp, tcp_io
from kv_transfer.transports.base import PullJob, Transport, Unusable
from kv_transfer.transports.choice import preference
from kv_transfer.transports.fallback import FirstThatWorks

THEIRS, OURS, NUM_TOKENS = [5, 6, 9, 2], [60, 3, 4, 1], 50


class Scripted:
    """Verifies so many pieces of each job, then does what it was told."""

    name: ClassVar[str] = "scripted"

    def __init__(self, pieces: int, end: BaseException | None = None) -> None:
        self.jobs: list[PullJob] = []
        self.heard: list[FromGiver] = []
        self.forgotten: list[str] = []
        self.closed = False
        self._pieces, self._end = pieces, end

    async def pull(self, job: PullJob) -> None:
        self.jobs.append(job)
        for index in range(min(self._pieces, len(job.pieces))):
            job.on_verified(job.first + index)
        if self._end is not None:
            raise self._end

    def on_message(self, message: FromGiver) -> None:
        self.heard.append(message)

    def forget(self, transfer_id: str) -> None:
        self.forgotten.append(transfer_id)

    def close(self) -> None:
        self.closed = True


def job_of(num_pieces: int, verified: list[int], first: int = 10, codec: CodecName = "none") -> PullJob:
    nothing: Any = None
    return PullJob(
        transfer_id="t",
        first=first,
        pieces=list(range(num_pieces)),  # type: ignore[arg-type]
        rows=nothing,
        giver_slots=nothing,
        taker_slots=nothing,
        coding=Coding(codec, layout()),
        on_began=lambda: None,
        on_verified=verified.append,
        on_decoded=nothing,
    )


def choices(**transports: Transport | Unusable) -> dict[str, Any]:
    def make(transport: Transport | Unusable) -> Transport:
        if isinstance(transport, Unusable):
            raise transport
        return transport

    return {name: lambda transport=transport: make(transport) for name, transport in transports.items()}


async def test_the_next_transport_gets_what_is_left_and_goes_first_afterwards() -> None:
    verified: list[int] = []
    told: list[str] = []
    broken, whole = Scripted(2, TransferError("cut")), Scripted(9)
    first = FirstThatWorks(choices(broken=broken, whole=whole), told.append)
    await first.pull(job_of(5, verified))
    assert verified == [10, 11, 12, 13, 14]
    assert (whole.jobs[0].first, list(whole.jobs[0].pieces)) == (12, [2, 3, 4])
    assert len(told) == 1
    assert "cut" in told[0]
    await first.pull(job_of(3, verified))
    assert (len(broken.jobs), len(whole.jobs), len(told)) == (1, 2, 1)


async def test_when_both_fail_both_are_named_and_the_order_stays() -> None:
    one, other, third = (Scripted(0, TransferError(text)) for text in ("cut", "refused", "not asked"))
    first = FirstThatWorks(choices(one=one, other=other, third=third), lambda _: None)
    for times in (1, 2):
        with pytest.raises(TransferError, match="cut; and by other: refused"):
            await first.pull(job_of(1, []))
        assert (len(one.jobs), len(other.jobs), len(third.jobs)) == (times, times, 0)


async def test_what_a_transport_keeps_of_a_transfer_is_forgotten_when_another_goes_on_with_it() -> None:
    """As what TCP has the giver push: nobody would read it any more."""
    broken, whole = Scripted(0, TransferError("cut")), Scripted(9)
    first = FirstThatWorks(choices(broken=broken, whole=whole), lambda _: None)
    await first.pull(replace(job_of(1, []), transfer_id="one that fails"))
    broken.forgotten.clear()
    await first.pull(job_of(1, []))  # `broken` may have pulled pieces of it before
    assert (broken.forgotten, whole.forgotten) == (["t"], [])


@pytest.mark.parametrize("error", [ChecksumMismatch("not what was sealed"), asyncio.CancelledError()])
async def test_what_is_no_fault_of_the_transport_is_not_tried_again(error: BaseException) -> None:
    one, other = Scripted(0, error), Scripted(9)
    with pytest.raises(type(error)):
        await FirstThatWorks(choices(one=one, other=other), lambda _: None).pull(job_of(1, []))
    assert not other.jobs


async def test_after_the_link_nothing_is_tried_again() -> None:
    one, other = Scripted(0, TransferError("the link has ended")), Scripted(9)
    first = FirstThatWorks(choices(one=one, other=other), lambda _: None)
    first.close()
    with pytest.raises(TransferError, match="the link has ended"):
        await first.pull(job_of(1, []))
    assert one.closed
    assert not other.jobs


async def test_transports_are_made_when_needed_and_hear_of_everything_once_made() -> None:
    one, other, message = Scripted(0, TransferError("cut")), Scripted(9), PairFailed("p", "gone")
    first = FirstThatWorks(choices(never=Unusable("no way"), one=one, other=other), lambda _: None)
    first.on_message(message)
    await first.pull(job_of(1, []))
    first.on_message(message)
    first.forget("another")
    assert (one.heard, other.heard) == ([message, message], [message])
    assert (one.forgotten[-1], other.forgotten[-1]) == ("another", "another")


async def test_a_job_in_a_codec_goes_by_who_can_carry_frames_and_any_other_by_whoever_is_next() -> None:
    in_place, tcp, gloo = Scripted(9), Scripted(0, TransferError("cut")), Scripted(9)
    first = FirstThatWorks(choices(shared_memory=in_place, tcp=tcp, nixl=Scripted(9), gloo=gloo), lambda _: None)
    assert first.in_place
    await first.pull(job_of(1, [], codec="int8"))
    assert (len(in_place.jobs), len(tcp.jobs), len(gloo.jobs)) == (0, 1, 1)
    assert not first.in_place
    broken = FirstThatWorks(choices(tcp=tcp, shared_memory=in_place), lambda _: None)
    await broken.pull(job_of(1, []))
    assert (len(tcp.jobs), len(in_place.jobs)) == (2, 1)
    assert broken.in_place
    with pytest.raises(TransferError, match="cut"):
        await broken.pull(job_of(1, [], codec="fp8"))
    assert len(in_place.jobs) == 1


async def test_that_none_can_be_used_is_said_with_every_reason() -> None:
    told: list[str] = []
    with pytest.raises(Unusable, match="a: too far; b: too old"):
        FirstThatWorks(choices(a=Unusable("too far"), b=Unusable("too old")), told.append)
    assert len(told) == 2


async def test_the_preference_is_one_copy_then_tcp_and_nccl_between_gpus() -> None:
    def giver(device: str) -> Hello:
        return Hello(layout=layout(), num_blocks=1, device=device)

    pool = pool_of_noise(layout(), num_blocks=1)
    assert preference(giver("cpu"), pool) == ("shared_memory", "tcp", "torch_distributed")
    assert preference(giver("cuda:x"), pool) == ("tcp", "torch_distributed")


async def test_every_transport_gives_up_before_the_taker_does_so_that_the_next_gets_its_chance() -> None:
    patience = signature(Taker).parameters["stall_s"].default
    assert all(limit < patience for limit in (tcp_io.IDLE_TIMEOUT_S, nixl.STALL_S, pairs.OP_TIMEOUT_S))


# --- in a hand-off ---------------------------------------------------------------------------------------------------


def arrived(sides: Sides) -> None:
    np.testing.assert_array_equal(
        tokens(sides.taker_pool, OURS, 0, NUM_TOKENS), tokens(sides.giver_pool, THEIRS, 0, NUM_TOKENS)
    )


async def test_a_connection_that_breaks_in_the_middle_costs_no_transfer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1000)
    monkeypatch.setattr(tcp_io, "BATCH_BYTES", 2000)
    whole, calls = tcp.receive, []

    def breaks(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise TransferError("the connection broke: cable cut")
        whole(*arguments)

    monkeypatch.setattr(tcp, "receive", breaks)
    async with connected(transports=["tcp", "torch_distributed"]) as sides:
        sides.offer("t", THEIRS, NUM_TOKENS)
        with caplog.at_level(logging.WARNING, "kv_transfer"):
            assert await sides.take("t", OURS, NUM_TOKENS) == STATE
        assert await sides.end() == ("t", "committed")
        arrived(sides)
        assert len(calls) == 3
        assert sides.taker.counters.fallbacks == 1
        assert "transport tcp failed, torch_distributed takes over: the connection broke: cable cut" in caplog.text


async def test_a_transport_that_was_asked_for_alone_fails_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*arguments: Any) -> None:
        raise TransferError("the connection broke: cable cut")

    monkeypatch.setattr(tcp, "receive", breaks)
    async with connected(transports=["tcp"]) as sides:
        sides.offer("t", THEIRS, NUM_TOKENS)
        with pytest.raises(TransferError, match="cable cut"):
            await sides.take("t", OURS, NUM_TOKENS)
        assert (await sides.end())[0] == "t"
        assert (sides.taker.counters.failed, sides.taker.counters.fallbacks) == (1, 0)
