"""The hand-off as two state machines without clock, threads or I/O: an event and the time in, instructions out.

    giver    offered ─┐                        ┌─ committed ─┐
                      ├─ transferring ─────────┤             ├─ (draining) ─ released
    taker   reserved ─┘                        └─ aborted,  ─┘
                                                  expired, failed

Phases say who holds blocks, outcomes how it ended. Whatever happens, a machine that was given blocks gives them back by
exactly one Release. Between the decision to end and Release it drains while something may still touch the blocks: at
the giver a thread that reads them, at the taker a transport that writes them.

Nothing is ever half done. The taker commits when every piece is verified and its transport is quiet, and only then
tells the giver; a Committed that gets lost costs the giver one lease, never the taker its KV.

Leases. The giver ends a transfer that was not offered-and-asked-for or renewed within `lease_s`. The taker's lease runs
from the sending of the last renewal that was answered, so it always ends before the giver's. A taker that still waits
for its own blocks says so (Expect) and renews like any other, so that an offer lives as long as somebody will take it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias


class Phase(StrEnum):
    NEW = "new"
    OFFERED = "offered"
    """Giver: blocks held, nobody has asked."""
    EXPECTING = "expecting"
    """The taker has announced itself and waits for blocks of its own."""
    RESERVED = "reserved"
    """The taker holds blocks and has asked; there is no offer yet."""
    TRANSFERRING = "transferring"
    DRAINING = "draining"
    RELEASED = "released"


class Outcome(StrEnum):
    COMMITTED = "committed"
    EXPIRED = "expired"
    ABORTED = "aborted"
    """Cancelled by the taker or withdrawn by the giver."""
    FAILED = "failed"


_ENDED = (Phase.DRAINING, Phase.RELEASED)

# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offered:
    """Giver: blocks with finished KV now belong to the transfer."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Giver: a taker will ask once it has blocks."""


@dataclass(frozen=True, slots=True)
class Wanted:
    start_token: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Giver: the thread that read the blocks for the manifest has ended; `error` if it has no manifest."""

    error: str | None = None


@dataclass(frozen=True, slots=True)
class ReadStarted:
    """Giver: a transport on this side reads the blocks. Only while `may_read`."""


@dataclass(frozen=True, slots=True)
class ReadEnded:
    pass


@dataclass(frozen=True, slots=True)
class Renewal:
    """Giver: the taker lives. Taker: the giver has answered the renewal sent at `sent_at`."""

    sent_at: float


@dataclass(frozen=True, slots=True)
class CommitReceived:
    pass


@dataclass(frozen=True, slots=True)
class CancelReceived:
    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The giver has nothing to offer (any more): said by its owner, or heard from it. ABORTED when the owner has
    dropped the request, anything else when it is to be served in another way. `finished`: dropped because it ended
    there, so that nothing is left to be done for it."""

    reason: str
    outcome: Outcome = Outcome.ABORTED
    finished: bool = False


@dataclass(frozen=True, slots=True)
class LinkLost:
    reason: str


@dataclass(frozen=True, slots=True)
class Expect:
    """Taker: blocks will be reserved; Begin follows."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Taker: blocks are reserved."""


@dataclass(frozen=True, slots=True)
class OfferReceived:
    num_pieces: int


@dataclass(frozen=True, slots=True)
class OfferUnusable:
    """Taker: what is offered is not what was asked for."""

    reason: str


@dataclass(frozen=True, slots=True)
class PullBegan:
    """Taker: the transfer has had its turn at the transport; from here on a stall is a failure."""


@dataclass(frozen=True, slots=True)
class PieceVerified:
    index: int


@dataclass(frozen=True, slots=True)
class PullEnded:
    """Taker: the transport is quiet: it returned, failed with `error`, or was stopped."""

    error: str | None = None


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Taker: its owner has given up."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at `wake_at` at the latest."""


Event: TypeAlias = (
    Offered | Expected | Wanted | Prepared | ReadStarted | ReadEnded | Renewal | CommitReceived | CancelReceived
    | Withdraw | LinkLost | Expect | Begin | OfferReceived | OfferUnusable | PullBegan | PieceVerified | PullEnded
    | CancelRequested | Tick
)  # fmt: skip

# --- instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    """Giver: make the manifest, then Prepared."""

    start_token: int


@dataclass(frozen=True, slots=True)
class SendOffer:
    pass


@dataclass(frozen=True, slots=True)
class SendRenewed:
    sent_at: float


@dataclass(frozen=True, slots=True)
class SendWithdrawn:
    reason: str
    outcome: Outcome
    finished: bool = False


@dataclass(frozen=True, slots=True)
class SendExpect:
    pass


@dataclass(frozen=True, slots=True)
class SendWant:
    pass


@dataclass(frozen=True, slots=True)
class SendRenew:
    sent_at: float


@dataclass(frozen=True, slots=True)
class SendCommitted:
    pass


@dataclass(frozen=True, slots=True)
class SendCancel:
    reason: str


