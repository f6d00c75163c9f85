"""The frames of one transfer at its giver."""

from __future__ import annotations

import asyncio

import torch

from core.errors import TransferError

MAX_BYTES = 32 << 20
"""Of frames that wait to be fetched and verified. What is sealed at once comes on top."""


class Frames:
    """Held from when a piece is encoded until the taker has it, so that another transport can fetch it again; nothing
    is encoded twice. While MAX_BYTES of them are held nothing more is to be encoded: `room` waits. Used on one event
    loop, but for `read`."""

    def __init__(self) -> None:
        self._held: dict[int, torch.Tensor] = {}
        self._nbytes = 0
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()

    def put(self, place: int, frame: torch.Tensor) -> None:
        """Of the piece with this place in the transfer. Places only grow."""
        self._held[place] = frame
        self._nbytes += frame.nbytes
        if self._nbytes >= MAX_BYTES:
            self._may_go_on.clear()

    def drop(self, stop: int) -> None:
        """The taker has the pieces before `stop`."""
        for place in [place for place in self._held if place < stop]:
            self._nbytes -= self._held.pop(place).nbytes
        if self._nbytes < MAX_BYTES:
            self._may_go_on.set()

    def read(self, first: int, last: int) -> list[torch.Tensor]:
        """In any thread: those of the pieces `first` .. `last` - 1. TransferError if the taker has said it has one."""
        try:
            return [self._held[place] for place in range(first, last)]
        except KeyError as error:
            raise TransferError(f"piece {error} is asked for, and was said to be there before") from error

    async def room(self) -> None:
        """Until something may be encoded, or `stop_waiting`."""
        await self._may_go_on.wait()

    def stop_waiting(self) -> None:
        self._may_go_on.set()

    def clear(self) -> None:
        self._held.clear()
        self._nbytes = 0
