"""One transfer at the giver: what its state machine says, carried out."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from core.errors import TransferError
from core.links import Link
from kv_transfer import messages, states
from kv_transfer.alarm import Alarm
from kv_transfer.codecs.names import CodecName
from kv_transfer.coding import Coding
from kv_transfer.frames import Frames
from kv_transfer.messages import FromGiver, Piece, SequenceState, ToGiver
from kv_transfer.pieces import Extent, Frontier, Slots, cut, slots_of
from kv_transfer.sealing import SealedPiece, Source
from kv_transfer.states import GiverTransfer, Outcome, Phase
from kv_transfer.transports.pair_server import PairServer
from kv_transfer.transports.reading import Reading

logger = logging.getLogger(__name__)

GiverLink = Link[ToGiver, FromGiver]

SEALED_AT_ONCE = 8
"""Pieces that are sealed before they are named: the taker copies some while others are summed. Fewer are more messages,
and a message costs either side as much as summing a piece."""


class Owner(Protocol):
    """What a transfer tells the giver that it belongs to."""

    def released(self, giving: Giving, outcome: Outcome, reason: str) -> None:
        """Its blocks go back. Called once, and not at all for a transfer that was never opened."""
        ...

    def draining(self, giving: Giving) -> None:
        """It has ended and transports still read its blocks. May be called again."""
        ...

    def naming(self, giving: Giving) -> None:
        """The taker is about to be told of pieces."""
        ...

    def ended(self, giving: Giving) -> None:
        """Nothing of it is under way any more. May be called again."""
        ...


class Giving:
    """Feeds its machine and carries out what it says."""

    def __init__(self, transfer_id: str, source: Source, machine: GiverTransfer, owner: Owner) -> None:
        self.transfer_id = transfer_id
        self.link: GiverLink | None = None
        self.over = asyncio.Event()
        self.encode_seconds = 0.0
        self._source = source
        self._machine = machine
        self._owner = owner
        self._alarm = Alarm(lambda: self.feed(states.Tick()))
        self._block_ids: list[int] = []
        self._slots: Slots | None = None
        self._state: SequenceState | None = None
        self._computed_at = math.inf
        self._final = self._cut = Frontier()
        """What is written, and what of it has been cut into extents."""
        self._ready: torch.cuda.Event | None = None
        self._todo: deque[Extent] = deque()
        self._pieces: list[Piece] = []
        self._num_named = 0
        self._coding = Coding("none", source.pool.layout)
        self._frames = Frames()
        self._sealing: asyncio.Task[list[SealedPiece]] | None = None

    # --- the owner's side --------------------------------------------------------------------------------------------

    def open(self, block_ids: Sequence[int], num_tokens: int) -> None:
        block_size = self._source.pool.layout.block_size
        self._block_ids = list(block_ids[: -(-num_tokens // block_size)])
        self._slots = slots_of(self._block_ids, block_size, num_tokens)
        self.feed(states.Opened(num_tokens))

    def written(self, frontier: Frontier, ready: torch.cuda.Event | None) -> None:
        if frontier > self._final:
            self._final, self._ready = frontier, ready
            if not self._machine.sealing:  # else it goes with that, or is found when that has ended
                self.feed(states.Written())

    def complete(self, state: SequenceState, ready: torch.cuda.Event | None) -> None:
        self._state, self._computed_at = state, time.monotonic()
        if self._machine.num_tokens is not None:
            self.written(Frontier(self._machine.num_tokens), ready)
        self.feed(states.Computed())

    # --- the taker's side --------------------------------------------------------------------------------------------

    def wanted(self, start_token: int, codec: CodecName) -> None:
        if self._machine.start_token is None:  # else it was said before
            self._coding = Coding(codec, self._source.pool.layout)
        self.feed(states.Wanted(start_token))

    def on_message(
        self,
        message: messages.Renew | messages.Verified | messages.Committed | messages.Cancel | messages.Pull,
        pairs: PairServer,
    ) -> None:
        match message:
            case messages.Renew(sent_at=sent_at):
                self.feed(states.Renewal(sent_at))
            case messages.Verified(num_pieces=num_pieces):
                self._frames.drop(num_pieces)
            case messages.Committed():
                self.feed(states.CommitReceived())
            case messages.Cancel(reason=reason):
                self.feed(states.CancelReceived(reason))
            case messages.Pull(pair_id=pair_id) if not self._machine.may_read:
                pairs.fail(pair_id, f"transfer {self.transfer_id} has ended")
            case messages.Pull():
                pairs.pull(message, self.read())

    def read(self) -> Reading:
        """What is sealed so far, for a transport of which this side has an end. TransferError if that may not be (any
        more)."""
        if not self._machine.may_read:
            raise TransferError(f"transfer {self.transfer_id} has ended")
        assert self._slots is not None
        self.feed(states.ReadStarted())
        return Reading(
            transfer_id=self.transfer_id,
            pieces=self._pieces,
            slots=self._slots,
            coding=self._coding,
            held=self._frames,
            end=lambda: self.feed(states.ReadEnded()),
        )

    # --- the machine -------------------------------------------------------------------------------------------------

    def feed(self, event: states.Event) -> None:
        instructions = self._machine.handle(event, time.monotonic())
        if states.SendComplete() in instructions:  # it names the last pieces
            instructions = [instruction for instruction in instructions if instruction != states.SendSealed()]
        for instruction in instructions:
            self._carry_out(instruction)
        self._alarm.set(self._machine.wake_at)
        if self._machine.phase is Phase.DRAINING:
            self._frames.stop_waiting()
            self._owner.draining(self)
        if self._machine.phase is Phase.RELEASED:
            self._todo.clear()  # and what else is large: ended ones are remembered, states of drafters take megabytes
            self._pieces, self._block_ids, self._slots = [], [], None
            self._state = self._ready = self._sealing = None
            self._frames.clear()
            self.over.set()
            self._owner.ended(self)

    def _carry_out(self, instruction: states.Instruction) -> None:
        match instruction:
            case states.SendOffer():
                self._send(self._offer())
            case states.Seal():
                asyncio.get_running_loop().call_soon(self._seal)  # with what else is said in this turn
            case states.SendSealed() if self._num_named < len(self._pieces):
                first, self._num_named = self._num_named, len(self._pieces)
                self._owner.naming(self)
                self._send(messages.Sealed(self.transfer_id, first, self._pieces[first:]))
            case states.SendComplete():
                assert self._state is not None
                self._owner.naming(self)
                age = time.monotonic() - self._computed_at
                self._send(
                    messages.Complete(
                        transfer_id=self.transfer_id,
                        num_pieces=len(self._pieces),
                        state=self._state,
                        age_s=age,
                        encode_s=self.encode_seconds,
                        last=self._pieces[self._num_named :],
                    )
                )
            case states.SendRenewed(sent_at):
                self._send(messages.Renewed(self.transfer_id, sent_at))
            case states.SendWithdrawn(reason, outcome, finished):
                self._send(messages.Withdrawn(self.transfer_id, reason, outcome, finished))
            case states.Release(outcome, reason):
                self._owner.released(self, outcome, reason)

    def _offer(self) -> messages.Offer:
        machine = self._machine
        assert machine.start_token is not None
        assert machine.num_tokens is not None
        return messages.Offer(
            transfer_id=self.transfer_id,
            layout=self._source.pool.layout,
            start_token=machine.start_token,
            num_tokens=machine.num_tokens,
            block_ids=self._block_ids,
            codec=self._coding.codec,
        )

    def _seal(self) -> None:
        extents = self._next_extents() if self._machine.may_read else []
        if self._source.is_quick(extents, self._coding):
            try:
                sealed = self._sealed_pieces(extents)
            except Exception as error:  # noqa: BLE001  it fails this transfer, as it would in a thread
                self._seal_failed(error)
            else:
                self._sealed(sealed)
        else:
            self._sealing = asyncio.create_task(self._seal_in_thread(extents))
            self._sealing.add_done_callback(self._seal_ended)

    async def _seal_in_thread(self, extents: list[Extent]) -> list[SealedPiece]:
        await self._frames.room()
        if not self._machine.may_read:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._source.threads, self._sealed_pieces, extents)

    def _sealed_pieces(self, extents: list[Extent]) -> list[SealedPiece]:
        if not extents:
            return []
        assert self._slots is not None
        return self._source.seal(self._slots, extents, self._coding, self._ready)

    def _next_extents(self) -> list[Extent]:
        if not self._todo:
            self._todo.extend(self._cut_what_is_new())
        return [self._todo.popleft() for _ in range(min(SEALED_AT_ONCE, len(self._todo)))]

    def _cut_what_is_new(self) -> list[Extent]:
        """Parts of what was written since this was called last, less what the taker has of its own."""
        layout, start = self._source.pool.layout, self._machine.start_token or 0
        grown = self._final.since(self._cut, layout.num_layers)
        self._cut = self._final
        wanted = [extent.from_token(start) for extent in grown]
        return [part for extent in wanted if extent.num_tokens for part in cut(layout, extent)]

    def _seal_ended(self, sealing: asyncio.Task[list[SealedPiece]]) -> None:
        if error := sealing.exception():
            self._seal_failed(error)
        else:
            self._sealed(sealing.result())

    def _seal_failed(self, error: BaseException) -> None:
        logger.error("cannot offer transfer %s", self.transfer_id, exc_info=error)
        self.feed(states.SealEnded(f"the giver cannot offer it: {error}"))

    def _sealed(self, sealed: list[SealedPiece]) -> None:
        for place, (_, frame, seconds) in enumerate(sealed, len(self._pieces)):
            self.encode_seconds += seconds
            if frame is not None:
                self._frames.put(place, frame)
        self._pieces += [piece for piece, _, _ in sealed]
        if self._todo or self._cut < self._final:
            self.feed(states.Written())
        self.feed(states.SealEnded())

    def _send(self, message: FromGiver) -> None:
        assert self.link is not None
        self.link.send(message)
