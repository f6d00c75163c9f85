"""The routes of a gateway's requests, chosen with what it has learnt of its workers: what they have cached, what a
prompt's token costs, and what a hand-off does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.break_even import BreakEven, FirstGaps
from cluster.config.tree import SlipstreamConfig
from cluster.dispatch import Dispatch
from cluster.prefixes import KnownPrefixes, digests_of
from cluster.router import Candidate, Prompt, Reason, Route, choose
from core.types import Request, Role, TokenDelta
from core.wire import WorkerStatus
from engine.block_manager import UNIT


@dataclass(slots=True)
class Way:
    """How one request is going, as far as Routes wants to know."""

    digests: Sequence[bytes]
    """Of its prompt."""
    route: Route | None = None
    gaps: FirstGaps | None = None
    """While its KV is handed over."""
    new_to_decode: Sequence[bytes] = ()
    """Of `digests`, those that the decode worker gets by a hand-off."""


class Routes:
    """One per gateway; fed with everything that its requests and workers say."""

    def __init__(
        self, break_even: BreakEven, *, max_waiting: int, prefix_caching: bool = True, near: bool = False
    ) -> None:
        self._break_even = break_even
        self._max_waiting = max_waiting
        self._prefix_caching = prefix_caching
        self._near = near
        self._prefixes = KnownPrefixes()
        self._before: dict[str, WorkerStatus] = {}
        self._counts: Counter[Reason] = Counter()

    @classmethod
    def of(cls, config: SlipstreamConfig) -> Routes:
        """By what the operator has said."""
        return cls(
            BreakEven(config.cluster.handoff_min_tokens, config.engine.batched_tokens(Role.DECODE)),
            max_waiting=config.gateway.max_concurrent_requests,
            prefix_caching=config.engine.prefix_caching,
            near=config.cluster.handoff_within_node,
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Attempts so far, by why they went the way they did."""
        return {reason.value: self._counts[reason] for reason in Reason}

    def way(self, request: Request) -> Way:
        """Of a new request."""
        return Way(digests_of(request) if self._prefix_caching else ())

    def choose(self, way: Way, dispatch: Dispatch, candidates: Sequence[Candidate], local_to: str | None) -> Route:
        """The route of the next attempt. Raises as router.choose. Workers that have failed this request are asked only
        when there is no other; `local_to` is asked alone, unless it is such a one or gone."""
        open_workers = [c for c in candidates if c.worker_id not in dispatch.avoid] or list(candidates)
        local = [c for c in open_workers if c.worker_id == local_to]
        request, num_delivered = dispatch.request, len(dispatch.delivered)
        prompt = Prompt(
            len(request.prompt_token_ids) + num_delivered,
            self._prefixes.cached_tokens(way.digests),
            decodes=request.sampling.max_tokens - num_delivered > 1,
            near=self._near,
        )
        route = choose(prompt, local or open_workers, self._max_waiting, self._break_even)
        fell_back = dispatch.handoff_failures and route.prefill is None
        self._counts[Reason.FALLBACK if fell_back else route.reason] += 1
        for worker in route.workers:
            self._remember(worker.status, way.digests)
        way.route = route
        way.gaps = FirstGaps(prompt.uncached(route.decode)) if route.prefill is not None else None
        way.new_to_decode = way.digests[prompt.cached.get(route.decode.worker_id, 0) // UNIT :]
        return route

    def delivered(self, way: Way, dispatch: Dispatch, delta: TokenDelta) -> None:
        """Tokens of the request have come."""
        if way.gaps is not None and (extra := way.gaps.heard(len(delta.token_ids), time.monotonic())) is not None:
            self._break_even.observe_handoff(way.gaps.num_tokens, extra)
            way.gaps = None
        if delta.inexact_kv and way.route is not None:
            self._prefixes.drop(way.route.decode.worker_id, way.new_to_decode)
            way.new_to_decode = ()
        elif delta.finish is not None and way.digests and way.route and way.route.decode.worker_id in self._before:
            self._remember(way.route.decode.status, digests_of(dispatch.request, dispatch.delivered, way.digests))

    def heard(self, status: WorkerStatus) -> None:
        """A worker says how it is. The counters of one that only prefills tell the time of a prompt's token."""
        before = self._before.get(status.worker_id, status)
        self._before[status.worker_id] = status
        if status.role is before.role is Role.PREFILL:
            now, then = status.counters, before.counters
            if (num_tokens := now.step_tokens - then.step_tokens) > 0:
                self._break_even.observe_prefill(num_tokens, now.step_seconds - then.step_seconds)

    def lost(self, worker_id: str) -> None:
        self._before.pop(worker_id, None)
        self._prefixes.forget(worker_id)

    def _remember(self, worker: WorkerStatus, digests: Sequence[bytes]) -> None:
        self._prefixes.remember(worker.worker_id, digests, worker.num_blocks * worker.block_size)
