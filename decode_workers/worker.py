"""The decode role over an engine: blocks first, then the KV, then the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from core.errors import TransferError
from core.types import Request
from core.wire import Receive
from engine.engine import Engine
from engine.sequence import Sequence
from kv_transfer.taker import Taker, Withdrawn

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
        self._transfers: dict[str, asyncio.Task[None]] = {}

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

    async def _take(self, job: Receive, sequence: Sequence) -> None:
        request_id = sequence.request_id
        joined = False
        try:
            state = await self._taker.take(
                job.transfer_id,
                job.prefill_address,
                list(sequence.block_table),
                start_token=sequence.num_computed_tokens,
                num_tokens=sequence.num_pending_tokens + sequence.num_computed_tokens,
                deadline=job.request.deadline,
            )
            self._engine.join(request_id, state.token_ids)
            joined = True
        except Withdrawn:
            pass  # the prefill side has ended the request, or the gateway has: nothing is left to say
        except TransferError as error:
            self._on_handoff_failed(request_id, error.message)
        finally:
            del self._transfers[request_id]
            if not joined:
                self._engine.abort(request_id)
