"""The plain data that the scheduler takes and gives, and the rules for one sequence: what fits, what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.draft_state import DraftStates
from core.errors import ConfigError, InvalidRequest
from core.types import Finish, FinishReason, PromptLogprobs, TokenLogprobs
from engine.drafts import Draft
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int
    """Sequences that may be running or reserved at a time."""
    max_num_batched_tokens: int
    """Tokens of one step."""
    max_model_len: int
    """Tokens of prompt and output together."""
    adapters: frozenset[str] = frozenset()
    """Names of the LoRA adapters that a request may ask for."""
    max_steps_in_flight: int = 1
    """Steps that the runner works on at a time (Runner.max_steps_in_flight); the sequences are spread over them."""
    min_decodes_per_step: int = 8
    """Sequences that decode are parted over several steps if each gets so many: a step of fewer takes as long, since it
    reads the same weights."""

    def __post_init__(self) -> None:
        counts = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
        for name in (*counts, "max_steps_in_flight", "min_decodes_per_step"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}: "
                "a step must have room for one token of each sequence; raise the one or lower the other"
            )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute token_ids[start : start + num_tokens] of a sequence and, if `samples`, draw the token that follows. The
    first `num_scored` of them want the logprob of the prompt's token that follows them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    num_scored: int = 0
    draft: Draft | None = None
    """Proposed to follow a sequence that decodes; `num_tokens` counts its rows."""

    @property
    def decodes(self) -> bool:
        """Whether it is the last token of a sequence that goes on here, with or without a draft."""
        goes_on = self.samples and not self.sequence.hold_after_prefill and self.num_scored == 0
        return goes_on and (self.num_tokens == 1 or self.draft is not None)

    @property
    def num_logit_rows(self) -> int:
        return 0 if not self.samples else 1 if self.draft is None else self.draft.num_rows


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence whose blocks a hand-off now owns: they have room for `num_tokens` tokens, and the KV of the first
    `num_cached_tokens` of them. Scheduler.release gives them back."""

    sequence: Sequence
    block_ids: list[int]
    num_tokens: int
    num_cached_tokens: int


@dataclass(slots=True)
class Schedule:
    """One step. Without chunks there is nothing to run until another event (add, join, release, abort, update)."""

    block_size: int
    chunks: list[Chunk] = field(default_factory=list)
    granted: list[Sequence] = field(default_factory=list)
    """Reservations that have got their blocks: KV may be written from num_computed_tokens on."""
    opened: list[Opened] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    decodes: bool = False
    """Whether it has its share of the sequences that decode."""


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step brought for one sequence. `index` is the place of the first token in the output. If `finish` names a
    stop token it is the last of `token_ids`: usage counts it, text leaves it out."""

    sequence: Sequence
    token_ids: list[int]
    index: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finish: Finish | None = None
    num_cached_tokens: int = 0
    """Set on the update with the first token of the output."""
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of `token_ids`, those that come from the draft."""
    draft_states: DraftStates = field(default_factory=dict)
    """Set by the engine when the prompt of a sequence that is handed over is computed: what drafters know of it."""


def check_fits(sequence: Sequence, config: SchedulerConfig, kv_tokens: int) -> None:
    """Raise InvalidRequest, naming the parameter, if the sequence could not end by its own rules in a cache of
    `kv_tokens` tokens that it has to itself. A sequence held after prefill needs no room for its output."""
    if (adapter := sequence.request.adapter) and adapter not in config.adapters:
        raise InvalidRequest(f"model {adapter!r} is not served by this worker; name another", param="model")
    num_tokens, limit = len(sequence.token_ids), config.max_model_len
    max_tokens, num_output_tokens = sequence.request.sampling.max_tokens, sequence.num_output_tokens
    if not sequence.num_prompt_tokens:
        raise InvalidRequest("prompt is empty; give at least one token", param="prompt")
    if num_tokens + (max_tokens > 0) > limit:
        raise InvalidRequest(
            f"prompt has {num_tokens} tokens, which leaves no room for output in a context of {limit}; shorten it",
            param="prompt",
        )
    if num_tokens > kv_tokens:
        raise InvalidRequest(
            f"prompt has {num_tokens} tokens and the KV cache holds {kv_tokens}; shorten it", param="prompt"
        )
    if num_output_tokens >= max_tokens and (max_tokens or num_output_tokens):
        raise InvalidRequest(
            f"max_tokens is {max_tokens}, but {num_output_tokens} tokens have been generated; raise it",
            param="max_tokens",
        )
    needed = min(sequence.num_prompt_tokens + max_tokens, limit) - 1  # the KV of the last token is never computed
    if needed > kv_tokens and not sequence.hold_after_prefill:
        raise InvalidRequest(
            f"prompt and max_tokens {max_tokens} need {needed} tokens of KV cache, which holds {kv_tokens}; "
            f"lower max_tokens to {kv_tokens - sequence.num_prompt_tokens + 1}",
            param="max_tokens",
        )


def finish_after(sequence: Sequence, max_model_len: int) -> Finish | None:
    """Whether the last token of the sequence ends it. A stop token ends nothing among the first min_tokens."""
    params, num_output_tokens, token_id = sequence.request.sampling, sequence.num_output_tokens, sequence.token_ids[-1]
    if token_id in params.stop_token_ids and num_output_tokens > params.min_tokens:
        return Finish(reason=FinishReason.STOP, stop_token_id=token_id)
    if sequence.constraint is not None and sequence.constraint.end is not None:
        return sequence.constraint.end
    if num_output_tokens >= params.max_tokens or len(sequence.token_ids) >= max_model_len:
        return Finish(reason=FinishReason.LENGTH)
    return None
