"""Spans reach a collector, below those of whoever asked, and hold nobody up where there is none."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

CLIENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
PROCESS = """
import sys
from core.tracing import export_spans, record, serving, traceparent_of

export_spans(sys.argv[1], "slipstream-test", "one")
try:
    with serving("chat", sys.argv[2]) as span:
        record("kv_transfer", traceparent_of(span), 0.5, {"bytes": 7}, error="cut off")
        raise ValueError("no such model")
except ValueError:
    pass
"""


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Its URL, and what has come."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        finally:
            server.shutdown()
            thread.join()


def run(url: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", PROCESS, url, CLIENT], check=True, timeout=60)
    return time.monotonic() - started


def test_spans_of_a_process_reach_the_collector() -> None:
    with collector() as (url, received):
        run(url)
    spans = {
        span.name: span for batch in received for part in batch.resource_spans for span in part.scope_spans[0].spans
    }
    request, transfer = spans["chat"], spans["kv_transfer"]
    assert request.trace_id.hex() == transfer.trace_id.hex() == CLIENT.split("-")[1]
    assert request.parent_span_id.hex() == CLIENT.split("-")[2]
    assert transfer.parent_span_id == request.span_id
    assert 0.5 <= (transfer.end_time_unix_nano - transfer.start_time_unix_nano) / 1e9 < 0.6
    assert {entry.key: entry.value.int_value for entry in transfer.attributes} == {"bytes": 7}
    assert (transfer.status.code, transfer.status.message) == (2, "cut off")
    assert (request.status.code, request.status.message) == (2, "no such model")
    resource = {entry.key: entry.value.string_value for entry in received[0].resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("slipstream-test", "one")


def test_a_collector_that_is_not_there_holds_nobody_up() -> None:
    assert run("http://127.0.0.1:9/v1/traces") < 30
