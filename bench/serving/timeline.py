"""What happened to one request, as the client saw it. All times are seconds on one monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Timeline:
    """`scheduled` is when the arrival process wanted the request sent, `dispatched` when the generator got to it, and
    `start` when it was sent; `start - dispatched` is the wait for a slot under --max-concurrency.

    The definitions are those of `vllm bench serve`: latencies count from `start`; TTFT ends with the first chunk that
    carries text, E2EL with the last chunk that carries text or a finish reason (not with the usage chunk or [DONE]).
    """

    index: int
    scheduled: float = 0.0
    dispatched: float = 0.0
    start: float = 0.0
    chunks: list[float] = field(default_factory=list)
    """When each chunk with text came, or with token ids, for a request that asks for them."""
    end: float = 0.0
    finished: bool = False
    error: str | None = None
    """Why it failed; None while it runs and after it succeeded."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """From the server's usage; None when it sent none."""
    cached_tokens: int = 0
    text: str = ""

    @property
    def completed(self) -> bool:
        return self.finished and self.error is None

    @property
    def output_tokens(self) -> int:
        """The server's count, or else one per chunk, which undercounts where a chunk carries several tokens."""
        return len(self.chunks) if self.completion_tokens is None else self.completion_tokens

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def ttft(self) -> float:
        """An empty answer counts as given when it finished."""
        return (self.chunks[0] if self.chunks else self.end) - self.start

    @property
    def tpot(self) -> float | None:
        """(E2EL - TTFT) / (output tokens - 1); None when there is no second token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Gaps between chunks; one chunk may carry several tokens."""
        return [b - a for a, b in pairwise(self.chunks)]

    def gaps_within(self, began: float, ended: float) -> list[float]:
        """Those that lie in this time as a whole."""
        return [b - a for a, b in pairwise(self.chunks) if began <= a and b <= ended]

    @property
    def client_queue_time(self) -> float:
        return self.start - self.dispatched

    @property
    def dispatch_lag(self) -> float:
        return self.dispatched - self.scheduled
