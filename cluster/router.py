"""Which workers serve a request. A pure decider: loads in, a route out.

A route is a prefill and a decode worker chosen together, or one worker that does both. Any worker can do either job, so
as long as one is alive there is a route; roles say who is asked first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.break_even import BreakEven
from core.errors import Overloaded, Unavailable
from core.types import Role
from core.wire import WorkerStatus

BATCH_SLACK = 0.25
"""By this share, and one, a batch may be larger than the smallest and still count as equal."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live worker, as the router sees it. `assigned_*` were sent to it since it last spoke, so that a burst between
    two heartbeats does not go to one worker."""

    worker_id: str
    address: str
    status: WorkerStatus
    assigned_tokens: int = 0
    assigned_requests: int = 0
    ended_requests: int = 0
    """That it decoded, since it last spoke: it still counts them."""
    in_flight: int = 0
    """Requests of this gateway that it is to decode."""
    node: str = ""
    """Of the cluster, on which it runs; empty: nobody knows."""

    @property
    def queued_tokens(self) -> int:
        return self.status.num_waiting_tokens + self.assigned_tokens

    @property
    def free_tokens(self) -> int:
        return self.status.num_free_blocks * self.status.block_size - self.assigned_tokens

    @property
    def num_sequences(self) -> int:
        """As it is now, whatever its status says, if all its requests are this gateway's."""
        told = self.status.num_running + self.status.num_waiting
        return max(self.in_flight, told + self.assigned_requests - self.ended_requests)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be computed: `num_tokens`, of which `cached` says how many a worker has, by its id."""

    num_tokens: int
    cached: Mapping[str, int] = field(default_factory=dict)
    decodes: bool = True
    """Whether a second token is wanted."""
    near: bool = False
    """Whether it is to be handed over within a node."""

    def uncached(self, worker: Candidate) -> int:
        return self.num_tokens - self.cached.get(worker.worker_id, 0)


class Reason(StrEnum):
    """Why a route is what it is."""

    HANDOFF = "handoff"
    COLOCATED = "colocated"
    """There is nobody to hand over."""
    NOT_WORTH_IT = "not_worth_it"
    """What is to be computed is too little, or mostly cached where it is decoded."""
    PREFILL_ONLY = "prefill_only"
    """It ends with its first token at the latest, so a prefill worker can do all of it."""
    FALLBACK = "fallback"
    """A hand-off has failed before."""


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` None: `decode` does all of it."""

    prefill: Candidate | None
    decode: Candidate
    reason: Reason

    @property
    def workers(self) -> list[Candidate]:
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]


def choose(prompt: Prompt, workers: Iterable[Candidate], max_waiting: int, break_even: BreakEven) -> Route:
    """Workers that leave are asked only when there is no other. Raises Unavailable when no worker is alive and
    Overloaded when every worker already has `max_waiting` sequences that it is not running."""
    there = list(workers)
    alive = [w for w in there if not w.status.leaving] or there
    if not alive:
        raise Unavailable("no worker is alive; retry in a moment")
    open_workers = [w for w in alive if w.status.num_waiting + w.assigned_requests < max_waiting]
    if not open_workers:
        raise Overloaded(f"every worker has {max_waiting} requests waiting; retry later")
    decode = _choose_decode(prompt, _with_role(open_workers, Role.DECODE))
    prefillers = [w for w in open_workers if w.status.role is Role.PREFILL]
    if prompt.near:
        prefillers = [w for w in prefillers if w.node == decode.node] or prefillers
    if decode.status.role is not Role.DECODE or not prefillers:
        return Route(None, decode, Reason.COLOCATED)
    prefill = min(prefillers, key=lambda w: (w.queued_tokens + prompt.uncached(w), w.num_sequences, w.worker_id))
    if not prompt.decodes:
        return Route(None, prefill, Reason.PREFILL_ONLY)
    repeated = max(0, prompt.uncached(prefill) - prompt.uncached(decode))
    if break_even.stays(prompt.uncached(decode), repeated, decode.num_sequences):
        return Route(None, decode, Reason.NOT_WORTH_IT)
    return Route(prefill, decode, Reason.HANDOFF)


def _with_role(workers: list[Candidate], role: Role) -> list[Candidate]:
    """Those of `role`, else those of BOTH, else whoever is left."""
    for wanted in (role, Role.BOTH):
        if found := [w for w in workers if w.status.role is wanted]:
            return found
    return workers


def _choose_decode(prompt: Prompt, workers: list[Candidate]) -> Candidate:
    """Room for the KV first, then the batch that sets the time per token; among batches of about one size, the cache
    that has most of the prompt, so that a conversation goes on where it was."""
    roomy = [w for w in workers if w.free_tokens >= prompt.uncached(w)] or workers
    most = min(w.num_sequences for w in roomy) * (1 + BATCH_SLACK) + 1
    return min(
        (w for w in roomy if w.num_sequences <= most),
        key=lambda w: (prompt.uncached(w), w.num_sequences, -w.free_tokens, w.worker_id),
    )
