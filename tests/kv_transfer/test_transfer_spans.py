"""What a transfer tells who traces its request."""

from __future__ import annotations

import asyncio
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from sides import STATE, TIMEOUT_S, connected, layout, wanted

from core.errors import TransferError
from tests.spans import spans

__all__ = ["spans"]

LAYOUT = layout(num_layers=3)
CLIENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


async def test_a_transfer_tells_where_its_time_went(spans: InMemorySpanExporter) -> None:
    async with connected(LAYOUT, LAYOUT, transports=["shared_memory"]) as sides:
        reserved = asyncio.get_running_loop().create_future()
        reserved.set_result(sides.taker.reservation([1, 2], start_token=0, num_tokens=30))
        taking = asyncio.create_task(
            sides.taker.expect("t", sides.address, reserved, deadline=time.time() + TIMEOUT_S, trace=CLIENT)
        )
        await wanted(sides, "t")
        sides.giver.open("t", [5, 6], 30)
        sides.giver.complete("t", STATE)
        await taking
        assert await sides.end() == ("t", "committed")
    (span,) = spans.get_finished_spans()
    assert span.name == "kv_transfer"
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == CLIENT.split("-")[1]
    told = {name.removeprefix("slipstream.transfer."): value for name, value in (span.attributes or {}).items()}
    assert told["outcome"] == "committed"
    assert told["transport"] == "shared_memory"
    assert told["bytes"] == told["wire_bytes"] == 30 * LAYOUT.token_bytes
    assert all(float(told[f"{part}_s"]) >= 0 for part in ("gap", "wait", "encode", "wire", "decode", "overlap"))  # type: ignore[arg-type]


async def test_a_transfer_that_failed_says_why(spans: InMemorySpanExporter) -> None:
    async with connected(LAYOUT, LAYOUT, transports=["shared_memory"]) as sides:
        taking = asyncio.create_task(sides.take("t", [1, 2], 30))
        await wanted(sides, "t")
        sides.giver.open("t", [5, 6, 7], 40)  # another prompt than the taker's
        with pytest.raises(TransferError, match="disagree about the prompt"):
            await taking
        assert await sides.end() == ("t", "aborted")
    (span,) = spans.get_finished_spans()
    assert dict(span.attributes or {})["slipstream.transfer.outcome"] == "failed"
    assert span.status.status_code is StatusCode.ERROR
    assert "disagree about the prompt" in (span.status.description or "")
