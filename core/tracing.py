"""Spans of OpenTelemetry, sent over OTLP to the collector that an operator names; without one they cost next to
nothing.

The gateway opens a span for each request, below the client's where it sent a `traceparent` (W3C Trace Context). Its own
travels with the request (core.types.Request.trace), so that what workers do for it lies below it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Attributes = Mapping[str, str | int | float | bool]

EXPORT_TIMEOUT_S = 3.0
"""So that a process is not held up for longer, when it ends, by a collector that does not answer."""

_TRACER = trace.get_tracer("slipstream")
_W3C = TraceContextTextMapPropagator()


def export_spans(endpoint: str, service: str, instance: str) -> None:
    """From here on, those of this process. `endpoint` is the collector's URL for traces, such as
    http://127.0.0.1:4318/v1/traces. A collector that is not there costs a line in the log, never a request."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service, "service.instance.id": instance}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)))
    trace.set_tracer_provider(provider)


@contextmanager
def serving(name: str, traceparent: str) -> Iterator[Span]:
    """While a request is served. Whatever it raises makes the span an error, unless nobody failed: a coroutine that is
    cancelled."""
    span = _TRACER.start_span(name, _W3C.extract({"traceparent": traceparent}), SpanKind.SERVER)
    try:
        yield span
    except Exception as error:
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(StatusCode.ERROR, str(error))
        raise
    finally:
        span.end()


def traceparent_of(span: Span) -> str:
    """What goes with the request; empty if there is neither a collector nor a client that traces."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def record(name: str, traceparent: str, seconds: float, attributes: Attributes, error: str = "") -> None:
    """A span that ends now and took so long."""
    end = time.time_ns()
    context = _W3C.extract({"traceparent": traceparent})
    span = _TRACER.start_span(name, context, attributes=attributes, start_time=end - int(seconds * 1e9))
    if error:
        span.set_status(StatusCode.ERROR, error)
    span.end(end)
