"""The decode role over an engine: blocks first, then the KV, then the batch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import TransferError
from core.types import Request
from core.wire import Receive
from engine.engine import Engine
from engine.sequence import Sequence
from kv_transfer.taker import Reservation, Taken, Taker, Withdrawn

logger = logging.getLogger(__name__)

OnHandoffFailed = Callable[[str, str], None]
"""Called with request id and reason, after the blocks have been given back."""
OnSettled = Callable[[str], None]
"""Called once a request given to `receive` has its blocks, and again when its transfer has ended, however that went."""


@dataclass(frozen=True, slots=True)
class _Transfer:
    task: asyncio.Task[Taken]
    reserved: asyncio.Future[Reservation]


class DecodeWorker:
    """Runs on an event loop. A transfer is a task from the moment it is asked for: it keeps the prefill side's offer
    alive while the engine has no blocks, then fills them. Whoever ends a request early cancels the task, and the blocks
    are freed only when the transport can no longer write to them."""

    def __init__(self, engine: Engine, taker: Taker, on_handoff_failed: OnHandoffFailed, on_settled: OnSettled) -> None:
        self._engine = engine
        self._taker = taker
        self._on_handoff_failed = on_handoff_failed
        self._on_settled = on_settled
        self._transfers: dict[str, _Transfer] = {}

    def generate(self, request: Request) -> None:
        """Prefill here, then decode."""
        self._engine.add(Sequence(request))

    def receive(self, job: Receive) -> None:
        """Reserve blocks once the prefill side has its own (`granted` follows `opened`), take the KV, then decode."""
        request_id = job.request.request_id
        self._engine.reserve(Sequence(job.request, deferred=True))
        loop = asyncio.get_running_loop()
        reserved: asyncio.Future[Reservation] = loop.create_future()
        taking = self._taker.expect(
            job.transfer_id,
            job.prefill_address,
            reserved,
            deadline=time.time() + job.within_s,
            trace=job.request.trace,
        )
        task = loop.create_task(taking)
        self._transfers[request_id] = _Transfer(task, reserved)
        # Not a finally in a coroutine: a task that is cancelled before its first step never enters it.
        task.add_done_callback(lambda done: self._ended(request_id, done))

    def opened(self, request_id: str) -> None:
        """The prefill side has blocks for a sequence given to `receive`, and waits for nobody but us."""
        self._engine.undefer(request_id)

    def granted(self, sequence: Sequence) -> None:
        """The engine has allocated the blocks of a sequence given to `receive`."""
        self._on_settled(sequence.request_id)
        transfer = self._transfers.get(sequence.request_id)
        if transfer is None:  # it ended between the grant and this call; the engine has the abort queued
            return
        blocks, start, stop = list(sequence.block_table), sequence.num_computed_tokens, len(sequence.token_ids)
        try:
            reservation = self._taker.reservation(blocks, start_token=start, num_tokens=stop)
        except ValueError as error:  # the engine failed after the grant and took the blocks back
            transfer.reserved.set_exception(error)
        else:
            transfer.reserved.set_result(reservation)

    def abort(self, request_id: str) -> None:
        transfer = self._transfers.get(request_id)
        if transfer is None or not transfer.task.cancel():  # it has just ended: the engine is about to hear of its KV
            self._engine.abort(request_id)  # else the last act of the transfer is to free the blocks

    def rejected(self, request_id: str) -> None:
        """The engine has ended a sequence itself; if its KV was still to come, nobody waits for it any more."""
        if (transfer := self._transfers.get(request_id)) is not None:
            transfer.task.cancel()

    async def close(self) -> None:
        """Cancel every transfer and wait until their transports are quiet."""
        tasks = [transfer.task for transfer in self._transfers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, request_id: str, transfer: asyncio.Task[Taken]) -> None:
        """The KV is there, or the blocks go back; either way nothing writes to them any more."""
        del self._transfers[request_id]
        self._on_settled(request_id)
        error = None if transfer.cancelled() else transfer.exception()
        if not transfer.cancelled() and error is None:
            state, exact = transfer.result()
            self._engine.join(request_id, state.token_ids, exact=exact, draft_states=state.draft_states)
            return
        self._engine.abort(request_id)
        if error is None or (isinstance(error, Withdrawn) and error.finished):
            return  # aborted, or the prefill side reports the end of the request
        if not isinstance(error, TransferError):
            logger.error("the transfer of %s failed", request_id, exc_info=error)
        self._on_handoff_failed(request_id, str(error) or type(error).__name__)
