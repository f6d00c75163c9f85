"""The decode role over an engine: blocks first, then the KV, then the batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from core.errors import TransferError
from core.types import Request
from core.wire import Receive
from engine.engine import Engine
from engine.sequence import Sequence
from kv_transfer.messages import SequenceState
from kv_transfer.taker import Taker, Withdrawn

logger = logging.getLogger(__name__)

OnHandoffFailed = Callable[[str, str], None]
"""Called with request id and reason, after the blocks have been given back."""


class DecodeWorker:
    """Runs on an event loop. A transfer in flight is a task; whoever ends a request early cancels it, and the task
    frees the blocks only when the transport can no longer write to them."""

    def __init__(self, engine: Engine, taker: Taker, on_handoff_failed: OnHandoffFailed) -> None:
        self._engine = engine
        self._taker = taker
        self._on_handoff_failed = on_handoff_failed
        self._reserved: dict[str, Receive] = {}
        self._transfers: dict[str, asyncio.Task[SequenceState]] = {}

    def generate(self, request: Request) -> None:
        """Prefill here, then decode."""
        self._engine.add(Sequence(request))

    def receive(self, job: Receive) -> None:
        """Reserve blocks, then take the KV (`granted` follows), then decode."""
        self._reserved[job.request.request_id] = job
        self._engine.reserve(Sequence(job.request))

    def granted(self, sequence: Sequence) -> None:
        """The engine has allocated the blocks of a sequence given to `receive`."""
        job = self._reserved.pop(sequence.request_id, None)
        if job is None:  # aborted between the grant and this call; the engine has the abort queued
            return
        task = asyncio.get_running_loop().create_task(self._take(job, sequence))
        self._transfers[sequence.request_id] = task
        # Not a finally in _take: a task that is cancelled before its first step never enters it.
        task.add_done_callback(lambda done: self._ended(sequence.request_id, done))

    def abort(self, request_id: str) -> None:
        self._reserved.pop(request_id, None)
        if (transfer := self._transfers.get(request_id)) is not None:
            transfer.cancel()  # its last act is to free the blocks
        else:
            self._engine.abort(request_id)

    def rejected(self, request_id: str) -> None:
        """The engine ended a sequence before it was granted."""
        self._reserved.pop(request_id, None)

    async def close(self) -> None:
        """Cancel every transfer and wait until their transports are quiet."""
        transfers = list(self._transfers.values())
        for transfer in transfers:
            transfer.cancel()
        await asyncio.gather(*transfers, return_exceptions=True)

    async def _take(self, job: Receive, sequence: Sequence) -> SequenceState:
        return await self._taker.take(
            job.transfer_id,
            job.prefill_address,
            list(sequence.block_table),
            start_token=sequence.num_computed_tokens,
            num_tokens=len(sequence.token_ids),
            deadline=job.request.deadline,
        )

    def _ended(self, request_id: str, transfer: asyncio.Task[SequenceState]) -> None:
        """The KV is there, or the blocks go back; either way nothing writes to them any more."""
        del self._transfers[request_id]
        error = None if transfer.cancelled() else transfer.exception()
        if not transfer.cancelled() and error is None:
            self._engine.join(request_id, transfer.result().token_ids)
            return
        self._engine.abort(request_id)
        if error is None or isinstance(error, Withdrawn):
            return  # the gateway or the prefill side has ended the request: nothing is left to say
        if not isinstance(error, TransferError):
            logger.error("the transfer of %s failed", request_id, exc_info=error)
        self._on_handoff_failed(request_id, str(error) or type(error).__name__)
