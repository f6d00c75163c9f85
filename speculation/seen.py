"""Where a step has what: from its chunks to rows of its output, for drafters and rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from core.types import TokenLogprobs
from engine.likeliest import likeliest
from engine.schedule import Chunk, Schedule
from engine.sequence import Sequence as EngineSequence
from engine.step import StepBatch, StepOutput
from speculation.rounds import Needs, Observed, Outcome
from speculation.tree import DraftBatch, offsets_of, ranges

Places = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Of some rows: offsets [sequences + 1], indices [rows] into the tokens of the sequence, rows of the step [rows], and
logit rows [rows], -1 for a row without."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Rows of sequences that a drafter has not drafted for."""

    sequences: list[EngineSequence]
    places: Places


class Step:
    """A step that has run. A candidate is a chunk that decodes; they are numbered as they were when drafts were asked
    for. What is where is found when it is asked for: most steps are at rest, and their hidden states are all that
    anybody wants."""

    def __init__(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> None:
        self.output = output
        self._chunks = schedule.chunks
        self._starts = batch.query_starts  # [chunks + 1]

    @cached_property
    def _first_logits(self) -> NDArray[np.int64]:
        return offsets_of(np.array([chunk.num_logit_rows for chunk in self._chunks], np.int64))

    @cached_property
    def _sampled(self) -> list[int]:
        return [place for place, chunk in enumerate(self._chunks) if chunk.samples]

    @cached_property
    def _candidates(self) -> list[int]:
        return [place for place, chunk in enumerate(self._chunks) if chunk.decodes]

    @property
    def sequences(self) -> list[EngineSequence]:
        return [chunk.sequence for chunk in self._chunks]

    @property
    def starts(self) -> NDArray[np.int64]:
        """[sequences] index of the token of each one's first row."""
        return np.array([chunk.start for chunk in self._chunks], np.int64)

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """[samples] the first logit row of each chunk that samples."""
        return self._first_logits[self._sampled]

    def sample_of(self, candidate: int) -> int:
        """Its place among the chunks that sample."""
        return self._sampled.index(self._candidates[candidate])

    def logit_rows_of(self, candidates: NDArray[np.int64]) -> NDArray[np.int64]:
        """All of theirs, one after the other."""
        chunks = [self._candidates[candidate] for candidate in candidates]
        counts = np.array([self._chunks[chunk].num_logit_rows for chunk in chunks], np.int64)
        return ranges(self._first_logits[chunks], counts)

    def logprobs_of(self, candidate: int) -> Sequence[TokenLogprobs | None] | None:
        """Of all its rows, if its request asked."""
        if not self.output.logprobs:
            return None
        chunk = self._candidates[candidate]
        found = self.output.logprobs[self._first_logits[chunk] : self._first_logits[chunk + 1]]
        return found if found[0] is not None else None

    def path_rows(self, candidates: NDArray[np.int64], drafts: DraftBatch, outcome: Outcome) -> Places:
        """Root and accepted path of each, as far as its text goes: what ends a text may lie within a path."""
        chunks = np.array([self._candidates[candidate] for candidate in candidates])
        offsets = outcome.path_offsets + np.arange(len(outcome.path_offsets))
        own = np.zeros(int(offsets[-1]), np.int64)  # rows within the draft: 0 is the root
        roots = np.zeros(len(own), np.bool_)
        roots[offsets[:-1]] = True
        own[~roots] = 1 + outcome.path - np.repeat(drafts.offsets[:-1], outcome.num_accepted)
        of_request = np.repeat(np.arange(len(chunks)), np.diff(offsets))
        starts = self.starts[chunks]
        indices = starts[of_request] + np.arange(len(own)) - offsets[of_request]
        lengths = np.array([len(self._chunks[chunk].sequence.token_ids) for chunk in chunks], np.int64)
        kept = indices < lengths[of_request]
        own, of_chunk = own[kept], chunks[of_request[kept]]
        offsets = offsets_of(np.bincount(of_request[kept], minlength=len(chunks)))
        return offsets, indices[kept], self._starts[of_chunk] + own, self._first_logits[of_chunk] + own

    def rows_beside(self, own: Collection[int], *, all_rows: bool, held_only: bool = False) -> Beside | None:
        """Rows of all sequences but those candidates, or of those that are held after prefill only, the last row only
        unless `all_rows`; None if there are none."""
        skipped = {self._candidates[candidate] for candidate in own}
        wanted = [
            (place, chunk)
            for place, chunk in enumerate(self._chunks)
            if place not in skipped
            and (all_rows or chunk.samples)
            and (chunk.sequence.hold_after_prefill or not held_only)
        ]
        if not wanted:
            return None
        counts = np.array([_plain_rows(chunk) if all_rows else 1 for _, chunk in wanted], np.int64)
        firsts = np.array([0 if all_rows else _plain_rows(chunk) - 1 for _, chunk in wanted], np.int64)
        places = np.array([place for place, _ in wanted])
        rows = ranges(self._starts[places] + firsts, counts)
        indices = ranges(np.array([chunk.start for _, chunk in wanted]) + firsts, counts)
        offsets = offsets_of(counts)
        logits = np.full(len(rows), -1, np.int64)
        samples = np.array([chunk.samples for _, chunk in wanted])
        logits[offsets[1:][samples] - 1] = self._first_logits[places[samples]]
        return Beside([chunk.sequence for _, chunk in wanted], (offsets, indices, rows, logits))


def observed(
    step: Step,
    needs: Needs,
    offsets: NDArray[np.int64],
    indices: NDArray[np.int64],
    rows: NDArray[np.int64],
    logit_rows: NDArray[np.int64],
) -> Observed:
    """What the drafter asked to see of these rows. Top tokens only if all of them have logits."""
    output, of_rows = step.output, torch.from_numpy(rows)
    taps = {tap: output.taps[tap][of_rows.to(output.taps[tap].device)] for tap in needs.taps}
    if not needs.top or (logit_rows < 0).any():
        return Observed(offsets, indices, taps)
    if output.top is not None:
        top_ids, top_logprobs = output.top
        return Observed(offsets, indices, taps, top_ids[logit_rows, : needs.top], top_logprobs[logit_rows, : needs.top])
    if output.logits is None:
        return Observed(offsets, indices, taps)
    ids, logprobs = likeliest(output.logits, torch.from_numpy(logit_rows), needs.top)
    return Observed(offsets, indices, taps, ids.cpu().numpy(), logprobs.cpu().numpy())


def observed_in_turn(steps: Sequence[Step], needs: Needs) -> tuple[list[EngineSequence], Observed]:
    """`observed` hidden states of steps that followed each other, in which the same sequences decode, a row each, and
    nothing else is computed: those of each sequence together, in the order of its tokens."""
    sequences, starts = steps[0].sequences, steps[0].starts
    offsets = offsets_of(np.full(len(sequences), len(steps), np.int64))
    indices = (starts[:, None] + np.arange(len(steps))).ravel()
    taps = {tap: torch.stack([step.output.taps[tap] for step in steps], 1).flatten(0, 1) for tap in needs.taps}
    return sequences, Observed(offsets, indices, taps)


def _plain_rows(chunk: Chunk) -> int:
    """Rows whose tokens are the sequence's own."""
    return chunk.num_tokens if chunk.draft is None else 1
