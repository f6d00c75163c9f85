"""The clock of the state machines' actors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from kv_transfer.alarm import Alarm

TIMEOUT_S = 60.0


async def test_an_alarm_that_a_timer_rings_too_early_rings_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As uvloop's do, whose timers count whole milliseconds: a lease would never end."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    call_later = loop.call_later

    def early(delay: float, callback: Callable[..., Any], *given: Any) -> asyncio.TimerHandle:
        patched.undo()
        return call_later(delay - 0.1, callback, *given)

    def ring() -> None:
        """As a machine's: told that it is not yet time, it waits for the same moment."""
        if time.monotonic() < at:
            alarm.set(at)
        else:
            alarm.set(math.inf)
            over.set()

    alarm, at = Alarm(ring), time.monotonic() + 0.12
    async with asyncio.timeout(TIMEOUT_S):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "call_later", early)
            alarm.set(at)
            await over.wait()
