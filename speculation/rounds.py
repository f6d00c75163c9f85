"""What passes between drafter, target, rule, controller and learner in one round: plain data, flat over requests.

A round of a request begins with its root, the last committed token, at index `position - 1` of the output, and emits
the tokens from `position` on: those of the accepted path and one that the target adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.tree import DraftBatch, offsets_of, ranges


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """A request as drafters see it, from start to finish."""

    key: int
    """No other request of the worker has it, before or after."""
    token_ids: Sequence[int]
    """Prompt and output, the root last. Grows in place, so a drafter keeps no copy and changes nothing."""
    num_prompt_tokens: int
    seed: int
    temperature: float
    scope: str = ""
    """Text may be used to draft for requests of the same scope only: the tenant's cache_salt and the adapter."""
    remember: bool = True
    """Whether anything may be kept of it once it has finished."""

    @property
    def position(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter wants of the target besides tokens."""

    taps: tuple[int, ...] = ()
    """Layers whose hidden states it reads, numbered as in StepBatch.taps."""
    top: int = 0
    """How many of the target's likeliest tokens it wants for each row, with their log-probabilities."""
    thread: bool = True
    """One of its own, which may stall. Not for a drafter that only looks up what is in its memory: to wake a thread
    twice a step takes longer."""
    only_latest: bool = False
    """Of hidden states: those of a request's last row, by the time that it may be drafted for. Else all rows."""

    @property
    def all_rows(self) -> bool:
        """Of what is computed without a draft: else the last one of each request."""
        return bool(self.taps) and not self.only_latest

    @property
    def can_wait(self) -> bool:
        """Whether it may be told of several plain steps at once. Not who wants logits of them: those are large."""
        return bool(self.taps) and not self.top


@dataclass(frozen=True, slots=True)
class Observed:
    """Rows that the target has computed, in the order of the requests' tokens: of a prompt, of plain steps, or of the
    committed path of a round. Row i belongs to a token at an index of the request's token_ids; what it says is of the
    token after. Indices a drafter has not seen may be skipped (a prefix cache, a worker before this one)."""

    offsets: NDArray[np.int64]  # [requests + 1] into the rows
    indices: NDArray[np.int64]  # [rows] into token_ids
    taps: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [rows, hidden]
    top_ids: NDArray[np.int64] | None = None  # [rows, Needs.top], likeliest first
    top_logprobs: NDArray[np.float32] | None = None  # [rows, Needs.top]


@dataclass(frozen=True, slots=True)
class TargetRows:
    """What the target says after the root and each node, in the rows that DraftBatch.rows numbers. Penalties, grammar
    and truncation have followed each row's own path. `laws` and `law_starts` are both there or both not."""

    tokens: NDArray[np.int64]
    """[rows] the token that the engine's sampler has drawn, with NOT_ASKED and UNDRAWABLE as in StepOutput. Greedy
    requests have them in every row; the others where the rule reads tokens (`VerifyRule.reads_laws` false)."""
    laws: torch.Tensor | None = None
    """[rows of the requests that have some, vocab] float32 or float64, as sampling_law gives them."""
    law_starts: NDArray[np.int64] | None = None
    """[requests] where each one's rows begin in `laws`; -1: it has none and is verified by `tokens`."""

    def select(self, drafts: DraftBatch, requests: NDArray[np.int64]) -> TargetRows:
        """The rows of some requests of `drafts`, as they belong to drafts.select(requests)."""
        rows = ranges(drafts.root_rows[requests], drafts.lengths[requests] + 1)
        starts = None if self.law_starts is None else self.law_starts[requests]
        return TargetRows(self.tokens[rows], self.laws, starts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a DraftBatch. Request r emits emitted[emitted_offsets[r] : emitted_offsets[r + 1]]: the tokens of
    its path, then one of the target's own. The last may be UNDRAWABLE, which ends the request as in a plain step."""

    path: NDArray[np.int64]
    """[accepted] nodes of the batch, request by request, from the root down."""
    path_offsets: NDArray[np.int64]
    """[requests + 1] into path."""
    emitted: NDArray[np.int64]
    """[accepted + requests]"""
    accepted: NDArray[np.bool_]
    """[nodes] whether the node is on the path. What hangs from no node of it was never judged: neither accepted nor
    rejected."""

    @staticmethod
    def of(drafts: DraftBatch, accepted: NDArray[np.bool_], last: NDArray[np.int64]) -> Outcome:
        """`accepted` [nodes] and the token of the target's own [requests] settle the rest: nodes lie below their
        parents."""
        path = np.flatnonzero(accepted)
        of_request = drafts.request_of[path]
        offsets = offsets_of(np.bincount(of_request, minlength=drafts.num_requests))
        emitted = np.empty(len(path) + drafts.num_requests, np.int64)
        emitted[np.arange(len(path)) + of_request] = drafts.tokens[path]
        emitted[offsets[1:] + np.arange(drafts.num_requests)] = last
        return Outcome(path, offsets, emitted, accepted)

    @property
    def emitted_offsets(self) -> NDArray[np.int64]:
        return self.path_offsets + np.arange(len(self.path_offsets))

    @property
    def num_accepted(self) -> NDArray[np.int64]:
        """[requests]"""
        return np.diff(self.path_offsets)


@dataclass(frozen=True, slots=True)
class Feedback:
    """A round after its commit, for drafters and learners. `observed` has the rows of the root and of the path, as far
    as the request's tokens go: one that ended within its path has not taken the rest of it."""

    requests: Sequence[DraftRequest]
    drafts: DraftBatch
    outcome: Outcome
    observed: Observed


@dataclass(frozen=True, slots=True)
class Load:
    """A step that is about to be planned."""

    classes: Sequence[str]
    """[requests] which requests are taken to be alike: a controller learns about classes, never about requests."""
    context_tokens: NDArray[np.int64]
    """[requests] KV tokens that each attends to."""
    limits: NDArray[np.int64]
    """[requests] draft tokens that each can take: by its own switch and budget, what is left of max_tokens, and room
    for KV. 0: it doesn't speculate."""
    other_tokens: int = 0
    """Rows of the step that are no request's here: chunks of prompts."""
    wishes: Sequence[str] = ()
    """[requests] the drafter that each asked for, empty for one that leaves it to the controller; () if all do."""

    def drafters(self, chosen: Sequence[str]) -> list[str]:
        """[requests] who drafts for each: the controller has `chosen` [requests] for those that leave it to it."""
        return [wish or own for wish, own in zip(self.wishes, chosen, strict=True)] if self.wishes else [*chosen]


@dataclass(frozen=True, slots=True)
class Budgets:
    """How much is drafted in a step. If all `tokens` are 0 it is a plain one: no drafter is called, no rule runs."""

    tokens: NDArray[np.int64]
    """[requests] draft tokens that are verified for each, at most Load.limits."""
    candidates: NDArray[np.int64]
    """[requests] draft tokens that are proposed for each, among which `Controller.trim` chooses."""
    drafters: Sequence[str]
    """[requests] who drafts."""
    floor: float = 0.0
    """What a drafter may leave out: see protocols.Drafter.propose."""
    rest: int = 0
    """Of a plain step: so many more that decode the same requests and nothing else are plain as well, and the
    controller need not be asked about them."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of a step, plain or not, for the requests of its Load."""

    drafted: NDArray[np.int64]
    """[requests] draft tokens that were verified."""
    emitted: NDArray[np.int64]
    """[requests] tokens, the target's own included."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a step took, in seconds of wall time. Plain steps are recorded too, with no drafting and no verifying."""

    batch_size: int
    context_tokens: int
    """The sum over the sequences of the step."""
    batched_tokens: int
    """All rows of the step: one per sequence, draft tokens, chunks of prompts."""
    step_seconds: float
    """The target's forward and its sampling, and what the engine does before and after."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """The rule, the commit, and telling everyone."""
    rested: int = 0
    """Plain steps since the one recorded before that the controller was not asked about (Budgets.rest)."""

    @property
    def seconds(self) -> float:
        return self.step_seconds + self.draft_seconds + self.verify_seconds
