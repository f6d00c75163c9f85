from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from starlette.types import Message

from core.errors import DeadlineExceeded, PayloadTooLarge, Unavailable
from gateway.admission import Admission
from gateway.exchange import Exchange, Guard


async def body_of(act: Callable[[Guard, asyncio.Task[None]], None]) -> str:
    """Run a guarded body that waits for ever, let `act` do something to it, and say how it ended."""
    guards: list[Guard] = []

    async def guarded() -> None:
        with Guard(timeout_s=60) as guard:
            guards.append(guard)
            await asyncio.Event().wait()

    task = asyncio.create_task(guarded())
    await asyncio.sleep(0)
    act(guards[0], task)
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return type(result).__name__


async def test_an_error_from_outside_is_raised_where_the_body_stood() -> None:
    assert await body_of(lambda guard, _: guard.end(Unavailable("over"))) == "Unavailable"


async def test_only_the_first_end_counts() -> None:
    def twice(guard: Guard, _: asyncio.Task[None]) -> None:
        guard.end(Unavailable("first"))
        guard.end(DeadlineExceeded("second"))

    assert await body_of(twice) == "Unavailable"


async def test_a_cancellation_from_outside_stays_one() -> None:
    def both(guard: Guard, task: asyncio.Task[None]) -> None:
        guard.end(Unavailable("over"))
        task.cancel()

    assert await body_of(lambda _, task: task.cancel() and None) == "CancelledError"
    assert await body_of(both) == "CancelledError"


async def test_nothing_is_cancelled_after_the_body() -> None:
    with Guard(timeout_s=60) as guard:
        pass
    guard.end(Unavailable("late"))
    await asyncio.sleep(0)


async def test_time_runs_out() -> None:
    with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"), Guard(timeout_s=0.01):
        await asyncio.Event().wait()


async def test_a_declared_length_is_believed_before_anything_is_read() -> None:
    async def receive() -> Message:
        raise AssertionError("read")

    async def send(message: Message) -> None:
        raise AssertionError(message)

    exchange = Exchange({"type": "http", "headers": [(b"content-length", b"11")]}, receive, send)
    with pytest.raises(PayloadTooLarge, match="larger than 10 bytes"):
        await exchange.read_body(10)


async def test_admission_is_idle_when_the_last_place_is_free() -> None:
    admission = Admission(capacity=2)
    with admission.admit(1, lambda _: None):
        with admission.admit(1, lambda _: None):
            assert admission.num_in_flight == 2
        waiting = asyncio.create_task(admission.idle())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
    assert admission.num_in_flight == 0
