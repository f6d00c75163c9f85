"""What the span of a request says, by OpenTelemetry's GenAI conventions and vLLM's names for latencies."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.trace import Span

from gateway.exchange import Exchange
from gateway.generation import Choice

OPERATIONS = {"ChatRequest": "chat", "CompletionRequest": "text_completion"}


def describe(span: Span, operation: str, model: str, exchange: Exchange, choices: Sequence[Choice]) -> None:
    """However the request has ended."""
    if not span.is_recording():
        return
    first = [choice.ttft_s for choice in choices if choice.ttft_s is not None]
    span.update_name(f"{operation} {model}")
    span.set_attributes(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "slipstream",
            "gen_ai.request.model": model,
            "gen_ai.request.id": exchange.request_id,
            "gen_ai.request.max_tokens": max(choice.request.sampling.max_tokens for choice in choices),
            "gen_ai.request.temperature": choices[0].request.sampling.temperature,
            "gen_ai.usage.input_tokens": sum(len(choice.request.prompt_token_ids) for choice in choices),
            "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
            "gen_ai.latency.e2e": time.perf_counter() - exchange.arrived,
        }
    )
    if first:
        span.set_attribute("gen_ai.latency.time_to_first_token", min(first))
