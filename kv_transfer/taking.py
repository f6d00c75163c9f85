"""One transfer at the taker: what its state machine says, carried out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from core.errors import LeaseExpired, TransferError
from core.tracing import record
from engine.kv_cache import Pool
from kv_transfer import messages, states
from kv_transfer.alarm import Alarm
from kv_transfer.coding import Coding
from kv_transfer.counters import Stopwatch, TransferCounters
from kv_transfer.messages import Complete, Offer, Piece, Renewed, Sealed, SequenceState
from kv_transfer.peers import OfTransfer, Peer
from kv_transfer.pieces import PIECE_BYTES, Coverage, Rows, Slots, oversized, piece_bytes, slots_of
from kv_transfer.states import Outcome, Phase, TakerTransfer
from kv_transfer.transports.base import PullJob

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Withdrawn(TransferError):
    """The giver has dropped the request. `finished`: it ended there and whoever asked for it has been told. Otherwise,
    as after every other failure, it is to be served in another way if anybody still wants it."""

    def __init__(self, message: str, *, finished: bool) -> None:
        super().__init__(message)
        self.finished = finished


class Taken(NamedTuple):
    """A committed transfer."""

    state: SequenceState
    exact: bool
    """Whether the KV is the giver's bit for bit. If not, nobody but this sequence may use it."""


@dataclass(frozen=True)
class Reservation:
    """Blocks of `pool` that belong to a transfer for the KV of tokens start_token .. num_tokens - 1."""

    pool: Pool
    rows: Rows
    block_ids: Sequence[int]
    start_token: int
    num_tokens: int

    @cached_property
    def slots(self) -> Slots:
        """Of the sequence, by token."""
        return slots_of(self.block_ids, self.pool.layout.block_size, self.num_tokens)


