"""What the gateway needs from a cluster. `cluster/` implements it; the gateway knows nothing else about workers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from core.replan_metrics import ReplanStatus
from core.types import FinishReason, Request, TokenDelta
from core.wire import WorkerStatus


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """`ready` means that a request sent now would be served; otherwise `reason` says what is missing."""

    ready: bool
    reason: str
    workers: tuple[WorkerStatus, ...]
    routes: Mapping[str, int] = field(default_factory=dict)
    """Attempts at sequences so far, by why they went the way they did."""
    replanning: ReplanStatus | None = None
    """None if nobody replans, or nothing was heard of it yet."""


class Backend(Protocol):
    def generate(self, request: Request) -> AsyncGenerator[TokenDelta, FinishReason | None]:
        """Deltas in output order, the last with `finish` set, by the deadline at the latest. Raises Overloaded or
        Unavailable before the first delta when the request is refused. Closing it cancels the request and frees what it
        holds everywhere; so does sending in a reason, as which its end is then recorded."""
        ...

    def status(self) -> BackendStatus: ...
