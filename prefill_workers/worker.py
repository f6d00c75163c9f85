"""The prefill role over an engine: prompts in, first tokens out, KV held until the decode side has it."""

from __future__ import annotations

from core.types import Request
from core.wire import Prefill
from engine.engine import Engine
from engine.scheduler import SequenceUpdate
from engine.sequence import Sequence, Status
from kv_transfer.giver import Giver
from kv_transfer.messages import SequenceState


class PrefillWorker:
    """Runs on the event loop of `giver`. Blocks of a prompt are the engine's until it is held, then the giver's until
    `released`; whoever ends a request early goes through `abort`."""

    def __init__(self, engine: Engine, giver: Giver) -> None:
        self._engine = engine
        self._giver = giver
        self._transfers: dict[str, str] = {}  # request id -> transfer id
        self._offered: dict[str, str] = {}  # transfer id -> request id, of held sequences

    def prefill(self, job: Prefill) -> None:
        request: Request = job.request
        self._transfers[request.request_id] = job.transfer_id
        self._engine.add(Sequence(request, hold_after_prefill=True))

    def on_update(self, update: SequenceUpdate) -> None:
        """A step touched one of the sequences given to `prefill`."""
        sequence = update.sequence
        request_id = sequence.request_id
        if update.finish is not None:
            self._withdraw(request_id, f"ended at the first token ({update.finish.reason})", finished=True)
        elif sequence.status is Status.HELD:
            transfer_id = self._transfers[request_id]
            self._offered[transfer_id] = request_id
            self._giver.offer(
                transfer_id,
                list(sequence.block_table),
                sequence.num_computed_tokens,
                SequenceState(token_ids=list(update.token_ids), num_cached_tokens=sequence.num_cached_tokens),
            )

    def released(self, transfer_id: str) -> str | None:
        """The giver is done with the blocks of a transfer, for whatever reason. Returns the request that held them."""
        request_id = self._offered.pop(transfer_id, None)
        if request_id is not None:
            self._transfers.pop(request_id, None)
            self._engine.release(request_id)
        return request_id

    def abort(self, request_id: str) -> None:
        """The gateway no longer wants it. A held sequence is freed by the giver, once nothing can read its blocks."""
        transfer_id = self._transfers.get(request_id)
        if transfer_id is not None and transfer_id not in self._offered:
            self._engine.abort(request_id)
        self._withdraw(request_id, "aborted", finished=False)

    def _withdraw(self, request_id: str, reason: str, *, finished: bool) -> None:
        """`finished` keeps the decode side silent: the finish that this side reports travels over another link, and a
        failed hand-off that overtook it would have the request served again."""
        transfer_id = self._transfers.get(request_id)
        if transfer_id is not None:
            if transfer_id not in self._offered:
                del self._transfers[request_id]
            self._giver.withdraw(transfer_id, reason, finished=finished)
