"""torch.distributed P2P: gloo between any two hosts, NCCL between CUDA devices.

The taker asks for batches of pieces (Pull), at most WINDOW ahead of what it has unpacked; the giver packs each into a
contiguous buffer and sends it in messages, which are packed, sent and unpacked at the same time. Both ends work on
staging buffers, so the blocks are free of the transport as soon as a copy within the machine is over, however long the
network takes: a receive that can't be aborted writes to staging only.

A job has a pair to itself and returns it when all went well. After an error or a cancel the pair is thrown away.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch._C._distributed_c10d import Work

from core.errors import TransferError, said_by_system
from core.links import host_and_port
from engine.kv_cache import Pool
from kv_transfer.messages import ClosePair, FromGiver, Hello, OpenPair, PairFailed, PairKey, Pull, ToGiver
from kv_transfer.transports.base import PullJob, Transport, Unusable, settled
from kv_transfer.transports.batches import (
    Batch,
    Staging,
    batches,
    device_identity,
    land,
    messages,
    staging_device,
)
from kv_transfer.transports.pairs import GIVER_RANK, TAKER_RANK, Group, PairEnd, wait

T = TypeVar("T")

MAX_PAIRS = 2
"""Jobs pulled at a time over one link. A pair costs each end a thread and two buffers of BATCH_BYTES."""
WINDOW = 2
"""Batches asked for and not yet unpacked: one on the wire while one is unpacked."""


class _TakerPair:
    """A pair with what the taker keeps beside it."""

    def __init__(self, backend: str, device: torch.device, send: Callable[[ToGiver], None]) -> None:
        self.pair_id = uuid.uuid4().hex
        self.end = PairEnd(backend, TAKER_RANK, device, lambda *pair: send(PairKey(self.pair_id, *pair)))
        self.staging = [Staging(device) for _ in range(WINDOW)]
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class TorchDistributed(Transport):
    """`giver_address` is host:port of the link. Raises Unusable when this host has no way there."""

    name: ClassVar[str] = "torch_distributed"

    def __init__(self, giver: Hello, pool: Pool, giver_address: str, send: Callable[[ToGiver], None]) -> None:
        self._pool = pool
        self._send = send
        self._host, port = host_and_port(giver_address)
        self._own_host = _own_host(self._host, port)
        self._backend = _backend(giver, pool)
        self._device = staging_device(self._backend, pool)
        self._loop = asyncio.get_running_loop()
        self._pairs: dict[str, _TakerPair] = {}
        self._idle: list[_TakerPair] = []
        self._turns = asyncio.Semaphore(MAX_PAIRS)

    async def pull(self, job: PullJob) -> None:
        async with self._turns:
            job.on_began()
            await self._pull(job)

    async def _pull(self, job: PullJob) -> None:
        pair = self._idle.pop() if self._idle else await self._open()
        puller = _Puller(job, pair, self._send_from_thread)
        try:
            await _unless_failed(pair, asyncio.wrap_future(pair.end.submit(puller.run)))
        except BaseException:
            await puller.quiet()
            self._discard(pair)
            raise
        self._idle.append(pair)

    def on_message(self, message: FromGiver) -> None:
        match message:
            case PairKey(pair_id, key, value) if (pair := self._pairs.get(pair_id)) is not None:
                pair.end.store.put(key, value)
            case PairFailed(pair_id, reason):
                self._fail(pair_id, reason)

    def forget(self, transfer_id: str) -> None:
        """Nothing is kept of a transfer."""

    def close(self) -> None:
        for pair_id in list(self._pairs):
            self._fail(pair_id, "the link to the giver has ended")

    def _send_from_thread(self, message: ToGiver) -> None:
        self._loop.call_soon_threadsafe(self._send, message)

    async def _open(self) -> _TakerPair:
        pair = _TakerPair(self._backend, self._device, self._send_from_thread)
        self._pairs[pair.pair_id] = pair
        try:
            self._send(OpenPair(pair.pair_id, self._backend, self._host))
            await _unless_failed(pair, asyncio.wrap_future(pair.end.build(self._own_host)))
        except BaseException:
            self._discard(pair)
            raise
        return pair

    def _fail(self, pair_id: str, reason: str) -> None:
        pair = self._pairs.get(pair_id)
        if pair is None:
            return
        if not pair.failed.done():
            pair.failed.set_result(reason)
        if pair in self._idle:
            self._idle.remove(pair)
            self._discard(pair)

    def _discard(self, pair: _TakerPair) -> None:
        if self._pairs.pop(pair.pair_id, None) is not None:
            self._send(ClosePair(pair.pair_id))
            pair.end.close()


class _Receive(NamedTuple):
    """A message that was asked for."""

    part: Batch
    buffer: torch.Tensor
    work: Work


class _Puller:
    """One job on one pair; `run` is the pair's thread."""

    def __init__(self, job: PullJob, pair: _TakerPair, send: Callable[[ToGiver], None]) -> None:
        self._job = job
        self._pair = pair
        self._send = send
        self._unpacking = threading.Lock()
        self._stopped = False

    def run(self, group: Group) -> None:
        """Receives that were posted are waited for even when nobody wants them any more: the group can't be dropped
        under them. If one fails the group has failed with all of them."""
        todo = enumerate(batches(self._job.coding, self._job.pieces))
        posted: deque[list[_Receive]] = deque()
        error: TransferError | None = None
        while True:
            while len(posted) < WINDOW and not self._stopped and (turn := next(todo, None)) is not None:
                posted.append(self._post(group, *turn))
            if not posted:
                break
            for part, buffer, work in posted.popleft():
                wait(work, self._pair.end.device)
                error = self._unpack(part, buffer) or error
        if error is not None:
            raise error

    async def quiet(self) -> None:
        """Returns when the slots are not written to and never will be again."""

        def stop() -> None:
            with self._unpacking:
                self._stopped = True

        await settled(asyncio.get_running_loop().run_in_executor(None, stop))

    def _post(self, group: Group, index: int, batch: Batch) -> list[_Receive]:
        job, first = self._job, self._job.first
        buffer = self._pair.staging[index % WINDOW].take(batch.nbytes)
        parts = [(part, buffer[place]) for part, place in messages(job.coding, job.pieces, batch)]
        receives = [_Receive(part, into, group.recv([into], GIVER_RANK, 0)) for part, into in parts]
        self._send(Pull(job.transfer_id, self._pair.pair_id, first + batch.first, first + batch.last, batch.nbytes))
        return receives

    def _unpack(self, batch: Batch, buffer: torch.Tensor) -> TransferError | None:
        job = self._job
        with self._unpacking:
            if self._stopped:
                return None
            try:
                land(job, batch, buffer)
            except TransferError as error:
                self._stopped = True
                return error
        return None


async def _unless_failed(pair: _TakerPair, work: asyncio.Future[T]) -> T:
    """The result of `work`, or TransferError as soon as the giver says that the pair has failed."""
    try:
        waiting: set[asyncio.Future[Any]] = {work, pair.failed}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:  # cancelled, nobody looks at how it ends, or has just ended
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
    if work.done():
        return work.result()
    raise TransferError(f"the giver dropped the pair: {pair.failed.result()}")


def _backend(giver: Hello, pool: Pool) -> str:
    both_cuda = pool.device.type == "cuda" and giver.device.startswith("cuda")
    return "nccl" if both_cuda and giver.device != device_identity(pool.device) else "gloo"


def _own_host(giver_host: str, port: int) -> str:
    """The address this host uses towards the giver. Connecting a datagram socket sends nothing. Raises Unusable if
    there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(giver_host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unusable(f"{giver_host} cannot be reached from here: {said_by_system(error)}") from error
