"""Which workers serve a request. A pure decider: loads in, a route out.

A route is a prefill and a decode worker chosen together, or one worker that does both. Any worker can do either job, so
as long as one is alive there is a route; roles say who is asked first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import Overloaded, Unavailable
from core.types import Role
from core.wire import WorkerStatus


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live worker, as the router sees it. `assigned_*` were sent to it since it last spoke, so that a burst between
    two heartbeats does not go to one worker."""

    worker_id: str
    address: str
    status: WorkerStatus
    assigned_tokens: int = 0
    assigned_requests: int = 0

    @property
    def queued_tokens(self) -> int:
        return self.status.num_waiting_tokens + self.assigned_tokens

    @property
    def num_sequences(self) -> int:
        return self.status.num_running + self.status.num_waiting + self.assigned_requests


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` None: `decode` does both."""

    prefill: Candidate | None
    decode: Candidate


def choose(num_tokens: int, workers: Iterable[Candidate], max_waiting: int) -> Route:
    """The route for a prompt of `num_tokens`. Raises Unavailable when no worker is alive and Overloaded when every
    worker already has `max_waiting` sequences it is not running."""
    alive = list(workers)
    if not alive:
        raise Unavailable("no worker is alive; retry in a moment")
    open_workers = [w for w in alive if w.status.num_waiting + w.assigned_requests < max_waiting]
    if not open_workers:
        raise Overloaded(f"every worker has {max_waiting} requests waiting; retry later")
    decode = min(_with_role(open_workers, Role.DECODE), key=lambda w: _decode_cost(w, num_tokens))
    if decode.status.role is not Role.DECODE:
        return Route(prefill=None, decode=decode)
    prefillers = [w for w in open_workers if w.status.role is Role.PREFILL]
    if not prefillers:
        return Route(prefill=None, decode=decode)
    return Route(prefill=min(prefillers, key=_prefill_cost), decode=decode)


def _with_role(workers: list[Candidate], role: Role) -> list[Candidate]:
    """Those of `role`, else those of BOTH, else whoever is left."""
    for wanted in (role, Role.BOTH):
        if found := [w for w in workers if w.status.role is wanted]:
            return found
    return workers


def _prefill_cost(worker: Candidate) -> tuple[int, int, str]:
    """Time to first token grows with the tokens queued before this prompt."""
    return (worker.queued_tokens, worker.num_sequences, worker.worker_id)


def _decode_cost(worker: Candidate, num_tokens: int) -> tuple[bool, int, int, str]:
    """Room for the KV first, then the batch that sets the time per token."""
    free_tokens = worker.status.num_free_blocks * worker.status.block_size - worker.assigned_tokens
    return (free_tokens < num_tokens, worker.num_sequences, -free_tokens, worker.worker_id)
