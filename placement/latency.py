"""How long a step of a model takes. Pure functions of what is in the step; all times in milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple


class Coefficients(NamedTuple):
    """a + b·x + c·y. What x and y are, the latency model says."""

    a: float
    b: float
    c: float

    def at(self, x: float, y: float) -> float:
        return self.a + self.b * x + self.c * y

    def times(self, factor: float) -> Coefficients:
        return Coefficients(factor * self.a, factor * self.b, factor * self.c)


FIRST_STAGE_MS = 2.0
"""What the first stage of a pipeline adds to each of its batches in DistServe's model, and …"""
FIRST_STAGE_MS_PER_TOKEN = 1e-4
"""… for each token of the prompts or contexts in it."""
STAGE_HOP_MS = 1.0
"""What a prefill stage takes longer for each stage of its pipeline."""


@dataclass(frozen=True)
class DistServeLatency:
    """The latency model of DistServe (arXiv:2401.09670) as its simulator applies it, for one tensor parallel size.

    A batch of prompts of lengths L takes a + b·ΣL + c·ΣL² over all stages of a pipeline; a decode batch of B sequences
    a + b·Σ(context + 1) + c·B, by other coefficients from B = `large_batch` on.
    """

    prefill: Coefficients
    decode: Coefficients
    large_decode: Coefficients
    large_batch: int = 95

    def prefill_stage_ms(self, tokens: int, squares: int, *, stages: int, first: bool) -> float:
        """`tokens` is ΣL, `squares` ΣL²; `first` is for the first stage of `stages`."""
        whole = self.prefill.at(tokens, squares)
        return whole / stages + STAGE_HOP_MS * stages + _first_stage_ms(tokens, first)

    def decode_stage_ms(self, context: int, sequences: int, *, stages: int, first: bool) -> float:
        """`context` is the sum over the sequences of the tokens each has so far."""
        coefficients = self.decode if sequences < self.large_batch else self.large_decode
        return coefficients.at(context + sequences, sequences) / stages + _first_stage_ms(context, first)


def _first_stage_ms(tokens: int, first: bool) -> float:
    return FIRST_STAGE_MS + FIRST_STAGE_MS_PER_TOKEN * tokens if first else 0.0


@dataclass(frozen=True)
class Speculation:
    """Decode steps that verify drafts. A sequence gains `acceptance_length` tokens in each, on average, for
    `rows` rows of computation: the drafted tokens and one. Drafting takes `draft_ms` and `draft_sequence_ms` more for
    each sequence."""

    acceptance_length: float
    rows: int
    draft_ms: float = 0.0
    draft_sequence_ms: float = 0.0

    @staticmethod
    def of(acceptance_length: float, rows: float, draft_ms: float, draft_sequence_ms: float) -> Speculation:
        """Rows are whole in the simulator: as many as there were on average, or the next more."""
        whole = math.ceil(max(rows, acceptance_length) - 1e-9)
        return Speculation(acceptance_length, whole, draft_ms, draft_sequence_ms)


@dataclass(frozen=True)
class Contention:
    """How many times as long a step takes beside another worker that computes on the same machine: what of it is
    prompts, and what is decodes, each beside one that computes (prompts, decodes). Each further one adds as much."""

    prompt: tuple[float, float] = (1.0, 1.0)
    decode: tuple[float, float] = (1.0, 1.0)

    def more(self, prompts: float, others: float) -> float:
        """What another adds to a step, as a share of it. `prompts` and `others`: the shares of prompts in either."""
        prompt, decode = (one * others + two * (1.0 - others) for one, two in (self.prompt, self.decode))
        return prompt * prompts + decode * (1.0 - prompts) - 1.0


@dataclass(frozen=True)
class StepLatency:
    """One step of our engine, which may hold chunks of prompts and sequences that decode.

    Chunks take a + b·tokens + c·Σ((past + chunk)² - past²), by other coefficients (`large_prompt`, if there are some)
    from `large_tokens` tokens in the step on: over a whole prompt that is DistServe's form, however it is cut. Decodes
    take a + b·Σ(context + 1) + c·rows, by other coefficients from `large_rows` rows on; a sequence has one row, or more
    with drafts. A step with both saves `shared_ms`, as weights are read once, and less with more rows: none with
    `shared_rows`, whose own computing takes longer than reading weights. It takes no less than either alone.
    """

    prompt: Coefficients
    decode: Coefficients
    large_decode: Coefficients
    large_rows: int
    shared_ms: float = 0.0
    shared_rows: float = math.inf
    large_prompt: Coefficients | None = None
    large_tokens: int = 1

    @staticmethod
    def of(model: DistServeLatency) -> StepLatency:
        """The same coefficients in steps of our own; chunks and decodes share what the cheaper takes at the least."""
        shared = max(0.0, min(model.prefill.a, model.decode.a, model.large_decode.a))
        return StepLatency(model.prefill, model.decode, model.large_decode, model.large_batch, shared)

    def times(self, factor: float, decodes: float | None = None) -> StepLatency:
        """Of a machine on which everything takes so many times as long, or prompts do and `decodes` so many times."""
        decodes = factor if decodes is None else decodes
        return replace(
            self,
            prompt=self.prompt.times(factor),
            large_prompt=self.large_prompt and self.large_prompt.times(factor),
            decode=self.decode.times(decodes),
            large_decode=self.large_decode.times(decodes),
            shared_ms=min(factor, decodes) * self.shared_ms,
        )

    def prompts(self, tokens: float) -> Coefficients:
        """Of chunks with so many tokens."""
        return self.prompt if self.large_prompt is None or tokens < self.large_tokens else self.large_prompt

    def prompt_ms(self, tokens: int, squares: float) -> float:
        """Of chunks alone."""
        return self.prompts(tokens).at(tokens, squares)

    def step_ms(self, tokens: int, squares: float, context: float, sequences: int, rows: int) -> float:
        """`tokens` and `squares` of the chunks, `context` tokens and `rows` of the decodes."""
        prompt = self.prompt_ms(tokens, squares) if tokens else 0.0
        if not sequences:
            return prompt
        decode = (self.decode if rows < self.large_rows else self.large_decode).at(context + sequences, rows)
        if not tokens:
            return decode
        return max(prompt, decode, prompt + decode - self.saved_ms(rows))

    def saved_ms(self, rows: int) -> float:
        """At the most, by a step with prompts and so many rows of decodes."""
        return self.shared_ms * max(0.0, 1.0 - rows / self.shared_rows)
