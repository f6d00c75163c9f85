"""A request's span, and what of it goes to the workers."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from scripted import MakeGateway

from tests.spans import spans

__all__ = ["spans"]

CLIENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
BODY: dict[str, Any] = {"model": "alias", "prompt": "hello", "max_tokens": 4, "temperature": 0.5}


async def test_a_span_tells_of_its_request(gateway: MakeGateway, spans: InMemorySpanExporter) -> None:
    made = gateway()
    answer = await made.complete(**BODY, headers={"traceparent": CLIENT, "x-request-id": "mine"})
    usage = answer.json()["usage"]
    (span,) = spans.get_finished_spans()
    assert span.name == "text_completion alias"
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == CLIENT.split("-")[2]
    told = dict(span.attributes or {})
    assert told.pop("gen_ai.latency.time_to_first_token") <= told.pop("gen_ai.latency.e2e")  # type: ignore[operator]
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "slipstream",
        "gen_ai.request.model": "alias",
        "gen_ai.request.id": "mine",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
    }
    (request,) = made.backend.requests
    context = span.get_span_context()
    assert context is not None
    assert request.trace == f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


async def test_a_refused_request_is_an_error(gateway: MakeGateway, spans: InMemorySpanExporter) -> None:
    await gateway().complete(**(BODY | {"model": "other"}))
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes or {})["error.type"] == "UnknownModel"


async def test_a_client_s_trace_goes_on_to_the_workers_though_nobody_collects_spans_here(gateway: MakeGateway) -> None:
    made = gateway()
    await made.complete(**BODY, headers={"traceparent": CLIENT})
    await made.complete(**BODY, headers={"traceparent": "no such thing"})
    assert [request.trace for request in made.backend.requests] == [CLIENT, ""]
