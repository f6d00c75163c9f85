"""The giver's side of torch.distributed: builds the pairs that takers ask for and sends what they pull."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch._C._distributed_c10d import Work

from core.errors import TransferError
from engine.kv_cache import Pool
from kv_transfer.messages import FromGiver, OpenPair, PairFailed, PairKey, Pull
from kv_transfer.pieces import Rows
from kv_transfer.transports.batches import Batch, Staging, messages, pack, pack_frames, staging_device
from kv_transfer.transports.pairs import GIVER_RANK, TAKER_RANK, Group, PairEnd, wait
from kv_transfer.transports.reading import Reading

STAGED = 2
"""Batches packed and not yet sent: one on the wire while one is packed."""


class _GiverPair:
    """A pair with what the giver keeps beside it."""

    def __init__(self, end: PairEnd, rows: Rows) -> None:
        self.end = end
        self._rows = rows
        self._staging = deque(Staging(end.device) for _ in range(STAGED))
        self._asked: deque[Reading] = deque()
        self._under_way: deque[list[Work]] = deque()

    def send(self, reading: Reading, on_read: Callable[[], None]) -> Future[None]:
        """The pieces of a reading, after what was asked for before. `on_read` is called in the pair's thread, once the
        blocks have been read; not at all if that fails."""
        self._asked.append(reading)
        return self.end.submit(lambda group: self._send(group, on_read))

    def _send(self, group: Group, on_read: Callable[[], None]) -> None:
        reading = self._asked.popleft()
        while len(self._under_way) >= STAGED:
            self._await_oldest()
        self._staging.rotate()
        whole = Batch(0, len(reading.pieces), sum(map(reading.coding.wire_bytes, reading.pieces)), framed=False)
        buffer = self._staging[0].take(whole.nbytes)
        self._under_way.append([])
        for part, place in messages(reading.coding, reading.pieces, whole):
            self._fill(buffer[place], reading, part)
            self._under_way[-1].append(group.send([buffer[place]], TAKER_RANK, 0))
        on_read()
        while self._under_way and not self._asked:  # else it is for who sends the next
            self._await_oldest()

    def _await_oldest(self) -> None:
        for work in self._under_way[0]:
            wait(work, self.end.device)
        self._under_way.popleft()

    def _fill(self, buffer: torch.Tensor, reading: Reading, part: Batch) -> None:
        if part.framed:
            pack_frames(buffer, reading.frames(part))
        else:
            pack(buffer, self._rows, reading.slots, reading.pieces[part.first : part.last])


class PairServer:
    """The pairs of one link, at the giver. A Pull it can't honour breaks its pair: the taker's receive then ends."""

    def __init__(self, rows: Rows, pool: Pool, send: Callable[[FromGiver], None]) -> None:
        self._rows = rows
        self._pool = pool
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._pairs: dict[str, _GiverPair] = {}

    def open(self, ask: OpenPair) -> None:
        device = staging_device(ask.backend, self._pool)

        def publish(key: str, value: bytes) -> None:
            self._loop.call_soon_threadsafe(self._send, PairKey(ask.pair_id, key, value))

        end = PairEnd(ask.backend, GIVER_RANK, device, publish)
        self._pairs[ask.pair_id] = _GiverPair(end, self._rows)
        self._watch(ask.pair_id, end.build(ask.host))

    def on_key(self, told: PairKey) -> None:
        if (known := self._pairs.get(told.pair_id)) is not None:
            known.end.store.put(told.key, told.value)

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
        read = Future[None]()
        read.add_done_callback(lambda _: self._loop.call_soon_threadsafe(reading.end))
        sent = self._pairs[ask.pair_id].send(part, lambda: read.set_result(None))
        sent.add_done_callback(lambda _: None if read.done() else read.set_result(None))
        self._watch(ask.pair_id, sent)

    def fail(self, pair_id: str, reason: str) -> None:
        self.close_pair(pair_id)
        self._send(PairFailed(pair_id, reason))

    def close_pair(self, pair_id: str) -> None:
        known = self._pairs.pop(pair_id, None)
        if known is not None:
            known.end.close()

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
