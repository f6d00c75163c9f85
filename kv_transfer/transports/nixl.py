"""NIXL, an optional extra: one-sided reads of the giver's pool through UCX, over RDMA, shared memory or TCP as UCX
finds them.

The giver registers its pool and announces it; from then on it takes no part. The taker reads batches into a registered
buffer and copies them into its slots: a read on its way can't be taken back, so it must never be aimed at blocks that
may be given to somebody else. As with shared memory, blocks that change under a read are found out by their checksum.

An agent belongs to one link and is thrown away on any error or cancel. A buffer that a read may still write to is kept
until the read has ended, or as long as the process if it never does.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch

from core.errors import ConfigError, TransferError
from engine.kv_cache import KVPool, Pool
from kv_transfer.messages import FromGiver, Hello, NixlEndpoint
from kv_transfer.pieces import Runs, Slots, row_bytes, runs
from kv_transfer.transports.base import PullJob, Transport, Unusable, finished
from kv_transfer.transports.batches import Batch, batches, land

STALL_S = 3.0
"""A read that takes longer is given up. Less than a taker allows between two pieces, so that another transport gets its
chance."""
_POLL_S = 5e-5
"""Between two looks at a read that is under way. NIXL has nothing that could be waited for."""
_BACKENDS = ["UCX"]


def installed() -> bool:
    return find_spec("nixl") is not None


class NixlPool:
    """The giver's side: its pool, registered. Raises ConfigError if NIXL is absent or can't register it."""

    def __init__(self, pool: Pool) -> None:
        if not isinstance(pool, KVPool):
            raise ConfigError("kv_transport nixl cannot give a KV cache that is spread over GPUs; leave it at auto")
        if not installed():
            raise ConfigError("kv_transport nixl needs the nixl package; pip install 'slipstream[nixl]'")
        api = import_module("nixl")
        try:
            self._agent = _agent(api)
            memory, device = _memory_of(pool.device)
            base, nbytes = pool.data.data_ptr(), pool.data.nbytes
            self._registered = self._agent.register_memory([(base, nbytes, device, "")], memory, backends=_BACKENDS)
            self.endpoint = NixlEndpoint(self._agent.get_agent_metadata(), base, memory, device)
        except _errors(api) as error:
            raise ConfigError(f"NIXL cannot register the KV cache: {error}") from error

    def close(self) -> None:
        self._agent.deregister_memory(self._registered, backends=_BACKENDS)


class Nixl(Transport):
    """Raises Unusable when NIXL is absent here or at the giver."""

    name: ClassVar[str] = "nixl"

    def __init__(self, giver: Hello, pool: Pool) -> None:
        if not installed():
            raise Unusable("nixl is not installed")
        if giver.nixl is None:
            raise Unusable("the giver does not offer its pool over NIXL")
        self._giver, self._endpoint = giver, giver.nixl
        self._device = pool.device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-nixl")
        self._reader: _Reader | None = None

    async def pull(self, job: PullJob) -> None:
        stop = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._pull, job, stop)
        await finished(work, stop.set)

    def on_message(self, message: FromGiver) -> None:
        """The giver takes no part in a read."""

    def forget(self, transfer_id: str) -> None:
        """Nothing is kept of a transfer."""

    def close(self) -> None:
        self._thread.submit(self._drop)
        self._thread.shutdown(wait=False)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _pull(self, job: PullJob, stop: threading.Event) -> None:
        job.on_began()
        api = import_module("nixl")
        try:
            if self._reader is None:
                self._reader = _Reader(api, self._giver, self._endpoint, self._device)
            for batch in batches(job.coding, job.pieces):
                land(job, batch, self._reader.read(job, batch, stop))
        except _errors(api) as error:
            self._drop()
            raise TransferError(f"NIXL failed: {type(error).__name__}: {error}") from error
        except TransferError:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Reader:
    """An agent that has met the giver's, and its buffer. Used by one thread."""

    def __init__(self, api: Any, giver: Hello, endpoint: NixlEndpoint, device: torch.device) -> None:
        _sweep()
        self._errors = _errors(api)
        self._giver, self._endpoint = giver, endpoint
        self._agent = _agent(api)
        self._peer = self._agent.add_remote_agent(endpoint.metadata)
        self._memory, self._index = _memory_of(device)
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)
        self._registered: Any = None
        self._pending: Any = None

    def read(self, job: PullJob, batch: Batch, stop: threading.Event) -> torch.Tensor:
        """The pieces of a batch, one after the other in canonical order."""
        buffer = self._buffer(batch.nbytes)
        ours, theirs = self._spans(buffer, job, batch.first, batch.last)
        local = self._agent.get_xfer_descs(ours, self._memory)
        remote = self._agent.get_xfer_descs(theirs, self._endpoint.memory)
        self._pending = self._agent.initialize_xfer("READ", local, remote, self._peer, backends=_BACKENDS)
        state, until = self._agent.transfer(self._pending), time.monotonic() + STALL_S
        while state == "PROC":
            if stop.is_set() or time.monotonic() > until:
                raise TransferError("stopped" if stop.is_set() else f"NIXL read nothing for {STALL_S:g} s")
            time.sleep(_POLL_S)
            state = self._agent.check_xfer_state(self._pending)
        if state != "DONE":
            raise TransferError("NIXL could not read the giver's pool")
        self._agent.release_xfer_handle(self._pending)
        self._pending = None
        return buffer

    def close(self) -> None:
        """Let go of everything, once no read writes to the buffer."""
        if not self._let_go():
            _unfinished.append(self)

    def _let_go(self) -> bool:
        try:
            if self._pending is not None and self._agent.check_xfer_state(self._pending) == "PROC":
                return False
            if self._pending is not None:
                self._agent.release_xfer_handle(self._pending)
                self._pending = None
            self._forget_buffer()
            self._agent.remove_remote_agent(self._peer)
        except self._errors:
            return self._pending is None  # what is left goes with the agent
        return True

    def _buffer(self, nbytes: int) -> torch.Tensor:
        if nbytes > self._staging.nbytes:
            self._forget_buffer()
            self._staging = torch.empty(nbytes, dtype=torch.uint8, device=self._staging.device)
            whole = [(self._staging.data_ptr(), nbytes, self._index, "")]
            self._registered = self._agent.register_memory(whole, self._memory, backends=_BACKENDS)
        return self._staging[:nbytes]

    def _forget_buffer(self) -> None:
        if self._registered is not None:
            self._agent.deregister_memory(self._registered, backends=_BACKENDS)
            self._registered = None

    def _spans(self, buffer: torch.Tensor, job: PullJob, first: int, last: int) -> tuple[list[Any], list[Any]]:
        """(address, bytes, device) of every run, here and at the giver."""
        row = row_bytes(self._giver.layout)
        plane = self._giver.num_blocks * self._giver.layout.block_size * row
        at = buffer.data_ptr()
        ours: list[tuple[int, int, int]] = []
        theirs: list[tuple[int, int, int]] = []
        for index in range(first, last):
            piece, parts = job.pieces[index], _runs_of(job.source(index))
            for number in range(2 * piece.layer, 2 * (piece.layer + piece.num_layers)):
                there = self._endpoint.base + number * plane
                for first, _, length in parts.tolist():
                    ours.append((at, length * row, self._index))
                    theirs.append((there + first * row, length * row, self._endpoint.device))
                    at += length * row
        return ours, theirs


_unfinished: list[_Reader] = []
"""Readers with a read that may still write to their buffer."""


def _sweep() -> None:
    for reader in list(_unfinished):
        if reader._let_go():
            _unfinished.remove(reader)


def _runs_of(slots: Slots) -> Runs:
    return runs(slots, np.arange(len(slots)))


def _agent(api: Any) -> Any:
    """With a thread of NIXL's own that makes progress, which one-sided reads of host memory need at the giver."""
    return api.nixl_agent(uuid.uuid4().hex, api.nixl_agent_config(enable_prog_thread=True, backends=_BACKENDS))


def _memory_of(device: torch.device) -> tuple[str, int]:
    return ("VRAM", device.index or 0) if device.type == "cuda" else ("DRAM", 0)


def _errors(api: Any) -> tuple[type[Exception], ...]:
    """What NIXL raises: a family without a common ancestor."""
    known = vars(api._bindings).values()
    return tuple(kind for kind in known if isinstance(kind, type) and issubclass(kind, Exception))
