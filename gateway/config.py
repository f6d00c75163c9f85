"""Limits of a gateway."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SpeculationOffer(BaseModel):
    """What requests may ask of speculation, on a server that speculates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drafters: dict[str, tuple[str, ...]] = Field(min_length=1)
    """The rules that each may be verified by."""
    budget: int = Field(ge=1)
    """Draft tokens per step at most."""
    rule_with_logprobs: str
    """The one whose tokens are those that logprobs are reported of."""


class GatewayConfig(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    max_concurrent_requests: int = Field(256, ge=1)
    """Sequences in flight (a request with n choices counts n times). One more is refused with 429."""
    max_choices: int = Field(64, ge=1)
    """Prompts times n of one HTTP request."""
    request_timeout_s: float = Field(600.0, gt=0)
    """From arrival to the last token; then the request ends with 504."""
    retry_after_s: float = Field(1.0, gt=0)
    """What a refused client is told to wait."""
    max_stop_strings: int = Field(16, ge=1)
    max_stop_chars: int = Field(256, ge=1)
    max_logprobs: int = Field(20, ge=0)
    """Alternatives per token, of output and prompt."""
    max_logit_bias: int = Field(300, ge=0)
    max_stop_token_ids: int = Field(1024, ge=0)
    max_grammar_bytes: int = Field(65536, ge=1)
    seed: int | None = Field(None, ge=0)
    """What the seeds of requests that bring none are derived from; None makes every run different."""
    speculation: SpeculationOffer | None = None
    """None: this server does not speculate."""
    max_waiting_texts: int = Field(32, ge=1)
    """Long texts sent to /tokenize and /detokenize that are held at once. They are worked on one after the other, so
    that streams are not starved; one more is refused with 429."""

    @model_validator(mode="after")
    def _one_request_must_fit(self) -> GatewayConfig:
        if self.max_choices > self.max_concurrent_requests:
            raise ValueError(
                f"max_choices ({self.max_choices}) is above max_concurrent_requests ({self.max_concurrent_requests}): "
                "such a request could never be admitted; lower max_choices"
            )
        return self
