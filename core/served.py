"""What is remembered of a request that has ended, and known of one that has not."""

from __future__ import annotations

from msgspec import Struct

from core.types import FinishReason


class Served(Struct, frozen=True):
    """One request as its gateway saw it. A log of them has one a line, as JSON."""

    arrived_s: float
    """Unix time, by the gateway's clock."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, that came from a prefix cache."""
    output_tokens: int
    ttft_ms: float | None
    """None: no token came."""
    tpot_ms: float | None
    """Mean gap between tokens; None: fewer than two came."""
    ended: FinishReason

    @property
    def took_s(self) -> float:
        """From its arrival to its last token; 0 if none came."""
        later_ms = (self.output_tokens - 1) * self.tpot_ms if self.tpot_ms is not None else 0.0
        return ((self.ttft_ms or 0.0) + later_ms) / 1e3


class UnderWay(Struct, frozen=True):
    """One request that has not ended, as its gateway sees it."""

    for_s: float
    """Since it came."""
    prompt_tokens: int
    cached_tokens: int
    """0 until the first token is there."""
    output_tokens: int
    """So far."""
