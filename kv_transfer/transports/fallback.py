"""The transports of one link as one: the first that can be used, and another when it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

from core.errors import ChecksumMismatch, TransferError
from kv_transfer.coding import Coding
from kv_transfer.messages import FromGiver
from kv_transfer.transports.base import PullJob, Transport, Unusable
from kv_transfer.transports.names import READS_IN_PLACE

Choices = Mapping[str, Callable[[], Transport]]
"""By name, in order of preference. What makes a transport is called when it is first needed, and once."""


class FirstThatWorks:
    """A job that fails by its transport is tried once more, what is left of it, by the next that can be used. If that
    one does it, it goes first from then on: the fault was the transport's, not the peer's. KV that is not what the
    giver sealed is no fault of a transport. Transports that read the pool in place are passed over for jobs in a codec.
    `on_fallback` hears of every transport that can't be used or has failed, and
    why. Raises Unusable, with all reasons, when there is none."""

    name: ClassVar[str] = "first_that_works"

    def __init__(self, choices: Choices, on_fallback: Callable[[str], None]) -> None:
        self._choices = dict(choices)
        self._made: dict[str, Transport] = {}
        self._unusable: list[str] = []
        self._on_fallback = on_fallback
        self._closed = False
        if self._usable() is None:
            raise Unusable("; ".join(self._unusable) or "there is none to choose from")

    def pull_at_once(self, job: PullJob) -> bool:
        first = self._usable(job.coding)
        return first is not None and self._alone(first, job.transfer_id).pull_at_once(job)

    async def pull(self, job: PullJob) -> None:
        first = self._usable(job.coding)
        assert first is not None, "a transport that could be used once stays"
        left = _Progress(job)
        try:
            await self._alone(first, job.transfer_id).pull(left.job)
        except ChecksumMismatch:
            raise
        except TransferError as failure:
            second = None if self._closed else self._usable(job.coding, other_than=first)
            if second is None:
                raise
            self._on_fallback(f"transport {first} failed, {second} takes over: {failure}")
            await self._retry(second, left.rest(), failure)

    async def _retry(self, second: str, rest: PullJob, failure: TransferError) -> None:
        try:
            await self._alone(second, rest.transfer_id).pull(rest)
        except ChecksumMismatch:
            raise
        except TransferError as error:
            raise TransferError(f"{failure}; and by {second}: {error}") from failure
        self._choices = {second: self._choices[second]} | self._choices

    def _alone(self, name: str, transfer_id: str) -> Transport:
        """It, to go on with a transfer of which the others keep nothing: what one has the giver push, none of the
        others would read."""
        for other, transport in self._made.items():
            if other != name:
                transport.forget(transfer_id)
        return self._made[name]

    def on_message(self, message: FromGiver) -> None:
        for transport in self._made.values():
            transport.on_message(message)

    def forget(self, transfer_id: str) -> None:
        for transport in self._made.values():
            transport.forget(transfer_id)

    def close(self) -> None:
        self._closed = True
        for transport in self._made.values():
            transport.close()

    def first(self, coding: Coding | None = None) -> str | None:
        """Who pulls now; None if there is nobody any more."""
        return self._usable(coding)

    @property
    def in_place(self) -> bool:
        """Whether what goes first now reads the giver's pool where it lies."""
        return self._usable() in READS_IN_PLACE

    def _usable(self, coding: Coding | None = None, other_than: str | None = None) -> str | None:
        """The name of the first that is made or can be, and carries pieces in this coding."""
        barred = {other_than} | (READS_IN_PLACE if coding is not None and coding.codec != "none" else set())
        for name in list(self._choices):
            if name not in barred and (name in self._made or self._make(name)):
                return name
        return None

    def _make(self, name: str) -> bool:
        try:
            self._made[name] = self._choices[name]()
        except Unusable as reason:
            del self._choices[name]
            self._unusable.append(f"{name}: {reason}")
            self._on_fallback(f"transport {name} cannot be used: {reason}")
            return False
        return True


class _Progress:
    """A job, and what is left of it."""

    def __init__(self, job: PullJob) -> None:
        self._whole = job
        self._verified: set[int] = set()
        self.job = replace(job, on_verified=self._on_verified)

    def _on_verified(self, place: int) -> None:
        self._verified.add(place)
        self._whole.on_verified(place)

    def rest(self) -> PullJob:
        """From the first piece that has not been verified."""
        done = 0
        while self._whole.first + done in self._verified:
            done += 1
        return self._whole.part(self._whole.first + done)
