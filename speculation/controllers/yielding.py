"""Whether speculation has brought anything, whatever was foretold."""

from __future__ import annotations

YIELD_OF, LEAST_YIELD = 32, 1.03
"""Steps that were speculated for over which it must have made them so many times as fast: what the controller itself
takes is not timed."""
PAUSES = (32, 1024)
"""Plain steps after it has not."""


class Yield:
    """What speculation has brought of late, drafts that came to nothing included: what was foretold may be wrong, and
    says nothing of steps for which nothing worth it was drafted."""

    def __init__(self) -> None:
        self._gap = PAUSES[0]
        self._begin()

    def _begin(self) -> None:
        self._saved = self._took = 0.0
        self._steps = 0

    def observe(self, plain: float, seconds: float) -> None:
        """A step for which drafts were asked took so long, and plain ones would have taken `plain`."""
        kept = 1 - 1 / YIELD_OF
        self._saved, self._took = kept * self._saved + plain, kept * self._took + seconds
        self._steps += 1

    @property
    def disappoints(self) -> bool:
        return self._steps >= YIELD_OF and self._saved < LEAST_YIELD * self._took

    def pause(self) -> int:
        """Steps until it is tried again; twice as many if it has not brought more in between."""
        if self._steps >= 2 * YIELD_OF:
            self._gap = PAUSES[0]
        steps, self._gap = self._gap, min(2 * self._gap, PAUSES[1])
        self._begin()
        return steps
