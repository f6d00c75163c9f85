"""The hand-off as two state machines without clock, threads or I/O: an event and the time in, instructions out.

    giver    offered ─┐                        ┌─ committed ─┐
                      ├─ transferring ─────────┤             ├─ (draining) ─ released
    taker   reserved ─┘                        └─ aborted,  ─┘
                                                  expired, failed

Phases say who holds blocks, outcomes how it ended. Whatever happens, a machine that was given blocks gives them back by
exactly one Release. Between the decision to end and Release it drains while something may still touch the blocks: at
the giver a thread that reads them, at the taker a transport that writes them.

KV streams. The giver's blocks belong to the transfer before their KV is computed (Opened); what has become final
(Written) is sealed in pieces and named to the taker, which pulls all that has queued since its last pull. Complete
follows the last piece. Nothing is ever half done: the taker commits when it knows that it has heard of every piece, all
are verified and its transport is quiet, and only then tells the giver; a Committed that gets lost costs the giver one
lease, never the taker its KV. A link keeps order, so a piece out of turn means that one was lost: that is a failure.

Leases. The giver ends a transfer that was not offered-and-asked-for or renewed within `lease_s`. The taker's lease runs
from the sending of the last renewal that was answered, so it always ends before the giver's. A taker that still waits
for its own blocks says so (Expect) and renews like any other, so that an offer lives as long as somebody will take it;
so does one that waits for the giver to compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from msgspec import Struct


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


class Opened(Struct, frozen=True):
    """Giver: blocks for the KV of so many tokens now belong to the transfer. Its owner only adds KV to them."""

    num_tokens: int


class Written(Struct, frozen=True):
    """Giver: more KV is final."""


class Computed(Struct, frozen=True):
    """Giver: all KV is final, and Written has said so."""


class SealEnded(Struct, frozen=True):
    """Giver: the thread that read the blocks has ended; `error` if it has sealed nothing."""

    error: str | None = None


class Expected(Struct, frozen=True):
    """Giver: a taker will ask once it has blocks."""


class Wanted(Struct, frozen=True):
    start_token: int


class ReadStarted(Struct, frozen=True):
    """Giver: a transport on this side reads the blocks. Only while `may_read`."""


class ReadEnded(Struct, frozen=True): ...


class Renewal(Struct, frozen=True):
    """Giver: the taker lives. Taker: the giver has answered the renewal sent at `sent_at`."""

    sent_at: float


class CommitReceived(Struct, frozen=True): ...


class CancelReceived(Struct, frozen=True):
    reason: str


class Withdraw(Struct, frozen=True):
    """The giver has nothing to offer (any more): said by its owner, or heard from it. ABORTED when the owner has
    dropped the request, anything else when it is to be served in another way. `finished`: dropped because it ended
    there, so that nothing is left to be done for it."""

    reason: str
    outcome: Outcome = Outcome.ABORTED
    finished: bool = False


class LinkLost(Struct, frozen=True):
    reason: str


class Expect(Struct, frozen=True):
    """Taker: blocks will be reserved; Begin follows."""


class Begin(Struct, frozen=True):
    """Taker: blocks are reserved."""


class OfferReceived(Struct, frozen=True):
    """Taker: the giver holds what was asked for, and will name its pieces."""


class SealedReceived(Struct, frozen=True):
    """Taker: pieces first .. first + count - 1 can be pulled."""

    first: int
    count: int


class CompleteReceived(Struct, frozen=True):
    """Taker: there are so many pieces and no more."""

    num_pieces: int


class Unusable(Struct, frozen=True):
    """Taker: what is offered is not what was asked for."""

    reason: str


class PullBegan(Struct, frozen=True):
    """Taker: a pull has had its turn at the transport; from here to its end a stall is a failure."""


class PieceVerified(Struct, frozen=True):
    index: int


class PullEnded(Struct, frozen=True):
    """Taker: the transport is quiet: it returned, failed with `error`, or was stopped."""

    error: str | None = None


class CancelRequested(Struct, frozen=True):
    """Taker: its owner has given up."""


class Tick(Struct, frozen=True):
    """Time has passed; due at `wake_at` at the latest."""


Event: TypeAlias = (
    Opened | Written | Computed | SealEnded | Expected | Wanted | ReadStarted | ReadEnded | Renewal | CommitReceived
    | CancelReceived | Withdraw | LinkLost | Expect | Begin | OfferReceived | SealedReceived | CompleteReceived
    | Unusable | PullBegan | PieceVerified | PullEnded | CancelRequested | Tick
)  # fmt: skip

# --- instructions ----------------------------------------------------------------------------------------------------


class SendOffer(Struct, frozen=True):
    """Giver: say where the blocks are."""


class Seal(Struct, frozen=True):
    """Giver: make pieces of what is final and not sealed, then SealEnded."""


class SendSealed(Struct, frozen=True):
    """Giver: name the pieces made last."""


class SendComplete(Struct, frozen=True): ...


class SendRenewed(Struct, frozen=True):
    sent_at: float


class SendWithdrawn(Struct, frozen=True):
    reason: str
    outcome: Outcome
    finished: bool = False


class SendExpect(Struct, frozen=True): ...


class SendWant(Struct, frozen=True): ...


class SendRenew(Struct, frozen=True):
    sent_at: float


class SendCommitted(Struct, frozen=True): ...


class SendCancel(Struct, frozen=True):
    reason: str


class StartPull(Struct, frozen=True):
    """Taker: run the transport over pieces first .. stop - 1; PieceVerified as they come, then PullEnded."""

    first: int
    stop: int


class StopPull(Struct, frozen=True):
    """Taker: make the transport quiet; PullEnded follows when it is."""


class Release(Struct, frozen=True):
    """The blocks go back to their owner: nothing of this transfer touches them from now on."""

    outcome: Outcome
    reason: str


Instruction: TypeAlias = (
    SendOffer | Seal | SendSealed | SendComplete | SendRenewed | SendWithdrawn | SendExpect | SendWant | SendRenew
    | SendCommitted | SendCancel | StartPull | StopPull | Release
)  # fmt: skip

# --- giver -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class GiverTransfer:
    """Opened may come before, between or after Expected and Wanted; Written and Computed follow it. A transfer that
    ended before it was opened releases the blocks as soon as they come. Once ended it answers whoever still asks, so
    keep it for as long as that may be."""

    lease_s: float
    phase: Phase = Phase.NEW
    outcome: Outcome | None = None
    reason: str = ""
    lease_until: float = math.inf
    finished: bool = False
    awaited: bool = False
    """A taker has announced itself or asked."""
    start_token: int | None = None
    num_tokens: int | None = None
    unsealed: bool = False
    """KV has become final since the last Seal."""
    sealing: bool = False
    computed: bool = False
    complete_sent: bool = False
    readers: int = 0
    """Threads that read the blocks, the sealing one included."""

    @property
    def wake_at(self) -> float:
        """When Tick is due; infinity when nothing is."""
        return math.inf if self.phase in _ENDED else self.lease_until

    @property
    def may_read(self) -> bool:
        return self.phase is Phase.TRANSFERRING

    def handle(self, event: Event, now: float) -> list[Instruction]:
        match event:
            case Opened(num_tokens):
                return self._on_opened(num_tokens, now)
            case Expected():
                return self._on_asked(now)
            case Wanted(start_token):
                return self._on_asked(now) or self._on_wanted(start_token)
            case Written():
                self.unsealed = True
                return self._go_on()
            case Computed():
                self.computed = True
                return self._go_on()
            case SealEnded(error):
                return self._on_seal_ended(error)
            case Renewal(sent_at):
                return self._on_renewal(sent_at, now)
            case ReadStarted():
                self._renew(now)
                self.readers += 1
            case ReadEnded():
                return self._on_read_ended()
            case CommitReceived():
                return self._end(Outcome.COMMITTED, "") if self.complete_sent else []
            case CancelReceived(reason):
                return self._end(Outcome.ABORTED, reason)
            case Withdraw(reason, outcome, finished):
                return self._end(outcome, reason, tell=True, finished=finished)
            case LinkLost(reason):
                return self._end(Outcome.FAILED, reason)
            case Tick() if now >= self.wake_at:
                return self._end(Outcome.EXPIRED, f"not asked for or renewed within {self.lease_s:g} s", tell=True)
        return []

    def _on_opened(self, num_tokens: int, now: float) -> list[Instruction]:
        assert self.num_tokens is None, "a transfer is opened once"
        self.num_tokens = num_tokens
        if self.phase in _ENDED:  # it has no readers yet, so it is not draining
            return self._release()
        if self.phase is Phase.NEW:
            self.phase = Phase.OFFERED
            self._renew(now)
            return []
        return self._transfer()

    def _on_asked(self, now: float) -> list[Instruction]:
        if self.phase in _ENDED:
            return [self._epitaph()]
        self.awaited = True
        self._renew(now)
        return []

    def _on_wanted(self, start_token: int) -> list[Instruction]:
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
        assert self.num_tokens is not None
        if not 0 <= self.start_token <= self.num_tokens:
            reason = f"token {self.start_token} was asked for of a prompt of {self.num_tokens}"
            return self._end(Outcome.FAILED, reason, tell=True)
        self.phase = Phase.TRANSFERRING
        return [SendOffer(), *self._go_on()]

    def _go_on(self) -> list[Instruction]:
        if self.phase is not Phase.TRANSFERRING or self.sealing:
            return []
        if self.unsealed:
            self.unsealed, self.sealing = False, True
            self.readers += 1
            return [Seal()]
        if self.computed and not self.complete_sent:
            self.complete_sent = True
            return [SendComplete()]
        return []

    def _on_seal_ended(self, error: str | None) -> list[Instruction]:
        self.sealing = False
        ended = self._on_read_ended()
        if self.phase in _ENDED:
            return ended
        if error is not None:
            return self._end(Outcome.FAILED, error, tell=True)
        return [SendSealed(), *self._go_on()]

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
        return [Release(self.outcome, self.reason)] if self.num_tokens is not None else []

    def _epitaph(self) -> SendWithdrawn:
        """For who asks after the end. What was committed once can't be taken again."""
        if self.outcome is None or self.outcome is Outcome.COMMITTED:
            return SendWithdrawn("it was committed before", Outcome.FAILED)
        return SendWithdrawn(f"already {self.outcome}: {self.reason}", self.outcome, self.finished)


