"""One request's way through the cluster: a pure state machine, events in, instructions out.

An attempt is one (prefill, decode) pair, or one worker that does both. Its id goes to the workers in place of the
request's, so that whatever an abandoned attempt still says is recognised and dropped. Tokens are delivered in output
order, each once; a new attempt starts from what has been delivered. However it goes, exactly one End comes out, and
every worker that was asked is told to forget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from core.errors import DeadlineExceeded, SlipstreamError, Undrawable, WorkerLost
from core.types import Finish, FinishReason, Request, TokenDelta
from core.wire import Abort, Generate, Opened, Prefill, Receive, ToWorker

MAX_ATTEMPTS = 4
"""That fail, whatever they have brought: a request that kills its workers token by token is not to kill them all."""
MAX_HANDOFF_FAILURES = 2
"""After one, the hand-off is tried with another prefill worker; after these, the decode worker does it alone."""


@dataclass(frozen=True, slots=True)
class Send:
    worker_id: str
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens for the client; the last of a request has `finish`."""

    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class Reroute:
    """Choose workers again and call `start`, or `refuse` if there are none. `local_to` names a worker that should do it
    alone, if it still lives."""

    local_to: str | None = None


Instruction = Send | Deliver | Reroute


@dataclass(slots=True)
class _Attempt:
    attempt_id: str
    decode: str
    prefill: str | None
    first_index: int
    """Output index of the first token that this attempt has to produce."""
    early: dict[int, TokenDelta] = field(default_factory=dict)
    """Deltas that came before their turn, by index."""

    @property
    def workers(self) -> list[str]:
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]


class Dispatch:
    """Call `start` with the first route; then feed events until `ended`."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ended = False
        self.avoid: set[str] = set()
        """Workers that have failed an attempt of this request."""
        self.handoff_failures = 0
        self._delivered = list(request.emitted_token_ids)
        self._attempt: _Attempt | None = None
        self._attempts = 0
        self._num_failed = 0

    @property
    def attempt_id(self) -> str | None:
        return self._attempt.attempt_id if self._attempt else None

    @property
    def delivered(self) -> Sequence[int]:
        """Output tokens that the client has, those of the request itself included."""
        return self._delivered

    # --- events ----------------------------------------------------------------------------------------------------

    def start(
        self, decode: str, prefill: str | None, prefill_address: str = "", *, within_s: float = math.inf
    ) -> list[Instruction]:
        """Ask these workers, `within_s` before the deadline."""
        if self.ended:
            return []
        attempt_id = f"{self.request.request_id}.{self._attempts}"
        self._attempts += 1
        self._attempt = _Attempt(attempt_id, decode, prefill, first_index=len(self._delivered))
        job = msgspec.structs.replace(self.request, request_id=attempt_id, emitted_token_ids=list(self._delivered))
        if prefill is None:
            return [Send(decode, Generate(job))]
        # The decode side first: it announces itself to the other before the offer is there.
        return [
            Send(decode, Receive(job, attempt_id, prefill_address, within_s)),
            Send(prefill, Prefill(job, transfer_id=attempt_id)),
        ]

    def refuse(self, error: SlipstreamError) -> list[Instruction]:
        """There is no route."""
        return self._end(Finish.from_error(error))

    def on_delta(self, delta: TokenDelta, worker_id: str) -> list[Instruction]:
        """A worker says what an attempt has brought."""
        attempt = self._attempt
        if self.ended or attempt is None or delta.request_id != attempt.attempt_id:
            return []
        if delta.finish is not None and delta.finish.reason is FinishReason.ERROR and not delta.token_ids:
            return self._on_worker_error(delta.finish, worker_id)
        attempt.early[delta.index] = delta
        instructions: list[Instruction] = []
        while not self.ended and (ready := attempt.early.pop(len(self._delivered), None)) is not None:
            instructions += self._deliver(ready)
        return instructions

    def on_opened(self, attempt_id: str) -> list[Instruction]:
        """The prefill worker has blocks for the prompt, so the decode worker may take some too."""
        attempt = self._attempt
        if self.ended or attempt is None or attempt_id != attempt.attempt_id:
            return []
        return [Send(attempt.decode, Opened(attempt_id))]

    def on_handoff_failed(self, attempt_id: str) -> list[Instruction]:
        """The decode worker has no KV, and its blocks are free again. Another prefill worker is tried once, if there is
        one; then it prefills by itself."""
        attempt = self._attempt
        if self.ended or attempt is None or attempt_id != attempt.attempt_id:
            return []
        self.handoff_failures += 1
        if attempt.prefill is not None:
            self.avoid.add(attempt.prefill)
        return self._retry(local_to=attempt.decode if self.handoff_failures >= MAX_HANDOFF_FAILURES else None)

    def on_worker_lost(self, worker_id: str, *, left: bool = False) -> list[Instruction]:
        """`left`: it was stopped as planned, and said so before; that is no failure of an attempt."""
        attempt = self._attempt
        if self.ended or attempt is None or worker_id not in attempt.workers:
            return []
        if worker_id == attempt.prefill and len(self._delivered) > attempt.first_index:
            return []  # the decode worker has the KV, or will say that the hand-off failed
        return self._retry(local_to=None, lost=worker_id, failed=not left)

    def on_cancel(self) -> list[Instruction]:
        """The client has gone."""
        return self._end(Finish(reason=FinishReason.ABORT))

    def on_deadline(self) -> list[Instruction]:
        return self._end(Finish.from_error(DeadlineExceeded("the request did not finish within its deadline")))

    # --- what follows ----------------------------------------------------------------------------------------------

    def _deliver(self, delta: TokenDelta) -> list[Instruction]:
        self._delivered += delta.token_ids
        if delta.finish is None:
            return [Deliver(self._renamed(delta))]
        self.ended = True
        return [Deliver(self._renamed(delta)), *self._forget()]

    def _on_worker_error(self, finish: Finish, worker_id: str) -> list[Instruction]:
        """A worker gave up. A mistake of the caller stays one; a fault of the worker is worth another try."""
        error = finish.to_error()
        if error.http_status < 500 or isinstance(error, Undrawable):
            return self._end(finish)
        self.avoid.add(worker_id)
        return self._retry(local_to=None, last=finish)

    def _retry(
        self, local_to: str | None, lost: str | None = None, last: Finish | None = None, *, failed: bool = True
    ) -> list[Instruction]:
        forget = self._forget(lost)
        self._attempt = None
        self._num_failed += failed
        if self._num_failed >= MAX_ATTEMPTS:
            error = WorkerLost(f"{self._num_failed} attempts failed; retry later")
            return [*forget, *self._end(last or Finish.from_error(error))]
        return [*forget, Reroute(local_to)]

    def _end(self, finish: Finish) -> list[Instruction]:
        if self.ended:
            return []
        self.ended = True
        last = TokenDelta(request_id=self.request.request_id, index=len(self._delivered), finish=finish)
        return [*self._forget(), Deliver(last)]

    def _forget(self, lost: str | None = None) -> list[Instruction]:
        if self._attempt is None:
            return []
        attempt_id = self._attempt.attempt_id
        return [Send(worker, Abort(attempt_id)) for worker in self._attempt.workers if worker != lost]

    def _renamed(self, delta: TokenDelta) -> TokenDelta:
        return msgspec.structs.replace(delta, request_id=self.request.request_id)
