"""What the simulator of our own system keeps of each request and of each lane."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from placement.layout import Lane


class At(Enum):
    """Where a request is. HELD: prefilled, its KV not yet where it decodes; JOINED: in the next step that decodes."""

    ROUTER = auto()
    WAITING = auto()
    PROMPT = auto()
    HELD = auto()
    JOINED = auto()
    DECODING = auto()
    DONE = auto()


DECODES_IT = (At.JOINED, At.DECODING)
"""Where a request is on its decode lane, if it was prefilled elsewhere."""


@dataclass
class Request:
    """`target`: tokens to compute before the next can be drawn; `sent_ms`: when what was sent so far has arrived."""

    index: int
    prompt: int
    output: int
    cached: int
    emitted: int = 0
    target: int = 0
    computed: int = 0
    at: At = At.ROUTER
    reserved: bool = False
    sent_ms: float = 0.0
    attempt: int = 0
    joined_at: int = 0
    ends_at: int = 0
    p: int = -1
    d: int = -1


@dataclass
class StepClock:
    """A step that takes `work_ms` alone, the share `prompts` of it for prompts. `done_ms` of it were done at
    `since_ms`; from then on it takes `slowdown` times as long."""

    work_ms: float = 0.0
    prompts: float = 0.0
    done_ms: float = 0.0
    since_ms: float = 0.0
    slowdown: float = 1.0

    def slowed(self, now_ms: float, slowdown: float) -> float:
        """From now on; returns when it ends."""
        self.done_ms += (now_ms - self.since_ms) / self.slowdown
        self.since_ms, self.slowdown = now_ms, slowdown
        return now_ms + (self.work_ms - self.done_ms) * slowdown


@dataclass
class LaneState:
    """`steps` counts those that decode. `running`: chunks of the step in flight, None between steps; `computing`: the
    share of prompts in it, or in the last if the next may begin at this instant, None if it does not compute. `live`
    requests are to decode here, of which the router knows: they come from it, and end with an answer that it passes on.
    `pending` tokens of prompts are to be computed; `told_*`: as the router knows them, and for how many more tokens
    there is memory."""

    index: int
    spec: Lane
    waiting: deque[Request] = field(default_factory=deque)
    incoming: deque[Request] = field(default_factory=deque)
    prompts: list[Request] = field(default_factory=list)
    joined: list[Request] = field(default_factory=list)
    decoding: list[Request] = field(default_factory=list)
    running: list[tuple[Request, int]] | None = None
    began_ms: float = 0.0
    step: StepClock = field(default_factory=StepClock)
    computing: float | None = None
    busy_ms: float = 0.0
    kv_used: float = 0.0
    context: float = 0.0
    steps: int = 0
    seats: int = 0
    live: int = 0
    pending: int = 0
    told_pending: int = 0
    told_free: int = 0
    next_report_ms: float = 0.0
    down: int = 0
    version: int = 0
    starting: bool = False
    open: bool = True
    """Whether it may get requests; one that drains does not."""

    @property
    def routed(self) -> bool:
        """Whether it gets requests."""
        return self.open and not self.down

    @property
    def growth(self) -> float:
        return len(self.decoding) * self.spec.speculation.acceptance_length

    def report(self, now_ms: float, every_ms: float) -> None:
        """What it had to do up to now, if a report of it was due since the last time."""
        phase = self.spec.report_phase
        if now_ms >= self.next_report_ms:
            self.told_pending = self.pending
            self.told_free = math.floor(self.spec.kv_tokens - self.kv_used + 0.5)
            if every_ms:
                self.next_report_ms = (math.floor(now_ms / every_ms + phase) + 1 - phase) * every_ms

    def has_room(self, request: Request) -> bool:
        needed = self.kv_used + self.growth + request.target + self.spec.speculation.acceptance_length
        return self.seats < self.spec.max_sequences and needed <= self.spec.kv_tokens

    def take(self, request: Request) -> None:
        self.kv_used += request.target
        self.seats += 1

    def held_by(self, request: Request) -> float:
        return request.target + self.spec.speculation.acceptance_length * (self.steps - request.joined_at)

    def emitted_by(self, request: Request) -> int:
        return math.floor(self.spec.speculation.acceptance_length * (self.steps - request.joined_at))
