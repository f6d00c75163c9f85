"""The taking side of hand-offs: pulls the KV of a prompt from a prefill worker into blocks reserved for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from core.errors import LeaseExpired, TransferError
from engine.kv_cache import Pool
from kv_transfer import native_rows
from kv_transfer.codecs.policy import CodecPolicy, LinkCodec
from kv_transfer.counters import TransferCounters
from kv_transfer.messages import REVISION, Hello
from kv_transfer.peers import Peer, TakerLink
from kv_transfer.pieces import rows_of
from kv_transfer.states import Outcome, TakerTransfer
from kv_transfer.taking import Reservation, Taken, Taking, Withdrawn
from kv_transfer.transports.base import Unusable
from kv_transfer.transports.batches import device_identity
from kv_transfer.transports.choice import makers, preference
from kv_transfer.transports.fallback import FirstThatWorks
from kv_transfer.transports.names import READS_IN_PLACE, TransportName

__all__ = ["Reservation", "Taken", "Taker", "Withdrawn"]

logger = logging.getLogger(__name__)


class Taker:
    """Use from one event loop. `transports` are tried in order, by default in that of choice.preference, those that
    can't carry a codec left out if one is forced. `stall_s` bounds the time between two pieces of a transfer."""

    def __init__(
        self,
        pool: Pool,
        *,
        transports: Sequence[TransportName] | None = None,
        codecs: CodecPolicy | None = None,
        stall_s: float = 5.0,
    ) -> None:
        """Without `codecs` KV comes as it is."""
        self.counters = TransferCounters()
        self._pool = pool
        self._rows = rows_of(pool)
        native_rows.load()  # compiled now, if it has to be, and not while KV waits
        self._transports = transports
        self._codecs = codecs or CodecPolicy("none", pool.layout, pool.device)
        self._stall_s = stall_s
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kv-pull")
        self._peers: dict[str, asyncio.Task[Peer]] = {}

    async def take(
        self,
        transfer_id: str,
        address: str,
        block_ids: Sequence[int],
        *,
        start_token: int,
        num_tokens: int,
        deadline: float,
    ) -> Taken:
        """Fill the blocks with the KV of tokens start_token .. num_tokens - 1 of a transfer that the giver at `address`
        has offered or will offer. Tokens before `start_token` are not touched. `deadline` is Unix time.

        Returns with every piece verified, or raises: Withdrawn, LayoutMismatch, ChecksumMismatch, LeaseExpired (one
        side was not heard of in time, or the deadline passed) or another TransferError. In every case, cancellation
        included, nothing writes to the blocks any more when this returns."""
        reserved: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        reserved.set_result(self.reservation(block_ids, start_token=start_token, num_tokens=num_tokens))
        return await self.expect(transfer_id, address, reserved, deadline=deadline)

    def reservation(self, block_ids: Sequence[int], *, start_token: int, num_tokens: int) -> Reservation:
        """Blocks of our pool for the KV of tokens start_token .. num_tokens - 1; ValueError if they can't hold it."""
        block_size = self._pool.layout.block_size
        if not 0 <= start_token <= num_tokens <= len(block_ids) * block_size:
            raise ValueError(f"tokens {start_token} to {num_tokens} do not fit {len(block_ids)} blocks of {block_size}")
        return Reservation(self._pool, self._rows, block_ids, start_token, num_tokens)

    async def expect(
        self,
        transfer_id: str,
        address: str,
        reserved: asyncio.Future[Reservation],
        *,
        deadline: float,
        trace: str = "",
    ) -> Taken:
        """Like `take`, for blocks that are still to be had: until `reserved` has them the giver is told that somebody
        waits, and keeps its offer for as long as it hears so. Ends early, without `reserved`, when the transfer does;
        blocks that come later are the caller's to free. Raises also what `reserved` fails with. The
        transfer's span lies below `trace` (core.tracing)."""
        end = time.monotonic() + deadline - time.time()
        try:
            peer = await self._reach(transfer_id, address, end)
        except TransferError as error:
            self.counters.count(Outcome.EXPIRED if isinstance(error, LeaseExpired) else Outcome.FAILED)
            raise
        if transfer_id in peer.recipients:
            raise ValueError(f"transfer {transfer_id} is being taken already")
        machine = TakerTransfer(peer.lease_s, self._stall_s, end)
        return await Taking(transfer_id, peer, machine, self.counters, trace).run(reserved)

    async def _reach(self, transfer_id: str, address: str, end: float) -> Peer:
        try:
            async with asyncio.timeout(end - time.monotonic()):
                peer = await self._peer(address)
        except TimeoutError as error:
            raise LeaseExpired(f"transfer {transfer_id}: the deadline of the request has passed") from error
        if peer.link.closed:
            raise TransferError(f"transfer {transfer_id}: the prefill worker at {address} is gone")
        return peer

    async def close(self) -> None:
        """End every link; what is being taken over them fails."""
        for connecting in list(self._peers.values()):
            connecting.cancel()
            await asyncio.wait({connecting})
            if not connecting.cancelled() and connecting.exception() is None:
                await connecting.result().close()
        self._threads.shutdown()

    async def _peer(self, address: str) -> Peer:
        connecting = self._peers.get(address)
        if connecting is None:
            connecting = asyncio.create_task(self._connect(address))
            self._peers[address] = connecting
            connecting.add_done_callback(lambda done: self._forget_failed(address, done))
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise TransferError(f"the link to the prefill worker at {address} was closed before it was open") from None

    async def _connect(self, address: str) -> Peer:
        own = await self._codecs.speeds()

        def choose(giver: Hello, address: str, link: TakerLink) -> tuple[FirstThatWorks, LinkCodec]:
            transport = self._transport(giver, address, link)
            return transport, LinkCodec(self._codecs.setting, own, giver.encode_rates)

        return await Peer.connect(address, self._hello(), choose, self._forget)

    def _forget(self, peer: Peer) -> None:
        self._peers.pop(peer.address, None)

    def _forget_failed(self, address: str, done: asyncio.Task[Peer]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._peers.pop(address, None)

    def _hello(self) -> Hello:
        pool = self._pool
        return Hello(
            revision=REVISION, layout=pool.layout, num_blocks=pool.num_blocks, device=device_identity(pool.device)
        )

    def _transport(self, giver: Hello, address: str, link: TakerLink) -> FirstThatWorks:
        giver.check_joins(self._pool.layout)
        names = self._transports if self._transports is not None else preference(giver, self._pool)
        if self._codecs.forces:
            names = [name for name in names if name not in READS_IN_PLACE]
        known = makers(giver, address, self._pool, link.send, self._threads)

        def on_fallback(what: str) -> None:
            self.counters.fallbacks += 1
            logger.warning("giver at %s: %s", address, what)

        try:
            return FirstThatWorks({name: known[name] for name in names}, on_fallback)
        except Unusable as reason:
            raise TransferError(f"no transport reaches the giver at {address}: {reason}") from reason