@dataclass(frozen=True, slots=True)
class StartPull:
    """Taker: run the transport; PieceVerified as they come, then PullEnded."""


@dataclass(frozen=True, slots=True)
class StopPull:
    """Taker: make the transport quiet; PullEnded follows when it is."""


@dataclass(frozen=True, slots=True)
class Release:
    """The blocks go back to their owner: nothing of this transfer touches them from now on."""

    outcome: Outcome
    reason: str


Instruction: TypeAlias = (
    Prepare | SendOffer | SendRenewed | SendWithdrawn | SendExpect | SendWant | SendRenew | SendCommitted | SendCancel
    | StartPull | StopPull | Release
)  # fmt: skip

# --- giver -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class GiverTransfer:
    """Offered may come before, between or after Expected and Wanted. A transfer that ended before it was offered
    releases the blocks as soon as they come. Once ended it answers whoever still asks, so keep it for as long as that
    may be."""

    lease_s: float
    phase: Phase = Phase.NEW
    outcome: Outcome | None = None
    reason: str = ""
    lease_until: float = math.inf
    finished: bool = False
    awaited: bool = False
    """A taker has announced itself or asked."""
    start_token: int | None = None
    offered: bool = False
    offer_sent: bool = False
    readers: int = 0

    @property
    def wake_at(self) -> float:
        """When Tick is due; infinity when nothing is."""
        return math.inf if self.phase in _ENDED else self.lease_until

    @property
    def may_read(self) -> bool:
        return self.phase is Phase.TRANSFERRING and self.offer_sent

    def handle(self, event: Event, now: float) -> list[Instruction]:
        match event:
            case Offered():
                return self._on_offered(now)
            case Expected():
                return self._on_expected(now)
            case Wanted(start_token):
                return self._on_wanted(start_token, now)
            case Renewal(sent_at):
                return self._on_renewal(sent_at, now)
            case Prepared(error):
                return self._on_prepared(error)
            case ReadStarted():
                self._renew(now)
                self.readers += 1
            case ReadEnded():
                return self._on_read_ended()
            case CommitReceived():
                return self._end(Outcome.COMMITTED, "") if self.offer_sent else []
            case CancelReceived(reason):
                return self._end(Outcome.ABORTED, reason)
            case Withdraw(reason, outcome, finished):
                return self._end(outcome, reason, tell=True, finished=finished)
            case LinkLost(reason):
                return self._end(Outcome.FAILED, reason)
            case Tick() if now >= self.wake_at:
                return self._end(Outcome.EXPIRED, f"not asked for or renewed within {self.lease_s:g} s", tell=True)
        return []

    def _on_offered(self, now: float) -> list[Instruction]:
        assert not self.offered, "a transfer is offered once"
        self.offered = True
        if self.phase in _ENDED:  # it has no readers yet, so it is not draining
            return self._release()
        if self.phase is Phase.NEW:
            self.phase = Phase.OFFERED
            self._renew(now)
            return []
        return self._transfer()

    def _on_expected(self, now: float) -> list[Instruction]:
        if self.phase in _ENDED:
            return [self._epitaph()]
        self.awaited = True
        self._renew(now)
        return []

    def _on_wanted(self, start_token: int, now: float) -> list[Instruction]:
        if self.phase in _ENDED:
            return [self._epitaph()]
        self.awaited = True
        self._renew(now)
        if self.start_token is not None:
            return []
        self.start_token = start_token
        if self.phase is Phase.OFFERED:
            return self._transfer()
        self.phase = Phase.RESERVED
        return []

    def _on_renewal(self, sent_at: float, now: float) -> list[Instruction]:
        if self.phase in _ENDED:
            return [self._epitaph()]
        self._renew(now)
        return [SendRenewed(sent_at)]

    def _transfer(self) -> list[Instruction]:
        assert self.start_token is not None
        self.phase = Phase.TRANSFERRING
        self.readers += 1
        return [Prepare(self.start_token)]

    def _on_prepared(self, error: str | None) -> list[Instruction]:
        ended = self._on_read_ended()
        if self.phase in _ENDED:
            return ended
        if error is not None:
            return self._end(Outcome.FAILED, error, tell=True)
        self.offer_sent = True
        return [SendOffer()]

    def _on_read_ended(self) -> list[Instruction]:
        assert self.readers > 0
        self.readers -= 1
        return self._release() if self.phase is Phase.DRAINING and not self.readers else []

    def _renew(self, now: float) -> None:
        self.lease_until = now + self.lease_s

    def _end(self, outcome: Outcome, reason: str, *, tell: bool = False, finished: bool = False) -> list[Instruction]:
        if self.phase in _ENDED:
            return []
        self.outcome, self.reason, self.finished = outcome, reason, finished
        said: list[Instruction] = [SendWithdrawn(reason, outcome, finished)] if tell and self.awaited else []
        if self.readers:
            self.phase = Phase.DRAINING
            return said
        return said + self._release()

    def _release(self) -> list[Instruction]:
        self.phase = Phase.RELEASED
        assert self.outcome is not None
        return [Release(self.outcome, self.reason)] if self.offered else []

    def _epitaph(self) -> SendWithdrawn:
        """For who asks after the end. What was committed once can't be taken again."""
        if self.outcome is None or self.outcome is Outcome.COMMITTED:
            return SendWithdrawn("it was committed before", Outcome.FAILED)
        return SendWithdrawn(f"already {self.outcome}: {self.reason}", self.outcome, self.finished)


