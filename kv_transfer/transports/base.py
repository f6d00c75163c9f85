"""What a transport is: the taker's way to bring pieces from the giver's pool into its own.

Invariants that the hand-off rests on, for every implementation:

1. `pull` calls `job.on_began()` when it starts to work. It writes to the slots of its job and nowhere else, and calls
   `job.arrived(i)` after the bytes of piece i are all in their slots; `arrived` compares checksums over those slots, so
   no transport can vouch for bytes it did not bring.
2. When `pull` has returned, raised or been cancelled, nothing of this transport will touch the slots again. Cancelling
   it asks it to be quiet; it may take as long as one copy within the machine, never as long as the peer likes.
3. Any failure of transport or peer is a TransferError. A transport that can't work with this giver at all says so when
   it is made, by Unusable; the taker then tries the next.
4. On the giver's side a read of its blocks is announced and its end is reported (states.ReadStarted, ReadEnded).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

from core.errors import ChecksumMismatch
from kv_transfer.messages import FromGiver, Manifest
from kv_transfer.pieces import Rows, Slots, checksum, layers_of, slots_of, tokens_of


class Unusable(Exception):
    """This transport can't reach this giver; the message says why."""


@dataclass(frozen=True)
class PullJob:
    """One transfer as a transport sees it. Its methods and callbacks may be called from any thread."""

    manifest: Manifest
    rows: Rows
    """The taker's pool."""
    slots: Slots
    """The taker's slots of tokens start_token .. num_tokens - 1."""
    on_began: Callable[[], None]
    """To be called when the job's turn has come: transports limit how many they pull at a time."""
    on_verified: Callable[[int], None]

    @cached_property
    def source_slots(self) -> Slots:
        """The giver's slots of the same tokens."""
        manifest = self.manifest
        return slots_of(manifest.block_ids, manifest.layout.block_size, manifest.start_token, manifest.num_tokens)

    def arrived(self, index: int) -> None:
        """Piece `index` is in its slots. Raises ChecksumMismatch if it is not what the giver has."""
        piece = self.manifest.pieces[index]
        slots = tokens_of(self.slots, piece, self.manifest.start_token)
        if checksum(layers_of(self.rows, piece), slots) != piece.checksum:
            raise ChecksumMismatch(
                f"piece {index} of transfer {self.manifest.transfer_id} (tokens {piece.token} to "
                f"{piece.token + piece.num_tokens - 1}, layers {piece.layer} to {piece.layer + piece.num_layers - 1}) "
                "is not what the giver sealed"
            )
        self.on_verified(index)


class Transport(Protocol):
    """Belongs to one link; several jobs may be pulled at a time."""

    name: ClassVar[str]

    async def pull(self, job: PullJob) -> None: ...

    def on_message(self, message: FromGiver) -> None:
        """A control message the giver sent over the link."""
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
