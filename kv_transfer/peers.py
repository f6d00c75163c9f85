"""A taker's links to givers: opened when first needed, one per giver, thrown away when they end."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from core.errors import InternalError, TransferError, Unavailable
from core.links import Link, LinkClient
from kv_transfer.codecs.names import CodecName
from kv_transfer.codecs.policy import LinkCodec
from kv_transfer.messages import (
    SERVICE,
    Complete,
    FromGiver,
    Hello,
    Offer,
    PairFailed,
    PairKey,
    Renewed,
    Sealed,
    ToGiver,
    Withdrawn,
)
from kv_transfer.transports.fallback import FirstThatWorks

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0

TakerLink = Link[FromGiver, ToGiver]
Choose = Callable[[Hello, str, TakerLink], tuple[FirstThatWorks, LinkCodec]]
"""From the giver's Hello, its address and the link; raises TransferError if the two can't be joined."""


OfTransfer = Offer | Sealed | Complete | Renewed | Withdrawn


class Recipient(Protocol):
    """One transfer, as its link sees it."""

    def on_message(self, message: OfTransfer) -> None: ...

    def on_link_lost(self, reason: str) -> None: ...


class Peer:
    """An open link to a giver. `recipients` get what arrives under their transfer id, and the end of the link."""

    def __init__(
        self,
        address: str,
        client: LinkClient,
        link: TakerLink,
        giver: Hello,
        transport: FirstThatWorks,
        codec: LinkCodec,
    ) -> None:
        self.address = address
        self.link = link
        self.giver = giver
        self.transport = transport
        self.codec = codec
        self.recipients: dict[str, Recipient] = {}
        self._client = client
        self._reader: asyncio.Task[None] | None = None

    @property
    def lease_s(self) -> float:
        """Of the giver; `connect` has seen to it that there is one."""
        assert self.giver.lease_s is not None
        return self.giver.lease_s

    @staticmethod
    async def connect(address: str, hello: Hello, choose: Choose, on_end: Callable[[Peer], None]) -> Peer:
        """Raises TransferError if nobody answers there or the two can't be joined. `on_end` is called once, when the
        link has ended and before its recipients are told."""
        client = LinkClient(address)
        try:
            link: TakerLink = await client.open(SERVICE, FromGiver, ToGiver)  # type: ignore[arg-type]
            link.send(hello)
            messages = aiter(link)
            giver = await asyncio.wait_for(anext(messages, None), HELLO_TIMEOUT_S)
            if not isinstance(giver, Hello):
                raise TransferError(f"{address} does not answer as a prefill worker: {link.error or giver}")
            if giver.lease_s is None or not 0 < giver.lease_s < math.inf:
                raise TransferError(f"{address} gives leases of {giver.lease_s} s; a number of seconds is needed")
            peer = Peer(address, client, link, giver, *choose(giver, address, link))
        except BaseException as error:
            await client.close()
            if isinstance(error, (Unavailable, TimeoutError)):
                raise TransferError(f"the prefill worker at {address} does not answer") from error
            if isinstance(error, InternalError):
                raise TransferError(error.message) from error
            raise
        peer._reader = asyncio.create_task(peer._read(messages, on_end))
        return peer

    def next_codec(self) -> CodecName:
        """For the next transfer."""
        return self.codec.choose(in_place=self.transport.in_place)

    async def close(self) -> None:
        """Say goodbye, then end the link whether the giver answers or not."""
        self.link.close()
        assert self._reader is not None
        await asyncio.wait({self._reader}, timeout=CLOSE_TIMEOUT_S)
        await self._client.close()
        await self._reader

    async def _read(self, messages: AsyncIterator[FromGiver], on_end: Callable[[Peer], None]) -> None:
        reason = f"the prefill worker at {self.address} is gone"
        try:
            async for message in messages:
                self._dispatch(message)
        except InternalError as error:
            reason = error.message
        finally:
            on_end(self)
            self.transport.close()
            for recipient in list(self.recipients.values()):
                recipient.on_link_lost(self.link.error or reason)
            await self._client.close()

    def _dispatch(self, message: FromGiver) -> None:
        match message:
            case PairKey() | PairFailed():
                self.transport.on_message(message)
            case Hello():
                pass
            case _:
                if (recipient := self.recipients.get(message.transfer_id)) is not None:  # else it has ended here
                    recipient.on_message(message)