# --- taker -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TakerTransfer:
    """`deadline` is on the clock of `now`. `stall_s` bounds the time from PullBegan to the first verified piece,
    between two of them and to the end of the pull; while nothing is pulled, leases alone decide. Renewals go out four
    times a lease. Expect may be left out; a transfer that ends before Begin has no blocks to release."""

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
    complete: bool = False
    num_pieces: int = 0
    """That the giver has named."""
    num_pulled: int = 0
    """Of these, the ones that the transport was told to bring."""
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
            case OfferReceived() if self.phase is Phase.RESERVED:
                self.phase = Phase.TRANSFERRING
            case SealedReceived(first, count) if self.phase is Phase.TRANSFERRING:
                return self._on_sealed(first, count)
            case CompleteReceived(num_pieces) if self.phase is Phase.TRANSFERRING:
                return self._on_complete(num_pieces)
            case Unusable(reason):
                return self._end(Outcome.FAILED, reason)
            case PullBegan():
                self.stalled_at = now + self.stall_s
            case PieceVerified(index):
                self.verified.add(index)
                self.stalled_at = now + self.stall_s
            case PullEnded(error):
                return self._on_pull_ended(error)
            case Renewal(sent_at):
                self.lease_until = max(self.lease_until, min(sent_at, now) + self.lease_s)
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

    def _on_sealed(self, first: int, count: int) -> list[Instruction]:
        if first < self.num_pieces:  # doubled
            return []
        if first > self.num_pieces or self.complete:
            return self._end(Outcome.FAILED, f"piece {first} was named when it was the turn of {self.num_pieces}")
        self.num_pieces += count
        return self._go_on()

    def _on_complete(self, num_pieces: int) -> list[Instruction]:
        if num_pieces != self.num_pieces:
            return self._end(Outcome.FAILED, f"of {num_pieces} pieces {self.num_pieces} were named")
        self.complete = True
        return self._go_on()

    def _go_on(self) -> list[Instruction]:
        if self.pulling:
            return []
        if self.num_pulled < self.num_pieces:
            first, self.num_pulled, self.pulling = self.num_pulled, self.num_pieces, True
            return [StartPull(first, self.num_pulled)]
        if not self.complete:
            return []
        self.outcome = Outcome.COMMITTED
        return [SendCommitted(), *self._release()]

    def _on_pull_ended(self, error: str | None) -> list[Instruction]:
        self.pulling, self.stalled_at = False, math.inf
        missing = self.num_pulled - len(self.verified)
        if error is None and missing:
            error = f"{missing} of {self.num_pulled} pieces did not arrive"
        return self._go_on() if error is None else self._end(Outcome.FAILED, error)

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
