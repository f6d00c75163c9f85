"""What the giver's end of a transport sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from core.errors import TransferError
from kv_transfer.coding import Coding
from kv_transfer.frames import Frames
from kv_transfer.messages import Piece
from kv_transfer.pieces import Slots
from kv_transfer.transports.base import Stretch
from kv_transfer.transports.batches import Batch


@dataclass(frozen=True)
class Reading(Stretch):
    """A transfer whose blocks are being read until `end` is called, on the loop."""

    transfer_id: str
    pieces: Sequence[Piece]
    """Sealed so far."""
    slots: Slots
    """Of the sequence, by token."""
    coding: Coding
    held: Frames
    end: Callable[[], None]
    first: int = 0
    """The place of the first of `pieces` in the transfer."""

    def part(self, first: int, last: int, nbytes: int) -> Reading:
        """Of the pieces `first` .. `last` - 1, which whoever asks for them takes for so many bytes. Raises
        TransferError if they are not."""
        pieces = self.pieces[first:last] if 0 <= first < last <= len(self.pieces) else []
        found = replace(self, pieces=pieces, first=first)
        if not pieces or nbytes != found.nbytes:
            raise TransferError(f"these are no pieces of transfer {self.transfer_id}")
        return found

    def since(self, first: int) -> Reading | None:
        """Of all pieces from `first` on; None while there is none."""
        return replace(self, pieces=self.pieces[first:], first=first) if first < len(self.pieces) else None

    def frames(self, batch: Batch) -> list[torch.Tensor]:
        """Of a batch of these pieces. TransferError if the taker was said to have one of them."""
        return self.held.read(self.first + batch.first, self.first + batch.last)
