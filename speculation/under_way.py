"""What a round of speculation inside a batch holds from proposal to settlement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core.types import TokenLogprobs
from engine.drafts import Draft, Verdict
from engine.sampler import GREEDY_TEMPERATURE, sampling_law
from engine.schedule import Chunk
from engine.step import SamplingRow, StepBatch, StepOutput
from speculation.dice import KeyedDice
from speculation.overlap import Overlap
from speculation.rounds import Budgets, DraftRequest, Load, Outcome, TargetRows
from speculation.rules.registry import Rule
from speculation.sounding import Sounding
from speculation.tree import DraftBatch, ranges


@dataclass(frozen=True, slots=True)
class Part:
    """The drafts of a step that one drafter proposes and one rule judges."""

    drafter: str
    rule: Rule
    candidates: NDArray[np.int64]  # [requests] which of the step's
    drafts: DraftBatch
    masks: list[tuple[NDArray[np.uint32], ...] | None]
    """Per request, what its grammar allows after each row."""

    def draft(self, index: int) -> Draft:
        """As the engine has it, of one of its requests."""
        drafts, own = self.drafts, slice(self.drafts.offsets[index], self.drafts.offsets[index + 1])
        return Draft(drafts.tokens[own], drafts.parents[own], drafts.depths[own], self.masks[index])

    def target_rows(
        self, warm: NDArray[np.bool_], rows: NDArray[np.int64], batch: StepBatch, output: StepOutput
    ) -> TargetRows:
        """What the engine computed for its `rows`; laws of requests that are `warm`, if its rule reads them."""
        tokens = output.token_ids[rows]
        if not self.rule.reads_laws or output.logits is None or not warm.any():
            return TargetRows(tokens)
        lengths = self.drafts.lengths + 1
        starts = np.where(warm, np.cumsum(np.where(warm, lengths, 0)) - lengths, -1)
        chosen = rows[ranges(self.drafts.root_rows[warm], lengths[warm])]
        wanted = [row for row in (batch.sampling[index] for index in chosen) if isinstance(row, SamplingRow)]
        return TargetRows(tokens, sampling_law(output.logits[chosen], wanted), starts)

    def verdict(self, outcome: Outcome, index: int, logprobs: Sequence[TokenLogprobs | None] | None) -> Verdict:
        """What came of the draft of one of its requests."""
        path = outcome.path[outcome.path_offsets[index] : outcome.path_offsets[index + 1]] - self.drafts.offsets[index]
        emitted = outcome.emitted[outcome.emitted_offsets[index] : outcome.emitted_offsets[index + 1]]
        rows = (0, *(1 + node for node in path.tolist()))
        found = None if logprobs is None else [one for row in rows if (one := logprobs[row]) is not None]
        return Verdict(emitted.tolist(), path.tolist(), found)


@dataclass(slots=True)
class Round:
    """A step from proposal to settlement."""

    requests: list[DraftRequest]
    load: Load
    budgets: Budgets
    num_tokens: int
    """Rows of the step without drafts."""
    began: float
    """By time.perf_counter: before it was proposed for or, of a plain step, after nothing was."""
    alone: bool
    """Whether no other step was under way then."""
    parts: list[Part] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    soundings: list[Sounding] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def asked(self, part: Part) -> list[DraftRequest]:
        """Its requests."""
        return [self.requests[place] for place in part.candidates]

    def warm(self, part: Part) -> NDArray[np.bool_]:
        """[requests] that are not greedy."""
        return np.array([request.temperature >= GREEDY_TEMPERATURE for request in self.asked(part)], np.bool_)

    def dice(self, part: Part) -> KeyedDice:
        requests = self.asked(part)
        return KeyedDice([request.seed for request in requests], [request.position for request in requests])


@dataclass(slots=True)
class Rest:
    """What is left of a Budgets.rest, and whose it is."""

    request_ids: list[str]
    left: int

    def covers(self, chunks: Sequence[Chunk]) -> bool:
        return (
            self.left > 0
            and len(chunks) == len(self.request_ids)
            and all(c.decodes and c.sequence.request_id == own for c, own in zip(chunks, self.request_ids, strict=True))
        )
