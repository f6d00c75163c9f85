"""The clock of the state machines' actors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Alarm:
    """Calls `ring` on the running loop once time.monotonic() has reached the time it is set to."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        """Infinity switches it off."""
        if at == self._at and at > time.monotonic():
            return
        self._at = at
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if math.isfinite(at):
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._rang)

    def _rang(self) -> None:
        """Timers of some loops, such as uvloop's, fire up to a millisecond early. Whoever then sets the same time again
        is to be rung again."""
        self._at, self._timer = math.inf, None
        self._ring()