# --- taker -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TakerTransfer:
    """`deadline` is on the clock of `now`. `stall_s` bounds the time from PullBegan to the first verified piece and
    between two of them. Renewals go out four times a lease. Expect may be left out; a transfer that ends before Begin
    has no blocks to release."""

    lease_s: float
    stall_s: float
    deadline: float
    phase: Phase = Phase.NEW
    outcome: Outcome | None = None
    reason: str = ""
    lease_until: float = math.inf
    renew_at: float = math.inf
    stalled_at: float = math.inf
    finished: bool = False
    reserved: bool = False
    pulling: bool = False
    num_pieces: int = 0
    verified: set[int] = field(default_factory=set)

    @property
    def wake_at(self) -> float:
        """When Tick is due; infinity when nothing is."""
        if self.phase in _ENDED:
            return math.inf
        return min(self.lease_until, self.renew_at, self.stalled_at, self.deadline)

    def handle(self, event: Event, now: float) -> list[Instruction]:
        if self.phase in _ENDED:
            return self._after_end(event)
        match event:
            case Expect():
                return self._on_expect(now)
            case Begin():
                return self._on_begin(now)
            case OfferReceived(num_pieces) if self.phase is Phase.RESERVED:
                self.phase, self.pulling, self.num_pieces = Phase.TRANSFERRING, True, num_pieces
                return [StartPull()]
            case OfferUnusable(reason) if self.phase is Phase.RESERVED:
                return self._end(Outcome.FAILED, reason)
            case PullBegan():
                self.stalled_at = now + self.stall_s
            case PieceVerified(index):
                self.verified.add(index)
                self.stalled_at = now + self.stall_s
            case PullEnded(error):
                return self._on_pull_ended(error)
            case Renewal(sent_at):
                self.lease_until = max(self.lease_until, sent_at + self.lease_s)
            case Withdraw(reason, outcome, finished):
                self.finished = finished
                return self._end(outcome, reason, tell=False)
            case LinkLost(reason):
                return self._end(Outcome.FAILED, reason, tell=False)
            case CancelRequested():
                return self._end(Outcome.ABORTED, "cancelled")
            case Tick():
                return self._on_tick(now)
        return []

    def _after_end(self, event: Event) -> list[Instruction]:
        if self.phase is Phase.DRAINING and isinstance(event, PullEnded):
            self.pulling = False
            return self._release()
        return []

    def _on_expect(self, now: float) -> list[Instruction]:
        self.phase = Phase.EXPECTING
        self._start_lease(now)
        return [SendExpect()]

    def _on_begin(self, now: float) -> list[Instruction]:
        if self.phase is Phase.NEW:  # a lease that runs already goes on: asking proves nothing about the giver
            self._start_lease(now)
        self.phase, self.reserved = Phase.RESERVED, True
        return [SendWant()]

    def _start_lease(self, now: float) -> None:
        self.lease_until, self.renew_at = now + self.lease_s, now + self.lease_s / 4

    def _on_pull_ended(self, error: str | None) -> list[Instruction]:
        self.pulling = False
        missing = self.num_pieces - len(self.verified)
        if error is None and missing:
            error = f"{missing} of {self.num_pieces} pieces did not arrive"
        if error is not None:
            return self._end(Outcome.FAILED, error)
        self.outcome = Outcome.COMMITTED
        return [SendCommitted(), *self._release()]

    def _on_tick(self, now: float) -> list[Instruction]:
        if now >= self.deadline:
            return self._end(Outcome.EXPIRED, "the deadline of the request has passed")
        if now >= self.lease_until:
            return self._end(Outcome.EXPIRED, f"the giver has not answered for {self.lease_s:g} s")
        if now >= self.stalled_at:
            return self._end(Outcome.FAILED, f"no piece arrived for {self.stall_s:g} s")
        if now >= self.renew_at:
            self.renew_at = now + self.lease_s / 4
            return [SendRenew(now)]
        return []

    def _end(self, outcome: Outcome, reason: str, *, tell: bool = True) -> list[Instruction]:
        self.outcome, self.reason = outcome, reason
        said: list[Instruction] = [SendCancel(reason)] if tell else []
        if self.pulling:
            self.phase = Phase.DRAINING
            return [*said, StopPull()]
        return said + self._release()

    def _release(self) -> list[Instruction]:
        self.phase = Phase.RELEASED
        assert self.outcome is not None
        return [Release(self.outcome, self.reason)] if self.reserved else []
