"""The giver's side of torch.distributed: builds the pairs that takers ask for and sends what they pull."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

import torch

from core.errors import TransferError
from engine.kv_cache import Pool
from kv_transfer.messages import FromGiver, OpenPair, PairFailed, PairKey, Pull
from kv_transfer.pieces import Rows
from kv_transfer.transports.batches import Staging, batches, pack, pack_frames, staging_device
from kv_transfer.transports.pairs import GIVER_RANK, TAKER_RANK, Group, PairEnd, wait
from kv_transfer.transports.reading import Reading


class PairServer:
    """The pairs of one link, at the giver. A Pull it can't honour breaks its pair: the taker's receive then ends."""

    def __init__(self, rows: Rows, pool: Pool, send: Callable[[FromGiver], None]) -> None:
        self._rows = rows
        self._pool = pool
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._pairs: dict[str, tuple[PairEnd, Staging]] = {}

    def open(self, ask: OpenPair) -> None:
        device = staging_device(ask.backend, self._pool)

        def publish(key: str, value: bytes) -> None:
            self._loop.call_soon_threadsafe(self._send, PairKey(ask.pair_id, key, value))

        pair = PairEnd(ask.backend, GIVER_RANK, device, publish)
        self._pairs[ask.pair_id] = (pair, Staging(device))
        self._watch(ask.pair_id, pair.build(ask.host))

    def on_key(self, told: PairKey) -> None:
        if (known := self._pairs.get(told.pair_id)) is not None:
            known[0].store.put(told.key, told.value)

    def pull(self, ask: Pull, reading: Reading) -> None:
        """Send what is asked for."""
        try:
            part = reading.part(ask.first, ask.last, ask.nbytes)
            if ask.pair_id not in self._pairs:
                raise TransferError("there is no such pair")
        except TransferError as error:
            reading.end()
            self.fail(ask.pair_id, error.message)
            return
        pair, staging = self._pairs[ask.pair_id]
        read = Future[None]()
        read.add_done_callback(lambda _: self._loop.call_soon_threadsafe(reading.end))

        def send(group: Group) -> None:
            buffer = staging.take(ask.nbytes)
            self._fill(buffer, part)
            read.set_result(None)
            wait(group.send([buffer], TAKER_RANK, 0), pair.device)

        sent = pair.submit(send)
        sent.add_done_callback(lambda _: None if read.done() else read.set_result(None))
        self._watch(ask.pair_id, sent)

    def _fill(self, buffer: torch.Tensor, reading: Reading) -> None:
        at = 0
        for batch in batches(reading.coding, reading.pieces):
            part = buffer[at : at + batch.nbytes]
            if batch.framed:
                pack_frames(part, reading.frames(batch))
            else:
                pack(part, self._rows, reading.slots, reading.pieces[batch.first : batch.last])
            at += batch.nbytes

    def fail(self, pair_id: str, reason: str) -> None:
        self.close_pair(pair_id)
        self._send(PairFailed(pair_id, reason))

    def close_pair(self, pair_id: str) -> None:
        known = self._pairs.pop(pair_id, None)
        if known is not None:
            known[0].close()

    def close(self) -> None:
        for pair_id in list(self._pairs):
            self.close_pair(pair_id)

    def _watch(self, pair_id: str, work: Future[None]) -> None:
        def ended(future: Future[None]) -> None:
            if error := future.exception():
                self._loop.call_soon_threadsafe(self._broken, pair_id, str(error))

        work.add_done_callback(ended)

    def _broken(self, pair_id: str, reason: str) -> None:
        if pair_id in self._pairs:
            self.fail(pair_id, reason)
