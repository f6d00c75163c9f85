"""How long workers take until they serve, as it was seen lately."""

from __future__ import annotations

from collections import deque

_LATELY = 5


class Startups:
    """What is reckoned with is the longest of the last few: a change is as far as its slowest worker."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_LATELY)

    def tell(self, seconds: float) -> None:
        """Above 0."""
        self._seen.append(seconds)

    @property
    def longest_s(self) -> float:
        """0 until somebody has told of one."""
        return max(self._seen, default=0.0)