class Taking:
    """One transfer at the taker: feeds its machine and carries out what it says."""

    def __init__(
        self, transfer_id: str, peer: Peer, machine: TakerTransfer, counters: TransferCounters, trace: str = ""
    ) -> None:
        self._id = transfer_id
        self._peer = peer
        self._machine = machine
        self._counters = counters
        self._trace = trace
        self._began = time.monotonic()
        self._encode_s = 0.0
        self._reservation: Reservation | None = None
        self._giver_slots: Slots | None = None
        self._coverage: Coverage | None = None
        self._coding: Coding | None = None
        self._num_verified = 0
        """Pieces from the first on, as told to the giver."""
        self._pieces: list[Piece] = []
        self._state: SequenceState | None = None
        self._watch = Stopwatch()
        self._pulling: asyncio.Task[None] | None = None
        self._cause: TransferError | None = None
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._over = asyncio.Event()
        self._alarm = Alarm(lambda: self._feed(states.Tick()))

    async def run(self, reserved: asyncio.Future[Reservation]) -> Taken:
        self._peer.recipients[self._id] = self
        try:
            if not reserved.done():
                self._feed(states.Expect())
                await self._first(reserved)
            if not self._over.is_set():
                self._reservation = reserved.result()
                self._feed(states.Begin())
            await self._over.wait()
        except BaseException:  # cancelled, or there will be no blocks
            self._feed(states.CancelRequested())
            await self._quiet()
            raise
        finally:
            del self._peer.recipients[self._id]
            self._peer.transport.forget(self._id)
        if self._machine.outcome is not Outcome.COMMITTED or self._state is None:
            raise self._cause or self._failure()
        assert self._coding is not None
        return Taken(self._state, exact=not any(map(self._coding.is_framed, self._pieces)))

    async def _quiet(self) -> None:
        """The blocks may be freed when this returns, so a second cancellation can't cut it short."""
        while not self._over.is_set():
            try:
                await self._over.wait()
            except asyncio.CancelledError:
                continue

    async def _first(self, reserved: asyncio.Future[Any]) -> None:
        """Until it is done or the transfer over. It is left alone when this is cancelled."""
        over: asyncio.Future[Any] = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({reserved, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()

    # --- events ------------------------------------------------------------------------------------------------------

    def on_message(self, message: OfTransfer) -> None:
        if self._machine.outcome is not None:
            return
        match message:
            case Renewed(sent_at=sent_at):
                self._feed(states.Renewal(sent_at))
            case messages.Withdrawn(reason=reason, outcome=outcome, finished=finished):
                outcome = outcome if outcome is not Outcome.COMMITTED else Outcome.FAILED
                self._feed(states.Withdraw(reason, outcome, finished))
            case _:
                try:
                    self._on_named(message)
                except TransferError as error:
                    self._cause = error
                    self._feed(states.Unusable(error.message))

    def on_link_lost(self, reason: str) -> None:
        self._feed(states.LinkLost(reason))

    def _on_named(self, message: Offer | Sealed | Complete) -> None:
        """What follows writes where the giver says and reads a peer's memory, so nothing is taken on trust. A message
        that nobody asked for or that came before is none; one out of turn is the machine's to judge."""
        match message:
            case Offer() if self._reservation is not None and self._coverage is None:
                self._check(message, self._reservation)
                self._giver_slots = slots_of(message.block_ids, message.layout.block_size, message.num_tokens)
                self._coverage = Coverage(message.start_token, message.num_tokens, message.layout.num_layers)
                self._feed(states.OfferReceived())
            case Sealed(first=first, pieces=pieces) if self._coverage is not None:
                self._on_sealed(first, pieces, self._coverage)
            case Complete(num_pieces=num_pieces, state=state, age_s=age, encode_s=encode_s, last=last) if (
                self._coverage is not None
            ):
                if last:
                    self._on_sealed(num_pieces - len(last), last, self._coverage)
                if num_pieces == len(self._pieces) and not self._coverage.whole:
                    raise TransferError(f"the pieces of transfer {self._id} do not cover all of its KV")
                if not state.token_ids:
                    raise TransferError(f"transfer {self._id} comes without the token to go on from")
                self._state, self._encode_s = state, encode_s
                self._watch.complete(age)
                self._feed(states.CompleteReceived(num_pieces))

    def _on_sealed(self, first: int, pieces: list[Piece], coverage: Coverage) -> None:
        if first == len(self._pieces):
            rows = self._reservation.rows if self._reservation is not None else None
            if rows is not None and any(oversized(rows, piece) for piece in pieces):
                raise TransferError(f"a piece of transfer {self._id} is larger than {PIECE_BYTES} bytes")
            if not all(coverage.add(piece) for piece in pieces):
                raise TransferError(f"the pieces of transfer {self._id} cover a part twice, or one it has not")
            self._pieces += pieces
            self._watch.first_piece = self._watch.first_piece or time.monotonic()
        self._feed(states.SealedReceived(first, len(pieces)))

    def _check(self, offer: Offer, reservation: Reservation) -> None:
        assert self._coding is not None
        layout, giver = offer.layout, self._peer.giver
        start, stop = reservation.start_token, reservation.num_tokens
        reservation.pool.layout.check_same_cache(layout)
        if (offer.start_token, offer.num_tokens) != (start, stop):
            raise TransferError(
                f"transfer {self._id} holds tokens {offer.start_token} to {offer.num_tokens} at the giver, "
                f"{start} to {stop} were asked for; the two sides disagree about the prompt"
            )
        if offer.codec != self._coding.codec:
            raise TransferError(
                f"transfer {self._id} is given in codec {offer.codec}, {self._coding.codec} was asked for"
            )
        blocks = offer.block_ids
        fits = len(blocks) == -(-offer.num_tokens // layout.block_size)
        if layout != giver.layout or not fits or not all(0 <= block < giver.num_blocks for block in blocks):
            raise TransferError(f"the offer of transfer {self._id} does not fit the pool that the giver announced")

    def _start_pull(self, job: PullJob) -> None:
        transport = self._peer.transport
        try:
            at_once = transport.pull_at_once(job)
        except Exception as error:  # noqa: BLE001  it fails this transfer, as it would in a task
            self._watch.pull_ended()
            self._pull_returned(error)
            return
        if at_once:
            self._watch.pull_ended(at_once=True)
            self._pull_returned(None)
        else:
            self._pulling = asyncio.create_task(transport.pull(job))
            self._pulling.add_done_callback(self._pull_ended)

    def _pull_ended(self, pulling: asyncio.Task[None]) -> None:
        self._watch.pull_ended()
        if pulling.cancelled():
            self._feed(states.PullEnded("stopped"))
        else:
            self._pull_returned(pulling.exception())

    def _pull_returned(self, error: BaseException | None) -> None:
        if error is None:
            self._feed(states.PullEnded())
            return
        if not isinstance(error, TransferError):
            logger.error("the transport of transfer %s failed", self._id, exc_info=error)
            error = TransferError(f"transfer {self._id}: {type(error).__name__}: {error}")
        if self._machine.phase is Phase.TRANSFERRING:
            self._cause = error
        self._feed(states.PullEnded(str(error)))

    # --- instructions ------------------------------------------------------------------------------------------------

    def _feed(self, event: states.Event) -> None:
        for instruction in self._machine.handle(event, time.monotonic()):
            self._carry_out(instruction)
        self._alarm.set(self._machine.wake_at)
        if self._machine.phase is Phase.RELEASED and not self._over.is_set():
            self._over.set()
            if self._machine.outcome is Outcome.COMMITTED:
                self._loop.call_soon(self._wrap_up)  # who waits for the KV goes first
            else:
                self._count()

    def _carry_out(self, instruction: states.Instruction) -> None:
        send = self._peer.link.send
        match instruction:
            case states.SendExpect():
                send(messages.Expect(self._id))
            case states.SendWant():
                assert self._reservation is not None
                self._watch.wanted = time.monotonic()
                self._coding = Coding(self._peer.next_codec(), self._reservation.pool.layout)
                send(messages.Want(self._id, self._reservation.start_token, self._coding.codec))
            case states.SendRenew(sent_at):
                send(messages.Renew(self._id, sent_at))
            case states.SendCommitted():
                pass  # by _wrap_up
            case states.SendCancel(reason):
                send(messages.Cancel(self._id, reason))
            case states.StartPull(first, stop):
                self._start_pull(self._job(first, stop))
            case states.StopPull():
                assert self._pulling is not None
                self._pulling.cancel()

    def _job(self, first: int, stop: int) -> PullJob:
        assert self._giver_slots is not None
        assert self._coverage is not None
        assert self._reservation is not None
        assert self._coding is not None
        coding = self._coding

        def began() -> None:
            self._watch.pull_began()  # here, as it may be a while until the loop gets to it
            self._soon(self._feed, states.PullBegan())

        def verified(place: int) -> None:
            self._watch.verified(coding.wire_bytes(self._pieces[place]))
            self._soon(self._verified, place)

        return PullJob(
            transfer_id=self._id,
            first=first,
            pieces=self._pieces[first:stop],
            rows=self._reservation.rows,
            giver_slots=self._giver_slots,
            taker_slots=self._reservation.slots,
            coding=coding,
            on_began=began,
            on_verified=verified,
            on_decoded=self._watch.decoded,
            more=stop < len(self._pieces) or not self._coverage.whole,
        )

    def _soon(self, hear: Callable[[T], None], what: T) -> None:
        """On the loop: at once if this is its thread, or what comes after would overtake it."""
        if threading.get_ident() == self._thread:
            hear(what)
        else:
            self._loop.call_soon_threadsafe(hear, what)

    def _verified(self, place: int) -> None:
        self._feed(states.PieceVerified(place))
        if self._coding is None or self._coding.codec == "none" or self._machine.phase is not Phase.TRANSFERRING:
            return
        while self._num_verified in self._machine.verified:
            self._num_verified += 1
        self._peer.link.send(messages.Verified(self._id, self._num_verified))

    def _wrap_up(self) -> None:
        """Of a transfer that is committed, what nobody here waits for."""
        self._peer.link.send(messages.Committed(self._id))
        self._count()

    def _count(self) -> None:
        counters, outcome = self._counters, self._machine.outcome
        assert outcome is not None
        if not self._machine.finished:  # else it ended with its first token, as it was to
            counters.count(outcome)
        found: dict[str, str | int | float] = {}
        if outcome is Outcome.COMMITTED and self._reservation is not None and self._coding is not None:
            found = self._count_committed(self._reservation.rows, self._coding)
        self._tell(outcome, found)

    def _count_committed(self, rows: Rows, coding: Coding) -> dict[str, str | int | float]:
        """What is to be told of it: bytes, and seconds as TransferCounters defines them."""
        counters, times = self._counters, self._watch.times()
        nbytes = sum(piece_bytes(rows, piece) for piece in self._pieces)
        on_wire = sum(map(coding.wire_bytes, self._pieces))
        counters.bytes += nbytes
        counters.wire_bytes[coding.codec] += on_wire
        counters.add(times)
        for pull in self._watch.pulls:
            if not pull.at_once:
                self._peer.codec.bandwidth.observe(pull.nbytes, pull.ended - pull.began - pull.decoding)
        seconds = {f"{name}_s": value for name, value in times._asdict().items()}
        return {
            "bytes": nbytes,
            "wire_bytes": on_wire,
            "codec": coding.codec,
            "transport": self._peer.transport.first(coding) or "",
            "encode_s": self._encode_s,
            **seconds,
        }

    def _tell(self, outcome: Outcome, found: dict[str, str | int | float]) -> None:
        """A line in the log, and a span for who traces the request."""
        values = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
        logger.info("transfer %s from %s %s: %s", self._id, self._peer.address, outcome, values or self._machine.reason)
        told = {"id": self._id, "peer": self._peer.address, "outcome": str(outcome), **found}
        record(
            "kv_transfer",
            self._trace,
            time.monotonic() - self._began,
            {f"slipstream.transfer.{name}": value for name, value in told.items()},
            error="" if outcome is Outcome.COMMITTED or self._machine.finished else self._machine.reason,
        )

    def _failure(self) -> TransferError:
        message = f"transfer {self._id} from {self._peer.address}: {self._machine.reason}"
        match self._machine.outcome:
            case Outcome.ABORTED:
                return Withdrawn(message, finished=self._machine.finished)
            case Outcome.EXPIRED:
                return LeaseExpired(message)
            case _:
                return TransferError(message)
