"""`gateway`: where the HTTP API listens, and its limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from cluster.config.section import Section
from cluster.notation import AbsolutePath, Size, parse_bytes


def _check_body(size: str) -> str:
    if parse_bytes(size) < 1024:
        raise ValueError(f"{size} holds no request; give 1KiB or more, such as 4MiB")
    return size


class GatewaySection(Section):
    host: str = Field("127.0.0.1", description="Address the HTTP API listens on")
    port: int = Field(8000, ge=0, le=65535, description="Port of the HTTP API; 0 takes a free one")
    served_model_name: str | None = Field(None, description="Name in the API; default: the name given to serve")
    max_concurrent_requests: int = Field(256, gt=0, description="More than these at once are answered 429")
    request_timeout_s: float = Field(600.0, gt=0, description="Every request ends within this time, seconds")
    max_body: Annotated[Size, AfterValidator(_check_body)] = Field("4MiB", description="Largest request body")
    traffic_log: AbsolutePath | None = Field(
        None,
        description="Append a line of JSON for every request that ends: when it came, lengths, latencies; slipstream "
        "plan and simulate read it as a trace. 64 MiB, and as much before that in FILE.1",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Requests that bring no seed get theirs from this one and their prompt, so that a run can be "
        "repeated; default: every run differs",
    )
    drain_timeout_s: float = Field(20.0, ge=0, description="On shutdown, how long running requests may go on, seconds")
