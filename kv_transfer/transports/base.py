"""What a transport is: the taker's way to bring pieces from the giver's pool into its own.

Invariants that the hand-off rests on, for every implementation:

1. `pull` calls `job.on_began()` when it starts to work, and writes to the slots of its job by the job's own methods
   only: `job.landed(i)` for a piece that has come into memory of the transport's, `job.read(i)` for one that it has at
   hand where the giver has it, `job.decoded(i)` for one that came as a frame (kv_transfer.coding). They sum what they
   copy, and compare, so no transport can vouch for bytes it did not bring.
2. When `pull` has returned, raised or been cancelled, nothing of this transport will touch the slots again. Cancelling
   it asks it to be quiet; it may take as long as one copy within the machine, never as long as the peer likes.
3. Any failure of transport or peer is a TransferError. A transport that can't work with this giver at all says so when
   it is made, by Unusable; the taker then tries the next.
4. On the giver's side a read of its blocks is announced and its end is reported (states.ReadStarted, ReadEnded). Where
   the taker reads the giver's memory by itself nobody there can announce it: what it then reads is summed, so blocks
   that were given to another sequence meanwhile are noticed.
5. One that reads the giver's memory where it lies (names.READS_IN_PLACE) is given no job of frames.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from core.errors import ChecksumMismatch
from kv_transfer.coding import Coding, checksum_of
from kv_transfer.messages import FromGiver, Piece
from kv_transfer.pieces import Rows, Runs, Slots, copy_summed, layers_of, runs, tokens_of


class Unusable(Exception):
    """This transport can't reach this giver; the message says why."""


class Stretch:
    """Pieces of a transfer that follow each other."""

    pieces: Sequence[Piece]
    first: int
    """The place of the first of `pieces` among all of the transfer."""
    coding: Coding

    @property
    def last(self) -> int:
        """The place after that of the last of `pieces`."""
        return self.first + len(self.pieces)

    @property
    def nbytes(self) -> int:
        """On the wire."""
        return sum(map(self.coding.wire_bytes, self.pieces))


@dataclass(frozen=True)
class PullJob(Stretch):
    """Some of the pieces of a transfer: those that were sealed since the job before. Transfers have one job at a time,
    and `first` is the place of its first piece among all that the giver has sealed, which is how both sides name a
    piece. `index` in what follows counts from the first of the job. Methods and callbacks may be called from any
    thread."""

    transfer_id: str
    first: int
    pieces: Sequence[Piece]
    rows: Rows
    """The taker's pool."""
    giver_slots: Slots
    """Where the giver has the tokens of the sequence, from its first."""
    taker_slots: Slots
    coding: Coding
    on_began: Callable[[], None]
    """To be called when the job's turn has come: transports limit how many they pull at a time."""
    on_verified: Callable[[int], None]
    """Called with the place of a piece in the transfer."""
    on_decoded: Callable[[float], None]
    """Called with the seconds it took, before the piece is verified."""
    more: bool = False
    """Whether other pieces of the transfer are still to be sealed."""

    def part(self, first: int, last: int | None = None) -> PullJob:
        """Of the pieces with these places in the transfer; by default all from `first` on."""
        last = self.last if last is None else last
        return replace(self, first=first, pieces=self.pieces[first - self.first : last - self.first])

    def source(self, index: int) -> Slots:
        """The giver's slots of a piece."""
        return tokens_of(self.giver_slots, self.pieces[index])

    def target(self, index: int) -> Slots:
        """The taker's slots of a piece."""
        return tokens_of(self.taker_slots, self.pieces[index])

    def read(self, index: int, theirs: Rows) -> None:
        """Copy a piece out of the giver's rows. Raises ChecksumMismatch if it is not what the giver sealed."""
        piece = self.pieces[index]
        pairs = self.runs_of(index, gathered=False)
        self._verify(index, copy_summed(layers_of(self.rows, piece), layers_of(theirs, piece), pairs))

    def landed(self, index: int, part: Rows) -> None:
        """Copy a piece that has come in memory of its own, [layers, 2, tokens, row bytes]. Raises as
        `read`."""
        piece = self.pieces[index]
        self._verify(index, copy_summed(layers_of(self.rows, piece), part, self.runs_of(index, gathered=True)))

    def runs_of(self, index: int, *, gathered: bool) -> Runs:
        """To `target`, from `source` or, `gathered`, from memory that has nothing but the piece."""
        source = np.arange(self.pieces[index].num_tokens) if gathered else self.source(index)
        return runs(source, self.target(index))

    def decoded(self, index: int, frame: torch.Tensor) -> None:
        """The frame of a piece, [bytes] uint8: decode it into its slots. Raises ChecksumMismatch before if it is not
        what the giver has, TransferError if it is no frame of this piece."""
        self._compare(index, checksum_of(frame))
        started = time.perf_counter()
        self.coding.decode(frame, self.rows, self.target(index), self.pieces[index])
        self.on_decoded(time.perf_counter() - started)
        self.on_verified(self.first + index)

    def _verify(self, index: int, found: int) -> None:
        self._compare(index, found)
        self.on_verified(self.first + index)

    def _compare(self, index: int, found: int) -> None:
        piece = self.pieces[index]
        if found != piece.checksum:
            raise ChecksumMismatch(
                f"piece {self.first + index} of transfer {self.transfer_id} (tokens {piece.token} to "
                f"{piece.token + piece.num_tokens - 1}, layers {piece.layer} to {piece.layer + piece.num_layers - 1}) "
                "is not what the giver sealed"
            )


class Transport(Protocol):
    """Belongs to one link; several jobs may be pulled at a time."""

    name: ClassVar[str]

    async def pull(self, job: PullJob) -> None: ...

    def pull_at_once(self, job: PullJob) -> bool:  # noqa: ARG002  most have none that they can do so
        """Do a job that needs no other process and takes no longer than to wake a thread; False, with nothing done, if
        it is none."""
        return False

    def on_message(self, message: FromGiver) -> None:
        """A control message the giver sent over the link."""
        ...

    def forget(self, transfer_id: str) -> None:
        """Nothing of this transfer will be pulled any more."""
        ...

    def close(self) -> None:
        """The link has ended: fail what is pending and free what the transport holds."""
        ...


async def settled(work: asyncio.Future[Any]) -> None:
    """Wait until a thread's work has ended, however often the waiting task is cancelled. How it ended is dropped."""
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            continue
    if not work.cancelled():
        work.exception()


async def finished(work: asyncio.Future[Any], stop: Callable[[], None]) -> None:
    """Wait for a thread's work and raise what it raised; when cancelled, `stop` it and wait until it has ended."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop()
        await settled(work)
        raise
