"""What serving shows of workers that their profile does not know."""

from __future__ import annotations

from dataclasses import dataclass

from placement.latency import Speculation
from placement.load import NOTHING, Drafted

PROFILED_STEPS = 100
"""Of a sequence, that what the profile says of drafts counts as much as."""


@dataclass(frozen=True)
class Seen:
    """How many times as long as by the profile steps take, for `prompts` and for `decodes`, and how drafts fared
    lately."""

    prompts: float = 1.0
    decodes: float = 1.0
    drafted: Drafted = NOTHING

    @property
    def acceptance_length(self) -> float | None:
        """Tokens of a step, lately; None if nobody speculates."""
        return 1.0 + self.drafted.accepted / self.drafted.steps if self.drafted.steps else None

    def of_drafts(self, profiled: Speculation) -> Speculation:
        """As they fare, by far the most if that was seen of many steps. What drafting takes is the profile's."""
        steps = PROFILED_STEPS + self.drafted.steps
        emitted = PROFILED_STEPS * profiled.acceptance_length + self.drafted.steps + self.drafted.accepted
        rows = PROFILED_STEPS * profiled.rows + self.drafted.steps + self.drafted.tokens
        return Speculation.of(emitted / steps, rows / steps, profiled.draft_ms, profiled.draft_sequence_ms)
