"""What speculation may cost before it has to pay for itself.

A step that speculated has saved what plain steps would have taken for the tokens that it emitted, less what it took; a
loss is a negative saving. The purse holds the sum of these and a small share of all time served, and speculation that
could empty it is not tried. So in any stretch of n plain steps' time a drafter that never helps costs at most
SHARE * n + START of them, and one that has helped before CAP - START more, if steps take what is expected of them: a
step that takes longer is paid back before the next.
"""

from __future__ import annotations

SHARE = 0.003
"""Of the time of plain work, for trying."""
START, ENOUGH, CAP = 4.0, 1.5, 24.0
"""In plain steps, by what the last one would have taken."""


class Purse:
    """In seconds."""

    def __init__(self) -> None:
        self._held: float | None = None
        self._plain = 0.0

    def affords(self, seconds: float) -> bool:
        """Whether it may be lost."""
        return self._held is not None and self._held >= seconds

    @property
    def is_empty(self) -> bool:
        """Whether more was lost than there was."""
        return self._held is not None and self._held < 0.0

    @property
    def is_rich(self) -> bool:
        """Whether it holds ENOUGH plain steps."""
        return self._held is not None and self._held >= ENOUGH * self._plain

    def doubt(self) -> None:
        """What was saved or lost was reckoned by plain steps that take something else."""
        if self._held is not None:
            self._held = min(max(self._held, ENOUGH * self._plain), START * self._plain)

    def account(self, plain: float, seconds: float, tokens_per_request: float) -> None:
        """A step took `seconds` and a plain one would have taken `plain`; that emits one token per request. None with
        drafts is faster than a plain one: where it seems to be, the machine has sped up, and nothing is saved by it."""
        served = plain * tokens_per_request
        self._add(plain, served - max(seconds, plain) + SHARE * served)

    def account_plain(self, plain: float, steps: int = 1) -> None:
        """Plain steps of so many seconds each; by what those take is counted, so they save nothing."""
        self._add(plain, SHARE * steps * plain)

    def _add(self, plain: float, seconds: float) -> None:
        self._plain = plain
        held = START * plain if self._held is None else self._held
        self._held = min(held + seconds, CAP * plain)
