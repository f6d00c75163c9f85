"""The giving side of hand-offs: offers of a prefill worker, and the links of the decode workers that take them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from core.errors import TransferError
from engine.kv_cache import KVPool, Pool
from kv_transfer import states
from kv_transfer.codecs.names import CodecName
from kv_transfer.codecs.policy import CodecPolicy
from kv_transfer.counters import TransferCounters
from kv_transfer.giving import GiverLink, Giving
from kv_transfer.messages import (
    REVISION,
    Cancel,
    ClosePair,
    Committed,
    Expect,
    Hello,
    OpenPair,
    PairFailed,
    PairKey,
    Pull,
    Renew,
    SequenceState,
    TcpEndpoint,
    ToGiver,
    Verified,
    Want,
    Withdrawn,
)
from kv_transfer.pieces import Frontier
from kv_transfer.sealing import Source
from kv_transfer.states import GiverTransfer, Outcome
from kv_transfer.transports.batches import device_identity
from kv_transfer.transports.nixl import NixlPool
from kv_transfer.transports.pair_server import PairServer
from kv_transfer.transports.reading import Reading
from kv_transfer.transports.shared_memory import PoolProbe
from kv_transfer.transports.tcp_server import TcpServer

logger = logging.getLogger(__name__)

OnReleased = Callable[[str, str], None]
"""Called with transfer id and outcome (a states.Outcome) when nothing can read the blocks of an offer any more."""

MAX_REMEMBERED = 4096
"""Transfers that have ended are remembered, the youngest this many, to answer a taker that asks late."""


class Giver:
    """Use from one event loop. `open` passes the blocks to the giver; `on_released` gives them back, exactly once, on
    that loop, possibly before `open` or another method returns. Between the two their owner does nothing to them but
    write KV, and says so: what was written once stays as it is."""

    def __init__(
        self,
        pool: Pool,
        *,
        lease_s: float = 10.0,
        on_released: OnReleased,
        tcp_host: str | None = None,
        nixl: bool = False,
        codecs: CodecPolicy | None = None,
    ) -> None:
        """`tcp_host` is the address on which takers find the TCP data plane; without one there is none. `nixl` offers
        the pool over NIXL as well. With `codecs` that leave a choice, takers are told what they need for theirs; in
        which codec KV is given is up to them. Raises ConfigError for what can't be had."""
        self.counters = TransferCounters()
        self._pool = pool
        self._lease_s = lease_s
        self._on_released = on_released
        self._codecs = codecs or CodecPolicy("none", pool.layout, pool.device)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kv-seal")
        self._source = Source.of(pool, self._threads)
        self._live: dict[str, Giving] = {}
        self._ended: OrderedDict[str, Giving] = OrderedDict()
        self._probe = PoolProbe(pool) if isinstance(pool, KVPool) and pool.fd is not None else None
        self._tcp = TcpServer(self._source.rows, tcp_host) if tcp_host is not None else None
        self._nixl = NixlPool(pool) if nixl else None

    def open(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int) -> None:
        """The KV of `num_tokens` tokens will be in these blocks. A transfer is opened once."""
        self._giving(transfer_id).open(block_ids, num_tokens)

    def written(self, transfer_id: str, frontier: Frontier, ready: torch.cuda.Event | None = None) -> None:
        """So much of the KV of an opened transfer is final: on CUDA once `ready` has happened, which by default is when
        all that is enqueued now has run. Does nothing for a transfer that has ended."""
        if (giving := self._live.get(transfer_id)) is not None:
            giving.written(frontier, ready or self.written_by_now())

    def complete(self, transfer_id: str, state: SequenceState) -> None:
        """All KV of an opened transfer is final. Does nothing for a transfer that has ended."""
        if (giving := self._live.get(transfer_id)) is not None:
            giving.complete(state, self.written_by_now())

    def written_by_now(self) -> torch.cuda.Event | None:
        """For `written`, from any thread: when what is enqueued on its current stream has run. None on the CPU."""
        return self._source.written_by_now()

    def withdraw(self, transfer_id: str, reason: str, *, finished: bool = False) -> None:
        """The request is dropped: there will be no offer, or it no longer stands. `finished`: because it ended here
        and whoever asked for it has been told. Does nothing for a transfer that has ended."""
        self._giving(transfer_id).feed(states.Withdraw(reason, finished=finished))

    async def on_link(self, link: GiverLink) -> None:
        """Serve one taker until its link ends; for LinkServer.add_service. Raises LayoutMismatch if its cache can't be
        joined with ours."""
        speeds = await self._codecs.speeds()
        tcp = self._tcp.admit(lambda transfer_id: self._read(transfer_id, link)) if self._tcp is not None else None
        link.send(self._hello(tcp, {name: speed.encode for name, speed in speeds.items()}))
        pairs = PairServer(self._source.rows, self._pool, link.send)
        try:
            async for message in link:
                self._on_message(message, link, pairs)
        finally:
            for giving in list(self._live.values()):
                if giving.link is link:
                    giving.feed(states.LinkLost(f"the link to the taker at {link.peer} has ended"))
            pairs.close()
            if self._tcp is not None and tcp is not None:
                self._tcp.dismiss(tcp)

    async def close(self) -> None:
        """End everything, so that it is served in another way, and wait until nothing of ours reads the pool."""
        for giving in list(self._live.values()):
            giving.feed(states.Withdraw("the prefill worker is stopping", Outcome.FAILED))
        await asyncio.gather(*(giving.over.wait() for giving in self._live.values()))
        if self._tcp is not None:
            await self._tcp.close()
        if self._nixl is not None:
            self._nixl.close()
            self._nixl = None
        self._threads.shutdown()
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _hello(self, tcp: TcpEndpoint | None, encode_rates: dict[CodecName, float]) -> Hello:
        return Hello(
            revision=REVISION,
            layout=self._pool.layout,
            num_blocks=self._pool.num_blocks,
            device=device_identity(self._pool.device),
            lease_s=self._lease_s,
            shared_pool=self._probe.shared_pool if self._probe is not None else None,
            tcp=tcp,
            nixl=self._nixl.endpoint if self._nixl is not None else None,
            encode_rates=encode_rates,
        )

    def _on_message(self, message: ToGiver, link: GiverLink, pairs: PairServer) -> None:
        match message:
            case Hello():
                message.check_joins(self._pool.layout)
            case OpenPair():
                pairs.open(message)
            case PairKey():
                pairs.on_key(message)
            case ClosePair(pair_id):
                pairs.close_pair(pair_id)
            case Expect(transfer_id):
                self._on_asked(transfer_id, link, lambda giving: giving.feed(states.Expected()))
            case Want(transfer_id, start_token, codec):
                self._on_asked(transfer_id, link, lambda giving: giving.wanted(start_token, codec))
            case _:
                giving = self._live.get(message.transfer_id) or self._ended.get(message.transfer_id)
                if giving is None or giving.link is not link:
                    self._on_unknown(message, link)
                else:
                    giving.on_message(message, pairs)

    def _on_asked(self, transfer_id: str, link: GiverLink, hear: Callable[[Giving], None]) -> None:
        giving = self._giving(transfer_id)
        if giving.link is None:
            giving.link = link
        if giving.link is link:
            hear(giving)
        else:
            link.send(Withdrawn(transfer_id, "another decode worker takes it", Outcome.FAILED))

    def _read(self, transfer_id: str, link: GiverLink) -> Reading:
        """For the TCP server: a transfer of this link whose blocks it wants to read."""
        giving = self._live.get(transfer_id)
        if giving is None or giving.link is not link:
            raise TransferError(f"transfer {transfer_id} is not under way here")
        return giving.read()

    def _on_unknown(self, message: Renew | Verified | Committed | Cancel | Pull, link: GiverLink) -> None:
        match message:
            case Renew(transfer_id):
                link.send(Withdrawn(transfer_id, "the giver does not know this transfer", Outcome.FAILED))
            case Pull(pair_id=pair_id):
                link.send(PairFailed(pair_id, "the giver does not know this transfer"))
            case _:
                logger.info("%s for a transfer this giver does not know: %s", type(message).__name__, message)

    def _giving(self, transfer_id: str) -> Giving:
        known = self._live.get(transfer_id) or self._ended.get(transfer_id)
        if known is None:
            machine = GiverTransfer(self._lease_s)
            known = self._live[transfer_id] = Giving(transfer_id, self._source, machine, self)
        return known

    # --- for Giving --------------------------------------------------------------------------------------------------

    def draining(self, giving: Giving) -> None:
        """What still reads its blocks does so for nothing."""
        if self._tcp is not None:
            self._tcp.stop(giving.transfer_id)

    def naming(self, giving: Giving) -> None:
        """Who has asked for them before may have them now."""
        if self._tcp is not None:
            self._tcp.look(giving.transfer_id)

    def ended(self, giving: Giving) -> None:
        """Keep it to answer for it."""
        if self._tcp is not None:
            self._tcp.look(giving.transfer_id)
        if self._live.pop(giving.transfer_id, None) is not None:
            self._ended[giving.transfer_id] = giving
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def released(self, giving: Giving, outcome: Outcome, reason: str) -> None:
        """The blocks go back. Last in the life of a transfer that was opened."""
        self.counters.count(outcome)
        if outcome is Outcome.COMMITTED:
            self.counters.encode_seconds += giving.encode_seconds
            logger.info("transfer %s is over, encode %.1f ms", giving.transfer_id, 1e3 * giving.encode_seconds)
        else:
            logger.info("transfer %s %s: %s", giving.transfer_id, outcome, reason)
        self._on_released(giving.transfer_id, outcome.value)
