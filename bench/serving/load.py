"""Offers the load: every request at its own absolute time, whatever became of those before it.

Arrivals never wait for answers (no coordinated omission); only --max-concurrency holds requests back, and the time they
wait for a slot is kept apart as client queue time. Times are absolute, so a late wake-up delays one request and not all
that follow; how late the generator itself was is the dispatch lag.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter, process_time

from bench.serving.client import Client
from bench.serving.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Run:
    """`timelines` are in dispatch order, those of requests cut short by an interruption (neither finished nor failed)
    included; `sent` counts them all. `duration` and `cpu` are seconds, cpu being this process's own."""

    timelines: list[Timeline]
    began: float
    duration: float
    cpu: float
    interrupted: bool


async def offer(
    client: Client,
    requests: list[bytes],
    offsets: list[float],
    *,
    max_concurrency: int | None = None,
    on_end: Callable[[Timeline], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> Run:
    """Send requests[i] offsets[i] seconds from now, and return when all have ended or `stop` is set."""
    timelines: list[Timeline] = []
    tasks: list[asyncio.Task[None]] = []
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    cpu, began = process_time(), perf_counter()

    async def one(request: bytes, timeline: Timeline) -> None:
        async with slots:
            await client.run(request, timeline)
        on_end(timeline)

    async def dispatch() -> None:
        for index, (request, offset) in enumerate(zip(requests, offsets, strict=True)):
            due = began + offset
            while (wait := due - perf_counter()) > 0:  # noqa: ASYNC110 - timers may fire up to 1 ms early
                await asyncio.sleep(wait)
            timelines.append(Timeline(index=index, scheduled=due, dispatched=perf_counter()))
            tasks.append(asyncio.create_task(one(request, timelines[-1])))
            await asyncio.sleep(0)  # let it go out before the next is looked at
        await asyncio.gather(*tasks)

    with _quiet_gc():
        interrupted = await _until(asyncio.create_task(dispatch()), stop or asyncio.Event())
    duration, cpu = perf_counter() - began, process_time() - cpu
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Run(timelines, began, duration, cpu, interrupted)


async def _until(work: asyncio.Task[None], stop: asyncio.Event) -> bool:
    """Wait for the work, or cancel it when `stop` is set; whether it was."""
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        return not work.done()
    finally:
        for task in (work, stopped):
            task.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)


@contextmanager
def stop_on_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; a second one ends the program as usual."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _quiet_gc() -> Iterator[None]:
    """Keep the collector from scanning the prepared requests again and again: its pauses would show as latency. Where
    something is frozen already, that is left to whoever froze it."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
