"""A lane: one piece of work after another, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest

from kv_transfer.transports.lane import Lane


@pytest.fixture
async def lane():
    made = Lane("lane")
    yield made
    made.close()


def threads(name: str = "lane") -> int:
    return sum(thread.name == name for thread in threading.enumerate())


async def test_work_is_done_in_order_in_one_thread(lane):
    done = []
    results = [lane.run(lambda n=n: done.append((n, threading.current_thread())) or n) for n in range(20)]
    assert await asyncio.gather(*results) == list(range(20))
    assert [n for n, _ in done] == list(range(20))
    assert {thread.name for _, thread in done} == {"lane"}


async def test_it_has_no_thread_before_there_is_work():
    lane = Lane("late lane")
    assert threads("late lane") == 0
    await lane.run(lambda: None)
    assert threads("late lane") == 1
    lane.close()


async def test_what_is_raised_is_raised_where_it_is_awaited_and_the_lane_goes_on(lane):
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 // 0)
    assert await lane.run(lambda: 1) == 1


async def test_work_that_nobody_awaits_any_more_is_done_all_the_same(lane):
    gate, done = threading.Event(), []
    waiting = lane.run(lambda: gate.wait(10))
    cancelled = lane.run(lambda: done.append(1))
    cancelled.cancel()
    gate.set()
    assert await waiting
    await lane.run(lambda: None)
    assert done == [1]


async def test_closed_it_ends_after_what_it_was_asked_for():
    lane = Lane("lane")
    gate = threading.Event()
    last = lane.run(lambda: gate.wait(10))
    lane.close()
    lane.close()
    assert threads() == 1
    gate.set()
    assert await last
    async with asyncio.timeout(10):
        while threads():
            await asyncio.sleep(0.001)


async def test_an_idle_lane_holds_nothing_of_what_it_did(lane):
    class Held:
        pass

    held = Held()
    seen = weakref.ref(held)
    await lane.run(lambda held=held: None)
    del held
    async with asyncio.timeout(10):
        while seen() is not None:
            await asyncio.sleep(0.001)


def test_a_loop_that_is_closed_meanwhile_ends_nothing_with_an_error():
    gate = threading.Event()

    async def leave():
        lane = Lane("lane")
        lane.run(lambda: gate.wait(10))
        return lane

    asyncio.run(leave()).close()
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "lane":
            thread.join(10)
    assert not threads()
