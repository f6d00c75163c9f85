"""What the engine asks of whoever drafts for it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from core.draft_state import DraftStates
from engine.drafts import Candidate, Draft, Verdict
from engine.schedule import Schedule
from engine.sequence import Sequence
from engine.step import StepBatch, StepOutput


class Speculator(Protocol):
    """Called on the loop's thread only."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose hidden states it wants to see of every step (StepBatch.taps)."""
        ...

    @property
    def reads_logits(self) -> bool:
        """Whether it wants the logits of the step that is built next, of which `propose` has seen the candidates."""
        ...

    @property
    def reads_top(self) -> int:
        """How many of the likeliest tokens of each row it wants of that step (StepBatch.num_top)."""
        ...

    def rests(self, schedule: Schedule) -> bool:
        """Whether nothing is proposed for this step, without being asked. Called once for each, before `propose`."""
        ...

    def propose(self, candidates: SequenceOf[Candidate], num_other_tokens: int) -> SequenceOf[Draft | None] | None:
        """A draft, no longer than there is room, for each candidate of a step that has so many tokens besides. None if
        there is none at all."""
        ...

    def judge(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[int | Verdict]:
        """Of each chunk that samples the drawn token, or the verdict on its draft. Called for steps with drafts."""
        ...

    def settle(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> None:
        """The sequences of a step have their new tokens."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended, or is computed elsewhere from now on, and no step that it is part of is left to settle; perhaps
        it was never a candidate."""
        ...

    def pack(self, sequence: Sequence) -> DraftStates:
        """What a speculator elsewhere needs to go on with it, once its prompt is computed and settled."""
        ...

    def unpack(self, sequence: Sequence, states: DraftStates) -> None:
        """`pack` of another speculator, before the sequence is a candidate here. What does not fit is left aside."""
        ...
