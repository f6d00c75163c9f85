"""What a worker has moved, for its metrics."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from kv_transfer.states import Outcome


class Pull(NamedTuple):
    """What one job of a transport brought."""

    began: float
    ended: float
    nbytes: int
    """On the wire."""
    decoding: float
    """Seconds of it."""
    at_once: bool
    """It was here already, so that the times say nothing of the link."""


class Times(NamedTuple):
    """Of one transfer, in seconds; TransferCounters says what each is."""

    gap: float
    wait: float
    wire: float
    overlap: float
    decode: float


@dataclass(slots=True)
class TransferCounters:
    """Monotonic since start. Bytes and seconds are those of committed transfers, counted where they are taken unless
    said otherwise. `fallbacks` counts transports that could not be used or failed."""

    committed: int = 0
    expired: int = 0
    aborted: int = 0
    failed: int = 0
    fallbacks: int = 0
    bytes: int = 0
    """Of KV, as it lies in the cache."""
    wire_bytes: Counter[str] = field(default_factory=Counter)
    """What they were on their way, by the codec of the transfer."""
    seconds: float = 0.0
    """From the KV being computed and wanted to the commit: what a hand-off adds to the gap after the first token."""
    wait_seconds: float = 0.0
    """From asking for the KV to the first piece: queueing and computing at the giver."""
    wire_seconds: float = 0.0
    """While pieces were pulled."""
    overlap_seconds: float = 0.0
    """Of these, while the prompt was still being computed."""
    encode_seconds: float = 0.0
    """Counted where they are given."""
    decode_seconds: float = 0.0
    """Part of wire_seconds."""

    def add(self, times: Times) -> None:
        self.seconds += times.gap
        self.wait_seconds += times.wait
        self.wire_seconds += times.wire
        self.overlap_seconds += times.overlap
        self.decode_seconds += times.decode

    def count(self, outcome: Outcome) -> None:
        match outcome:
            case Outcome.COMMITTED:
                self.committed += 1
            case Outcome.EXPIRED:
                self.expired += 1
            case Outcome.ABORTED:
                self.aborted += 1
            case Outcome.FAILED:
                self.failed += 1


@dataclass(slots=True)
class Stopwatch:
    """The times of one transfer at the taker, by time.monotonic()."""

    wanted: float = 0.0
    first_piece: float = 0.0
    began: float = math.inf
    """Of the pull under way, as the next two."""
    nbytes: int = 0
    decoding: float = 0.0
    last_piece: float = 0.0
    computed: float = 0.0
    """When the giver had all KV, or we wanted it if that was later."""
    pulls: list[Pull] = field(default_factory=list)

    def pull_began(self) -> None:
        """Anew, if another transport takes over."""
        self.began, self.nbytes, self.decoding = time.monotonic(), 0, 0.0

    def verified(self, nbytes: int) -> None:
        """A piece is here, of so many bytes on the wire."""
        self.last_piece = time.monotonic()
        self.nbytes += nbytes

    def decoded(self, seconds: float) -> None:
        self.decoding += seconds

    def pull_ended(self, *, at_once: bool = False) -> None:
        if self.began < self.last_piece:
            self.pulls.append(Pull(self.began, self.last_piece, self.nbytes, self.decoding, at_once))
        self.began = math.inf

    def complete(self, age: float) -> None:
        """We hear that the giver had all KV so long ago."""
        self.computed = max(self.wanted, time.monotonic() - age)

    def times(self) -> Times:
        """It has committed."""
        now = time.monotonic()
        return Times(
            gap=now - self.computed,
            wait=(self.first_piece or now) - self.wanted,
            wire=sum(pull.ended - pull.began for pull in self.pulls),
            overlap=sum(max(0.0, min(pull.ended, self.computed) - pull.began) for pull in self.pulls),
            decode=sum(pull.decoding for pull in self.pulls),
        )
