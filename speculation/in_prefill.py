"""Drafters on a worker whose prompts are decoded elsewhere: they see the prompts, so that those there can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.draft_state import DraftStates
from engine.drafts import Candidate, Draft, Verdict
from engine.schedule import Schedule
from engine.sequence import Sequence as EngineSequence
from engine.step import StepBatch, StepOutput
from speculation.counters import Counters
from speculation.crew import Crew
from speculation.protocols import Drafter
from speculation.seen import Step


class InPrefill:
    """Implements engine.speculator.Speculator. Nothing is drafted, for sequences that decode here either."""

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self.counters = Counters()
        self._crew = Crew(drafters, self.counters.switched_off)

    @property
    def lost(self) -> str | None:
        """As Crew.lost."""
        return self._crew.lost

    @property
    def taps(self) -> tuple[int, ...]:
        return self._crew.taps(soon=True)

    @property
    def reads_logits(self) -> bool:
        return False

    @property
    def reads_top(self) -> int:
        return self._crew.reads_top

    def rests(self, schedule: Schedule) -> bool:  # noqa: ARG002
        return True

    def propose(self, candidates: Sequence[Candidate], num_other_tokens: int) -> Sequence[Draft | None] | None:  # noqa: ARG002
        raise AssertionError("it is always at rest")

    def judge(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[int | Verdict]:  # noqa: ARG002
        raise AssertionError("nothing was drafted here")

    def settle(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> None:
        step = Step(schedule, batch, output)
        for name in self._crew:
            if (absorbing := self._crew.absorbing(name, step, held_only=True)) is not None:
                self._crew.call(name, absorbing)
        self._crew.step_took(output.seconds)

    def forget(self, sequence: EngineSequence) -> None:
        self._crew.forget(sequence)

    def pack(self, sequence: EngineSequence) -> DraftStates:
        return self._crew.pack(sequence)

    def unpack(self, sequence: EngineSequence, states: DraftStates) -> None:
        """They are of use only where the sequence is drafted for."""
