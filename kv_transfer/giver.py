"""The giving side of hand-offs: offers of a prefill worker, and the links of the decode workers that take them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from core.links import Link
from engine.kv_cache import KVPool
from kv_transfer import states
from kv_transfer.alarm import Alarm
from kv_transfer.counters import TransferCounters
from kv_transfer.messages import (
    Cancel,
    ClosePair,
    Committed,
    Expect,
    FromGiver,
    Hello,
    Manifest,
    Offer,
    OpenPair,
    PairFailed,
    PairKey,
    Pull,
    Renew,
    Renewed,
    SequenceState,
    ToGiver,
    Want,
    Withdrawn,
)
from kv_transfer.pieces import Slots, cut, piece_bytes, rows_of, seal, slots_of
from kv_transfer.states import GiverTransfer, Outcome, Phase
from kv_transfer.transports.batches import device_identity
from kv_transfer.transports.pair_server import PairServer
from kv_transfer.transports.shared_memory import PoolProbe

logger = logging.getLogger(__name__)

GiverLink = Link[ToGiver, FromGiver]
OnReleased = Callable[[str, str], None]
"""Called with transfer id and outcome (a states.Outcome) when nothing can read the blocks of an offer any more."""

MAX_REMEMBERED = 4096
"""Transfers that have ended are remembered, the youngest this many, to answer a taker that asks late."""


class Giver:
    """Use from one event loop. `offer` passes the blocks to the giver; `on_released` gives them back, exactly once,
    on that loop, possibly before `offer` or `withdraw` returns."""

    def __init__(self, pool: KVPool, *, lease_s: float = 10.0, on_released: OnReleased) -> None:
        self.counters = TransferCounters()
        self._pool = pool
        self._rows = rows_of(pool)
        self._lease_s = lease_s
        self._on_released = on_released
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kv-seal")
        self._live: dict[str, _Giving] = {}
        self._ended: OrderedDict[str, _Giving] = OrderedDict()
        self._probe = PoolProbe(pool) if pool.fd is not None else None

    def offer(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, state: SequenceState) -> None:
        """The KV of `num_tokens` tokens is in these blocks, complete. A transfer id is offered once."""
        giving = self._giving(transfer_id)
        giving.block_ids, giving.num_tokens, giving.state = list(block_ids), num_tokens, state
        giving.feed(states.Offered())

    def withdraw(self, transfer_id: str, reason: str, *, finished: bool = False) -> None:
        """The request is dropped: there will be no offer, or it no longer stands. `finished`: because it ended here
        and whoever asked for it has been told. Does nothing for a transfer that has ended."""
        self._giving(transfer_id).feed(states.Withdraw(reason, finished=finished))

    async def on_link(self, link: GiverLink) -> None:
        """Serve one taker until its link ends; for LinkServer.add_service. Raises LayoutMismatch if its cache can't be
        joined with ours."""
        link.send(self._hello())
        pairs = PairServer(self._rows, self._pool, link.send)
        try:
            async for message in link:
                self._on_message(message, link, pairs)
        finally:
            for giving in list(self._live.values()):
                if giving.link is link:
                    giving.feed(states.LinkLost(f"the link to the taker at {link.peer} has ended"))
            pairs.close()

    async def close(self) -> None:
        """End everything, so that it is served in another way, and wait until nothing of ours reads the pool."""
        for giving in list(self._live.values()):
            giving.feed(states.Withdraw("the prefill worker is stopping", Outcome.FAILED))
        await asyncio.gather(*(giving.over.wait() for giving in self._live.values()))
        self._threads.shutdown()
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _hello(self) -> Hello:
        return Hello(
            layout=self._pool.layout,
            num_blocks=self._pool.num_blocks,
            device=device_identity(self._pool.device),
            lease_s=self._lease_s,
            shared_pool=self._probe.shared_pool if self._probe is not None else None,
        )

    def _on_message(self, message: ToGiver, link: GiverLink, pairs: PairServer) -> None:
        match message:
            case Hello(layout=layout):
                self._pool.layout.check_same_cache(layout)
            case OpenPair():
                pairs.open(message)
            case PairKey():
                pairs.on_key(message)
            case ClosePair(pair_id):
                pairs.close_pair(pair_id)
            case Expect(transfer_id):
                self._on_asked(transfer_id, states.Expected(), link)
            case Want(transfer_id, start_token):
                self._on_asked(transfer_id, states.Wanted(start_token), link)
            case _:
                giving = self._live.get(message.transfer_id) or self._ended.get(message.transfer_id)
                if giving is None or giving.link is not link:
                    self._on_unknown(message, link)
                else:
                    giving.on_message(message, pairs)

    def _on_asked(self, transfer_id: str, event: states.Expected | states.Wanted, link: GiverLink) -> None:
        giving = self._giving(transfer_id)
        if giving.link is None:
            giving.link = link
        if giving.link is link:
            giving.feed(event)
        else:
            link.send(Withdrawn(transfer_id, "another decode worker takes it", Outcome.FAILED))

    def _on_unknown(self, message: Renew | Committed | Cancel | Pull, link: GiverLink) -> None:
        match message:
            case Renew(transfer_id):
                link.send(Withdrawn(transfer_id, "the giver does not know this transfer", Outcome.FAILED))
            case Pull(pair_id=pair_id):
                link.send(PairFailed(pair_id, "the giver does not know this transfer"))
            case _:
                logger.info("%s for a transfer this giver does not know: %s", type(message).__name__, message)

    def _giving(self, transfer_id: str) -> _Giving:
        known = self._live.get(transfer_id) or self._ended.get(transfer_id)
        if known is None:
            known = self._live[transfer_id] = _Giving(transfer_id, self, self._lease_s)
        return known

    # --- for _Giving -------------------------------------------------------------------------------------------------

    async def seal(self, giving: _Giving, start_token: int) -> Manifest:
        """The manifest; checksums are computed in a thread."""
        layout = self._pool.layout
        if not 0 <= start_token <= giving.num_tokens:
            raise ValueError(f"start_token {start_token} is not within the {giving.num_tokens} tokens of the prompt")
        giving.slots = slots_of(giving.block_ids, layout.block_size, start_token, giving.num_tokens)
        extents = list(cut(layout, start_token, giving.num_tokens))
        pieces = await asyncio.get_running_loop().run_in_executor(
            self._threads, seal, self._rows, giving.slots, extents
        )
        return Manifest(
            transfer_id=giving.transfer_id,
            layout=layout,
            start_token=start_token,
            num_tokens=giving.num_tokens,
            block_ids=giving.block_ids,
            pieces=pieces,
        )

    def ended(self, giving: _Giving) -> None:
        """Keep only what is needed to answer for it."""
        if self._live.pop(giving.transfer_id, None) is not None:
            self._ended[giving.transfer_id] = giving
        giving.manifest = giving.slots = None
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def released(self, giving: _Giving, outcome: Outcome, reason: str) -> None:
        """The blocks go back. Last in the life of a transfer that was offered."""
        self.counters.count(outcome)
        if outcome is Outcome.COMMITTED and giving.manifest is not None:
            layout = self._pool.layout
            self.counters.bytes += sum(piece_bytes(layout, piece) for piece in giving.manifest.pieces)
            self.counters.seconds += time.monotonic() - giving.ready_at
        else:
            logger.info("transfer %s %s: %s", giving.transfer_id, outcome, reason)
        self._on_released(giving.transfer_id, outcome.value)


class _Giving:
    """One transfer at the giver: feeds its machine and carries out what it says."""

    def __init__(self, transfer_id: str, giver: Giver, lease_s: float) -> None:
        self.transfer_id = transfer_id
        self.link: GiverLink | None = None
        self.block_ids: list[int] = []
        self.num_tokens = 0
        self.state: SequenceState | None = None
        self.slots: Slots | None = None
        self.manifest: Manifest | None = None
        self.ready_at = 0.0
        self.over = asyncio.Event()
        self._giver = giver
        self._machine = GiverTransfer(lease_s)
        self._alarm = Alarm(lambda: self.feed(states.Tick()))
        self._sealing: asyncio.Task[Manifest] | None = None

    def feed(self, event: states.Event) -> None:
        for instruction in self._machine.handle(event, time.monotonic()):
            self._carry_out(instruction)
        self._alarm.set(self._machine.wake_at)
        if self._machine.phase is Phase.RELEASED:
            self.over.set()
            self._giver.ended(self)

    def on_message(self, message: Renew | Committed | Cancel | Pull, pairs: PairServer) -> None:
        match message:
            case Renew(sent_at=sent_at):
                self.feed(states.Renewal(sent_at))
            case Committed():
                self.feed(states.CommitReceived())
            case Cancel(reason=reason):
                self.feed(states.CancelReceived(reason))
            case Pull(pair_id=pair_id) if not self._machine.may_read:
                pairs.fail(pair_id, f"transfer {self.transfer_id} has ended")
            case Pull():
                assert self.manifest is not None
                assert self.slots is not None
                self.feed(states.ReadStarted())
                pairs.pull(message, self.manifest, self.slots, lambda: self.feed(states.ReadEnded()))

    def _carry_out(self, instruction: states.Instruction) -> None:
        match instruction:
            case states.Prepare(start_token):
                self.ready_at = time.monotonic()
                self._sealing = asyncio.create_task(self._giver.seal(self, start_token))
                self._sealing.add_done_callback(self._sealed)
            case states.SendOffer():
                assert self.manifest is not None
                assert self.state is not None
                self._send(Offer(self.manifest, self.state))
            case states.SendRenewed(sent_at):
                self._send(Renewed(self.transfer_id, sent_at))
            case states.SendWithdrawn(reason, outcome, finished):
                self._send(Withdrawn(self.transfer_id, reason, outcome, finished))
            case states.Release(outcome, reason):
                self._giver.released(self, outcome, reason)

    def _sealed(self, sealing: asyncio.Task[Manifest]) -> None:
        if error := sealing.exception():
            logger.error("cannot offer transfer %s", self.transfer_id, exc_info=error)
            self.feed(states.Prepared(f"the giver cannot offer it: {error}"))
        else:
            self.manifest = sealing.result()
            self.feed(states.Prepared())

    def _send(self, message: FromGiver) -> None:
        assert self.link is not None
        self.link.send(message)
