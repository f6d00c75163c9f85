"""The taking side of hand-offs: pulls the KV of a prompt from a prefill worker into blocks reserved for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from core.errors import LeaseExpired, TransferError
from engine.kv_cache import KVPool
from kv_transfer import messages, states
from kv_transfer.alarm import Alarm
from kv_transfer.counters import TransferCounters
from kv_transfer.messages import Hello, Manifest, Offer, Renewed, SequenceState
from kv_transfer.peers import Peer, TakerLink
from kv_transfer.pieces import Extent, Rows, cut, piece_bytes, rows_of, slots_of
from kv_transfer.states import Outcome, Phase, TakerTransfer
from kv_transfer.transports.base import PullJob, Transport, Unusable
from kv_transfer.transports.shared_memory import SharedMemory
from kv_transfer.transports.torch_distributed import TorchDistributed, device_identity

logger = logging.getLogger(__name__)

TRANSPORTS = (SharedMemory.name, TorchDistributed.name)
"""In order of preference."""


class Withdrawn(TransferError):
    """Nobody wants the request any more, says the giver. Every other failure means: serve it in another way."""


class Taker:
    """Use from one event loop. `transports` are tried in order, once per link. `stall_s` bounds the time between two
    pieces of a transfer."""

    def __init__(self, pool: KVPool, *, transports: Sequence[str] = TRANSPORTS, stall_s: float = 5.0) -> None:
        self.counters = TransferCounters()
        self._pool = pool
        self._rows = rows_of(pool)
        self._transports = transports
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
    ) -> SequenceState:
        """Fill the blocks with the KV of tokens start_token .. num_tokens - 1 of a transfer that the giver at `address`
        has offered or will offer. Tokens before `start_token` are not touched. `deadline` is Unix time.

        Returns with every piece verified, or raises: Withdrawn, LayoutMismatch, ChecksumMismatch, LeaseExpired (one side
        was not heard of in time, or the deadline passed) or another TransferError. In every case, cancellation included,
        nothing writes to the blocks any more when this returns."""
        block_size = self._pool.layout.block_size
        if not 0 <= start_token <= num_tokens <= len(block_ids) * block_size:
            raise ValueError(f"tokens {start_token} to {num_tokens} do not fit {len(block_ids)} blocks of {block_size}")
        left = deadline - time.time()
        try:
            async with asyncio.timeout(left):
                peer = await self._peer(address)
        except TimeoutError as error:
            raise LeaseExpired(f"transfer {transfer_id}: the deadline of the request has passed") from error
        if transfer_id in peer.recipients:
            raise ValueError(f"transfer {transfer_id} is being taken already")
        machine = TakerTransfer(peer.giver.lease_s or 0.0, self._stall_s, time.monotonic() + deadline - time.time())
        return await _Taking(transfer_id, peer, self, machine, block_ids, start_token, num_tokens).run()

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
            connecting = asyncio.create_task(Peer.connect(address, self._hello(), self._choose, self._forget))
            self._peers[address] = connecting
            connecting.add_done_callback(lambda done: self._forget_failed(address, done))
        return await asyncio.shield(connecting)

    def _forget(self, peer: Peer) -> None:
        self._peers.pop(peer.address, None)

    def _forget_failed(self, address: str, done: asyncio.Task[Peer]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._peers.pop(address, None)

    def _hello(self) -> Hello:
        pool = self._pool
        return Hello(layout=pool.layout, num_blocks=pool.num_blocks, device=device_identity(pool.device))

    def _choose(self, giver: Hello, address: str, link: TakerLink) -> Transport:
        self._pool.layout.check_same_cache(giver.layout)
        for name in self._transports:
            try:
                if name == SharedMemory.name:
                    return SharedMemory(giver, self._pool, self._threads)
                return TorchDistributed(giver, self._pool, address, link.send)
            except Unusable as reason:
                self.counters.fallbacks += 1
                logger.warning("transport %s cannot be used with the giver at %s: %s", name, address, reason)
        raise TransferError(f"no transport reaches the giver at {address}; tried {', '.join(self._transports)}")

    # --- for _Taking -------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> KVPool:
        return self._pool

    @property
    def rows(self) -> Rows:
        return self._rows


class _Taking:
    """One transfer at the taker: feeds its machine and carries out what it says."""

    def __init__(
        self,
        transfer_id: str,
        peer: Peer,
        taker: Taker,
        machine: TakerTransfer,
        block_ids: Sequence[int],
        start_token: int,
        num_tokens: int,
    ) -> None:
        self._id = transfer_id
        self._peer = peer
        self._taker = taker
        self._machine = machine
        self._block_ids = block_ids
        self._start_token = start_token
        self._num_tokens = num_tokens
        self._offer: Offer | None = None
        self._offered_at = 0.0
        self._pulling: asyncio.Task[None] | None = None
        self._cause: TransferError | None = None
        self._over = asyncio.Event()
        self._alarm = Alarm(lambda: self._feed(states.Tick()))

    async def run(self) -> SequenceState:
        self._peer.recipients[self._id] = self
        try:
            self._feed(states.Begin())
            await self._over.wait()
        except asyncio.CancelledError:
            self._feed(states.CancelRequested())
            await self._quiet()
            raise
        finally:
            del self._peer.recipients[self._id]
        if self._machine.outcome is not Outcome.COMMITTED or self._offer is None:
            raise self._cause or self._failure()
        return self._offer.state

    async def _quiet(self) -> None:
        """The blocks may be freed when this returns, so a second cancellation can't cut it short."""
        while not self._over.is_set():
            try:
                await self._over.wait()
            except asyncio.CancelledError:
                continue

    # --- events ------------------------------------------------------------------------------------------------------

    def on_message(self, message: Offer | Renewed | messages.Withdrawn) -> None:
        match message:
            case Offer():
                self._on_offer(message)
            case Renewed(sent_at=sent_at):
                self._feed(states.Renewal(sent_at))
            case messages.Withdrawn(reason=reason, outcome=outcome):
                self._feed(states.Withdraw(reason, outcome if outcome is not Outcome.COMMITTED else Outcome.FAILED))

    def on_link_lost(self, reason: str) -> None:
        self._feed(states.LinkLost(reason))

    def _on_offer(self, offer: Offer) -> None:
        if self._offer is not None:
            return
        self._offer, self._offered_at = offer, time.monotonic()
        try:
            self._check(offer.manifest)
        except TransferError as error:
            self._cause = error
            self._feed(states.OfferUnusable(error.message))
        else:
            self._feed(states.OfferReceived(len(offer.manifest.pieces)))

    def _check(self, manifest: Manifest) -> None:
        """What follows writes where the manifest says and reads a peer's memory, so nothing in it is taken on trust."""
        layout, giver = manifest.layout, self._peer.giver
        self._taker.pool.layout.check_same_cache(layout)
        if (manifest.start_token, manifest.num_tokens) != (self._start_token, self._num_tokens):
            raise TransferError(
                f"transfer {self._id} holds tokens {manifest.start_token} to {manifest.num_tokens} at the giver, "
                f"{self._start_token} to {self._num_tokens} were asked for; the two sides disagree about the prompt"
            )
        blocks = manifest.block_ids
        enough = len(blocks) * layout.block_size >= manifest.num_tokens
        if layout != giver.layout or not enough or not all(0 <= block < giver.num_blocks for block in blocks):
            raise TransferError(f"the manifest of transfer {self._id} does not fit the pool that the giver announced")
        cover = [Extent(piece.token, piece.num_tokens, piece.layer, piece.num_layers) for piece in manifest.pieces]
        if cover != list(cut(layout, self._start_token, self._num_tokens)):
            raise TransferError(f"the pieces of transfer {self._id} do not cover its tokens and layers once")

    def _pull_ended(self, pulling: asyncio.Task[None]) -> None:
        if pulling.cancelled():
            self._feed(states.PullEnded("stopped"))
        elif error := pulling.exception():
            if not isinstance(error, TransferError):
                logger.error("the transport of transfer %s failed", self._id, exc_info=error)
                error = TransferError(f"transfer {self._id}: {type(error).__name__}: {error}")
            if self._machine.phase is Phase.TRANSFERRING:
                self._cause = error
            self._feed(states.PullEnded(str(error)))
        else:
            self._feed(states.PullEnded())

    # --- instructions ------------------------------------------------------------------------------------------------

    def _feed(self, event: states.Event) -> None:
        for instruction in self._machine.handle(event, time.monotonic()):
            self._carry_out(instruction)
        self._alarm.set(self._machine.wake_at)

    def _carry_out(self, instruction: states.Instruction) -> None:
        send = self._peer.link.send
        match instruction:
            case states.SendWant():
                send(messages.Want(self._id, self._start_token))
            case states.SendRenew(sent_at):
                send(messages.Renew(self._id, sent_at))
            case states.SendCommitted():
                send(messages.Committed(self._id))
            case states.SendCancel(reason):
                send(messages.Cancel(self._id, reason))
            case states.StartPull():
                self._pulling = asyncio.create_task(self._peer.transport.pull(self._job()))
                self._pulling.add_done_callback(self._pull_ended)
            case states.StopPull():
                assert self._pulling is not None
                self._pulling.cancel()
            case states.Release(outcome):
                self._count(outcome)
                self._over.set()

    def _job(self) -> PullJob:
        assert self._offer is not None
        loop = asyncio.get_running_loop()

        def began() -> None:
            loop.call_soon_threadsafe(self._feed, states.PullBegan())

        def verified(index: int) -> None:
            loop.call_soon_threadsafe(self._feed, states.PieceVerified(index))

        return PullJob(
            manifest=self._offer.manifest,
            rows=self._taker.rows,
            slots=slots_of(self._block_ids, self._taker.pool.layout.block_size, self._start_token, self._num_tokens),
            on_began=began,
            on_verified=verified,
        )

    def _count(self, outcome: Outcome) -> None:
        counters = self._taker.counters
        counters.count(outcome)
        if outcome is Outcome.COMMITTED and self._offer is not None:
            manifest = self._offer.manifest
            counters.bytes += sum(piece_bytes(manifest.layout, piece) for piece in manifest.pieces)
            counters.seconds += time.monotonic() - self._offered_at

    def _failure(self) -> TransferError:
        kind = {Outcome.ABORTED: Withdrawn, Outcome.EXPIRED: LeaseExpired}.get(
            self._machine.outcome or Outcome.FAILED, TransferError
        )
        return kind(f"transfer {self._id} from {self._peer.address}: {self._machine.reason}")
