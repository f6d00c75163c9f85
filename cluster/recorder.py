"""What a gateway has to tell of its requests: once they have ended, and how far the others are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from msgspec import Struct

from core.replan_metrics import ReplanStatus
from core.served import Served, UnderWay
from core.types import FinishReason, Request, TokenDelta
from core.wire import WorkerStatus

REPORT_PERIOD_S = 1.0
MOST_KEPT = 10_000


class Report(Struct, frozen=True, kw_only=True):
    """What a gateway tells the controller every REPORT_PERIOD_S."""

    gateway_id: str
    served: list[Served]
    """That have ended since its last report, MOST_KEPT of them at the most."""
    in_flight: int
    workers: list[WorkerStatus]
    under_way: list[UnderWay] = []
    """Of those in flight the newest, MOST_KEPT of them at the most."""


SendReport = Callable[[Report], Awaitable[ReplanStatus | None]]
"""Raises Unavailable if nobody has taken it. Returns where replanning stands, None if there is none."""


class Recorder:
    """Of one gateway. When nobody asks, the oldest are forgotten."""

    def __init__(self) -> None:
        self._open: dict[Record, None] = {}
        self._ended: deque[Served] = deque(maxlen=MOST_KEPT)

    @property
    def in_flight(self) -> int:
        return len(self._open)

    def begin(self, request: Request) -> Record:
        record = Record(self, request)
        self._open[record] = None
        return record

    def end(self, record: Record, served: Served) -> None:
        del self._open[record]
        self._ended.append(served)

    def under_way(self) -> list[UnderWay]:
        """Those that have not ended, the newest first."""
        return [record.so_far() for record in islice(reversed(self._open), MOST_KEPT)]

    def take(self) -> list[Served]:
        """Those that have ended since the last call."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def keep(self, served: Sequence[Served]) -> None:
        """What was taken could not be told."""
        self._ended = deque([*served, *self._ended], maxlen=MOST_KEPT)


class Record:
    """One request, from now on."""

    def __init__(self, recorder: Recorder, request: Request) -> None:
        self._recorder = recorder
        self._prompt_tokens = len(request.prompt_token_ids)
        self._arrived_s = time.time()
        self._began = time.perf_counter()
        self._first = self._last = 0.0
        self._tokens = self._cached = 0
        self._open = True

    def heard(self, delta: TokenDelta) -> None:
        """Of it, in its order."""
        if delta.token_ids:
            self._last = time.perf_counter()
            if not self._tokens:
                self._first, self._cached = self._last, delta.num_cached_tokens
            self._tokens += len(delta.token_ids)
        if delta.finish is not None:
            self.end(delta.finish.reason)

    def so_far(self) -> UnderWay:
        return UnderWay(time.perf_counter() - self._began, self._prompt_tokens, self._cached, self._tokens)

    def end(self, reason: FinishReason) -> None:
        """Only the first end counts."""
        if not self._open:
            return
        self._open = False
        self._recorder.end(
            self,
            Served(
                arrived_s=self._arrived_s,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached,
                output_tokens=self._tokens,
                ttft_ms=(self._first - self._began) * 1e3 if self._tokens else None,
                tpot_ms=(self._last - self._first) * 1e3 / (self._tokens - 1) if self._tokens > 1 else None,
                ended=reason,
            ),
        )
