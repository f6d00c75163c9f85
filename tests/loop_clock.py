"""Time that passes only while an event loop runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest

LOOK_S = 0.005


class LoopClock:
    """For tests in which little time makes a difference: a machine that is busy with something else for a while takes
    none of it away. While the clock is `held` it stands still."""

    def __init__(self) -> None:
        self.held = False
        self._now = time.monotonic()

    def monotonic(self) -> float:
        return self._now

    async def run(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LOOK_S)
            self._now += 0.0 if self.held else min(2 * LOOK_S, time.monotonic() - before)


@asynccontextmanager
async def loop_clock(*modules: str) -> AsyncIterator[LoopClock]:
    """What these modules have for time.monotonic meanwhile."""
    clock = LoopClock()
    running = asyncio.create_task(clock.run())
    with pytest.MonkeyPatch.context() as patched:
        for module in modules:
            patched.setattr(f"{module}.time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
        yield clock
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
