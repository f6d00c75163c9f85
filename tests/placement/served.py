"""Requests as gateways tell of them."""

from __future__ import annotations

from core.served import Served
from core.types import FinishReason


def served(
    arrived_s: float = 0.0,
    prompt: int = 100,
    output: int = 10,
    ttft_ms: float | None = 100.0,
    tpot_ms: float | None = 10.0,
    ended: FinishReason = FinishReason.STOP,
    cached: int = 0,
) -> Served:
    return Served(arrived_s, prompt, cached, output, ttft_ms, tpot_ms, ended)
