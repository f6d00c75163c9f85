"""The table of contents: what a request is, what comes back, and how it ends.

These structs travel between processes as MessagePack (core.wire) and are validated by msgspec when decoded. Values from
users are checked by the gateway before they become one of these; inside, they are trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from core.errors import BY_CODE, InternalError, SlipstreamError


class Role(StrEnum):
    """What a worker is used for. State the controller sets: any worker can do either."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    """Lark's notation as llguidance reads it, or GBNF as llama.cpp and vLLM's users write it."""


class Grammar(Struct, frozen=True):
    """What the text of an output has to match, from its first character to its last."""

    kind: GrammarKind
    text: str


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. `seed` is always set: the gateway draws one when the user gave none.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. Penalties follow OpenAI (presence, frequency: over
    output tokens) and CTRL, arXiv:1909.05858 (repetition: over prompt and output). Stop strings are not here: the
    gateway matches text, workers see token ids only.
    """

    max_tokens: int
    """0 computes the prompt, for the logprobs of its tokens, and draws nothing."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ends the output, the end-of-sequence tokens of the model included unless the user said ignore_eos."""
    grammar: Grammar | None = None
    """Tokens are drawn among those that can go on with a text of the grammar, a stop token where the text may end.
    Where nothing can follow, the output ends, whatever min_tokens says."""
    logprobs: int | None = None
    """How many alternatives to report beside the drawn token; None reports nothing."""
    prompt_logprobs: int | None = None
    """How many to report beside each token of the prompt; None reports nothing."""


class Slo(Struct, frozen=True, kw_only=True):
    """Latency targets in milliseconds; None is no target."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


class SpeculationWish(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request has to say about its drafts. The gateway has checked that the workers have what is named."""

    drafter: str = ""
    """By name; empty leaves it to the worker."""
    rule: str = ""
    """By name; empty is the worker's."""
    budget: int | None = None
    """Draft tokens per step at most, 0 for none; None is the worker's bound."""


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. `emitted_token_ids` were already sent to the client by a worker that has since gone:
    they are part of the output (positions, penalties and max_tokens count them) and are not emitted again."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    deadline: float
    """Unix time, seconds, by the gateway's clock, by which the request must have ended."""
    emitted_token_ids: list[int] = []
    slo: Slo | None = None
    priority: int = 0
    """Lower goes first."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only between requests with the same salt, and the same adapter."""
    adapter: str = ""
    """Name of the LoRA adapter to compute with; empty is the base model."""
    speculation: SpeculationWish | None = None
    """None leaves everything about it to the worker."""
    remember: bool = True
    """Whether drafters may keep anything of its text once it has ended."""
    trace: str = ""
    """The `traceparent` that spans of what is done for it lie below; empty if nobody traces it."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Finish(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The one terminal event of a request."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None
    """With reason ERROR: the class name of an error in core.errors.BY_CODE."""
    message: str = ""

    @staticmethod
    def from_error(error: SlipstreamError) -> Finish:
        name = type(error).__name__
        return Finish(
            reason=FinishReason.ERROR,
            error=name if name in BY_CODE else InternalError.__name__,
            message=error.message,
        )

    def to_error(self) -> SlipstreamError:
        """The exception for reason ERROR."""
        return BY_CODE.get(self.error or "", InternalError)(self.message)


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities under the model's own law (temperature 1, no penalties or truncation)."""

    logprob: float
    top: list[tuple[int, float]]
    """(token id, logprob), most likely first."""


class PromptLogprobs(Struct, frozen=True, array_like=True):
    """What the model gave the tokens of a prompt, each after those before it, so none for the first. Natural logs under
    the model's own law. Little-endian arrays, row by row: a prompt may be long."""

    num_top: int
    logprobs: bytes
    """float32 [tokens]."""
    ranks: bytes
    """int32 [tokens]; 1 is the most likely token."""
    top_ids: bytes
    """int32 [tokens, num_top], most likely first."""
    top_logprobs: bytes
    """float32 [tokens, num_top]."""

    @staticmethod
    def joined(parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
        """Consecutive parts of one prompt, at least one, with the same num_top."""
        fields = ("logprobs", "ranks", "top_ids", "top_logprobs")
        return PromptLogprobs(parts[0].num_top, *(b"".join(getattr(part, name) for part in parts) for name in fields))


class TokenDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request. `index` is the position in the output of the first of them: prefill and decode workers
    speak over separate connections, and the receiver puts their deltas in order by it."""

    request_id: str
    index: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """Set, if asked for, on the delta that carries the first token, or the finish when no token is wanted."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from a prefix cache; set on the delta that carries the first token."""
    num_drafted_tokens: int = 0
    """Draft tokens that were verified in the step that brought these tokens."""
    num_accepted_tokens: int = 0
    """How many of `token_ids` were accepted from among them."""
    inexact_kv: bool = False
    """The worker's prefix cache gets none of its KV, which a codec has changed on its way."""
    finish: Finish | None = None
