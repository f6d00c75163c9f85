"""The prefill role over an engine: prompts in, first tokens out, KV given away as it is computed."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from core.types import FinishReason
from core.wire import Prefill
from engine.engine import Engine
from engine.kv_layout import KVLayout
from engine.schedule import Chunk, Opened
from engine.scheduler import SequenceUpdate
from engine.sequence import Sequence, Status
from kv_transfer.giver import Giver
from kv_transfer.messages import SequenceState
from kv_transfer.pieces import Frontier, layers_told

Note = tuple[str, Frontier]
"""A request, and how much of its prompt has its KV."""


class PrefillWorker:
    """Runs on the event loop of `giver`, but for `notes`. Blocks of a prompt are the giver's from when the engine has
    them until `released`, which gives them back to the engine; whoever ends a request early goes through `abort`."""

    def __init__(self, engine: Engine, giver: Giver, layout: KVLayout) -> None:
        self._engine = engine
        self._giver = giver
        self._layout = layout
        self._transfers: dict[str, str] = {}  # request id -> transfer id
        self._opened: dict[str, str] = {}  # transfer id -> request id

    def prefill(self, job: Prefill, *, deferred: bool = False) -> None:
        """`deferred`: it takes no blocks before `undefer`."""
        self._transfers[job.request.request_id] = job.transfer_id
        self._engine.add(Sequence(job.request, hold_after_prefill=True, deferred=deferred))

    def undefer(self, request_id: str) -> None:
        """Unknown ids are ignored."""
        self._engine.undefer(request_id)

    # --- what the engine says ----------------------------------------------------------------------------------------

    def opened(self, opened: Opened) -> None:
        request_id = opened.sequence.request_id
        transfer_id = self._transfers.get(request_id)
        if transfer_id is None:  # aborted while this was on its way
            self._engine.release(request_id)
            return
        self._opened[transfer_id] = request_id
        self._giver.open(transfer_id, opened.block_ids, opened.num_tokens)
        self._giver.written(transfer_id, Frontier(opened.num_cached_tokens))

    def notes(self, chunks: SequenceOf[Chunk], layer: int) -> list[Note]:
        """On the engine's thread: of chunks that are written up to this layer, what is worth telling (layers_told)."""
        num_layers = layer + 1
        if num_layers == self._layout.num_layers:
            return [_done(chunk) for chunk in chunks]
        return [
            (chunk.sequence.request_id, Frontier(chunk.start, chunk.num_tokens, num_layers))
            for chunk in chunks
            if num_layers in layers_told(self._layout, chunk.num_tokens, last=chunk.samples)
        ]

    def written(self, notes: SequenceOf[Note], ready: torch.cuda.Event | None = None) -> None:
        """Of prompts that were opened. `ready` as for Giver.written."""
        for request_id, frontier in notes:
            if (transfer_id := self._transfers.get(request_id)) is not None:
                self._giver.written(transfer_id, frontier, ready)

    def computed(self, chunks: SequenceOf[Chunk]) -> None:
        """A step has ended that these chunks were in."""
        self.written([_done(chunk) for chunk in chunks])

    def on_update(self, update: SequenceUpdate) -> None:
        """A step touched one of the sequences given to `prefill`."""
        sequence = update.sequence
        if update.finish is not None:
            # An error may come after the first token is out. Then only the decode side's word that there will be no KV
            # makes sure that the request goes on, should this process die before it has reported the error.
            finished = update.finish.reason is not FinishReason.ERROR
            self._withdraw(sequence.request_id, f"ended here ({update.finish.reason})", finished=finished)
        elif sequence.status is Status.HELD:
            self._giver.complete(
                self._transfers[sequence.request_id],
                SequenceState(token_ids=list(update.token_ids), draft_states=update.draft_states),
            )

    # --- ends --------------------------------------------------------------------------------------------------------

    def released(self, transfer_id: str) -> str | None:
        """The giver is done with the blocks of a transfer, for whatever reason, and so is the engine with the request.
        Returns the request that held them."""
        request_id = self._opened.pop(transfer_id, None)
        if request_id is not None:
            self._transfers.pop(request_id, None)
            self._engine.release(request_id)
        return request_id

    def abort(self, request_id: str) -> None:
        """The gateway no longer wants it. Its blocks, if it has any, are freed by the giver, once nothing can read
        them."""
        if request_id in self._transfers:
            self._engine.abort(request_id)
        self._withdraw(request_id, "aborted", finished=False)

    def _withdraw(self, request_id: str, reason: str, *, finished: bool) -> None:
        """`finished` keeps the decode side silent: the finish that this side reports travels over another link, and a
        failed hand-off that overtook it would have the request served again."""
        if (transfer_id := self._transfers.pop(request_id, None)) is not None:
            self._giver.withdraw(transfer_id, reason, finished=finished)


def _done(chunk: Chunk) -> Note:
    """The chunk is written in all layers."""
    return chunk.sequence.request_id, Frontier(chunk.start + chunk.num_tokens)
