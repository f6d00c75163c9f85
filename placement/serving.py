"""The simulator of our own system, step by step: the definition that `native.py` computes the same results as.

Requests are routed to the decode lane with the fewest of them, of those that have memory for the prompt, and to the
prefill lane with the least to compute in its island, by what lanes last reported and what was sent to them since. Lanes
fill their steps as the engine's scheduler does: every decode, then chunks of prompts in order of arrival. A request
holds memory for its tokens on the lane that prefills it until its KV has arrived at the lane that decodes it, which
reserves room when the prompt is admitted, if it has any; chunks then leave as they are computed. Otherwise all of it
moves once there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np

from placement.lanes import DECODES_IT, At, LaneState, Request, StepClock
from placement.layout import ALONE, Lane, Layout, Role
from placement.outcome import Outcome
from placement.workload import Times, Workload


@dataclass(frozen=True, eq=False)
class Served:
    """`busy_ms` by lane. The last request ended at `end_ms`."""

    outcome: Outcome
    preemptions: int
    busy_ms: Times
    end_ms: float


def serve_plainly(layout: Layout, workload: Workload, rate: float) -> Served:
    """The workload at `rate` requests per second. Raises ConfigError for a request that could never be held."""
    layout.check(workload)
    arrivals = workload.arrivals_ms(rate)
    world = World(layout, workload)
    world.run(arrivals)
    outcome = to_outcome(workload, arrivals - layout.overhead_ms, world.first, world.last)
    return Served(outcome, world.preemptions, world.busy_ms(), float(world.last.max()))


def to_outcome(workload: Workload, since: Times, first: Times, last: Times) -> Outcome:
    """Times `since` those given. TPOT is over the tokens after the first; 0 where there are none."""
    tpot = (last - first) / np.maximum(workload.output_tokens - 1, 1)
    return Outcome(first - since, tpot, last - since)


_OUTAGE, _ENDING, _STARTING = range(3)
_FAILS, _REPAIRED, _STEP_ENDS, _KV_ARRIVES, _BEGINS, _CALLED = range(6)


class World:
    """At one instant requests come first, then what fails, what ends, and what begins; by lane or request. What `call`
    was given is called before what fails; it may `use` lanes for something else."""

    def __init__(self, layout: Layout, workload: Workload) -> None:
        self.layout = layout
        columns = (workload.prompt_tokens, workload.output_tokens, workload.cached_tokens)
        self.requests = [Request(i, *row) for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))]
        self.lanes = [LaneState(i, lane) for i, lane in enumerate(layout.lanes)]
        self.stranded: list[Request] = []
        self.link_free = [0.0] * len(layout.links)
        self.first, self.last = np.zeros(len(workload)), np.zeros(len(workload))
        self.ended: list[Request] = []
        self.preemptions = 0
        self.now = 0.0
        self._calls: list[Callable[[], None]] = []
        self.events: list[tuple[float, int, int, int, int]] = []

    def busy_ms(self) -> Times:
        return np.array([lane.busy_ms for lane in self.lanes])

    def call(self, at_ms: float, what: Callable[[], None]) -> None:
        self._push(at_ms, _OUTAGE, -1, _CALLED, len(self._calls))
        self._calls.append(what)

    def use(self, lane: LaneState, spec: Lane, *, is_open: bool = True) -> None:
        """For requests that come from now on, if it is open to any. It goes on with those it has."""
        lane.spec, lane.open = spec, is_open

    def run(self, arrivals: Times) -> None:
        for outage in self.layout.outages:
            for lane in self.lanes:
                if lane.spec.group == outage.group:
                    self._push(outage.at_ms, _OUTAGE, lane.index, _FAILS)
                    self._push(outage.at_ms + outage.for_ms, _OUTAGE, lane.index, _REPAIRED)
        for time, request in zip(arrivals.tolist(), self.requests, strict=True):
            while self.events and self.events[0][0] < time:
                self._next_event()
            self.now = time
            self._route(request)
        while self.events:
            self._next_event()

    def _push(self, time: float, rank: int, index: int, kind: int, version: int = 0) -> None:
        heappush(self.events, (time, rank, index, kind, version))

    def _next_event(self) -> None:
        self.now, _, index, kind, version = heappop(self.events)
        if kind == _FAILS:
            self._fail(self.lanes[index])
        elif kind == _REPAIRED:
            self._repair(self.lanes[index])
        elif kind == _STEP_ENDS and version == self.lanes[index].version:
            self._end(self.lanes[index])
        elif kind == _KV_ARRIVES and version == self.requests[index].attempt:
            self._kv_arrived(self.requests[index])
        elif kind == _BEGINS:
            self.lanes[index].starting = False
            self._begin(self.lanes[index])
        elif kind == _CALLED:
            self._calls[version]()

    # --- routing ---------------------------------------------------------------------------------------------------

    def _least_live(self, request: Request) -> LaneState | None:
        """Of those with memory for the prompt, if there are such; of several with as few the one with most."""
        needed = request.target - request.cached
        able = [self._reported(lane) for lane in self.lanes if lane.routed and lane.spec.role is not Role.PREFILL]
        return min(able, key=lambda lane: (lane.told_free < needed, lane.live, -lane.told_free), default=None)

    def _least_pending(self, island: int) -> LaneState | None:
        prefill = [lane for lane in self.lanes if lane.routed and lane.spec.role is Role.PREFILL]
        able = [lane for lane in prefill if lane.spec.island == island]
        return min(able, key=lambda lane: self._reported(lane).told_pending, default=None)

    def _reported(self, lane: LaneState) -> LaneState:
        """With the reports that were due by now; asked also before what it has to do, or holds, changes."""
        lane.report(self.now, self.layout.report_ms)
        return lane

    def _send_to(self, lane: LaneState, *, live: int = 0, pending: int = 0, tokens: int = 0) -> None:
        """More to do, of which the router knows as it is its own doing, as it knows of how many `tokens` the prompt
        is that is to be held there."""
        self._change(lane, live=live, pending=pending)
        lane.told_pending += pending
        lane.told_free -= tokens

    def _change(self, lane: LaneState, *, live: int = 0, pending: int = 0) -> None:
        self._reported(lane)
        lane.live += live
        lane.pending += pending

    def _route(self, request: Request) -> None:
        request.target = request.prompt + request.emitted
        request.at, request.reserved = At.ROUTER, False
        decode = self._least_live(request)
        if decode is None:
            self.stranded.append(request)
            return
        lane = decode
        if decode.spec.role is Role.DECODE:
            prefill = self._least_pending(decode.spec.island) or decode
            if request.emitted + 1 >= request.output:
                lane = decode = prefill  # there will be no KV to hand over
            elif request.target - request.cached >= self.layout.handoff_min_tokens:
                lane = prefill
        request.p, request.d, request.at = lane.index, decode.index, At.WAITING
        self._send_to(decode, live=1, tokens=request.prompt)
        self._send_to(lane, pending=request.target - request.cached)
        lane.waiting.append(request)
        self._kick(lane)

    def _kick(self, lane: LaneState) -> None:
        if lane.running is None and not lane.starting and not lane.down:
            lane.starting = True
            self._push(self.now, _STARTING, lane.index, _BEGINS)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _begin(self, lane: LaneState) -> None:
        if lane.running is not None or lane.down:
            return
        self._reported(lane)
        for request in lane.joined:
            self._join(lane, request)
        lane.joined.clear()
        self._make_room(lane)
        while lane.incoming and self._reserve(lane.incoming[0]):
            self._send_all(lane.incoming.popleft())
        chunks, squares = self._choose_chunks(lane)
        if chunks or lane.decoding:
            lane.running = chunks
            lane.began_ms = self.now
            lane.step = self._clock(lane, squares)
            ends = lane.step.slowed(self.now, self._slowdown(lane))
            self._push(ends, _ENDING, lane.index, _STEP_ENDS, lane.version)
        self._compute(lane, None if lane.running is None else lane.step.prompts)

    def _slowdown(self, lane: LaneState) -> float:
        """By the others that compute on its host. If all want more than its cores they take turns: each computes for
        its part of the time, and has the others beside it for as long as these then have cores. Who takes none of them
        waits for none."""
        own, wanted, more = lane.spec.cores, lane.spec.cores, 0.0
        for other in self.lanes:
            if other.spec.host == lane.spec.host and other.computing is not None and other is not lane:
                more += lane.spec.contention.more(lane.step.prompts, other.computing)
                wanted += other.spec.cores
        if wanted <= 1.0 or not own:
            return 1.0 + more
        return wanted * (1.0 + more * (1.0 - own) / (wanted - own)) if wanted > own else wanted

    def _compute(self, lane: LaneState, prompts: float | None) -> None:
        """It computes a step with this share of prompts from now on, or none, and the steps of the others on its host
        take longer, or less long."""
        if lane.computing == prompts:
            return
        lane.computing = prompts
        for other in self.lanes:
            contends = other.spec.host == lane.spec.host and (other.spec.contention != ALONE or other.spec.cores > 0)
            if contends and other.running is not None and other is not lane:
                other.version += 1
                ends = other.step.slowed(self.now, self._slowdown(other))
                self._push(ends, _ENDING, other.index, _STEP_ENDS, other.version)

    def _join(self, lane: LaneState, request: Request) -> None:
        left = request.output - request.emitted
        request.at, request.joined_at = At.DECODING, lane.steps
        request.ends_at = lane.steps + math.ceil(left / lane.spec.speculation.acceptance_length)
        lane.decoding.append(request)
        lane.context += request.target

    def _make_room(self, lane: LaneState) -> None:
        """A step needs room for what its decodes add. Who came last gives way, and is computed again later; not so a
        prompt that is to be decoded elsewhere, where a lane has changed its role: it is being handed over."""
        while lane.decoding and lane.kv_used + lane.growth > lane.spec.kv_tokens:
            own = (request for request in lane.prompts if request.p == request.d)
            self._preempt(lane, max([*lane.decoding, *own], key=lambda request: request.index))

    def _preempt(self, lane: LaneState, request: Request) -> None:
        self.preemptions += 1
        if request.at is At.DECODING:
            lane.decoding.remove(request)
            self._leave(lane, request)
            request.emitted += lane.emitted_by(request)
        else:
            lane.prompts.remove(request)
            lane.kv_used -= request.target
            lane.seats -= 1
            self._change(lane, pending=request.computed - request.target)
        request.target, request.at = request.prompt + request.emitted, At.WAITING
        request.p, request.reserved = request.d, False  # computed again where it decodes
        self._change(lane, pending=request.target - request.cached)
        lane.waiting.appendleft(request)

    def _leave(self, lane: LaneState, request: Request) -> None:
        lane.kv_used -= lane.held_by(request)
        lane.context -= lane.held_by(request)
        lane.seats -= 1

    def _choose_chunks(self, lane: LaneState) -> tuple[list[tuple[Request, int]], float]:
        budget = lane.spec.chunk_tokens - len(lane.decoding) * lane.spec.speculation.rows
        chunks: list[tuple[Request, int]] = []
        squares = 0.0
        chosen = iter([*lane.prompts])
        while budget > 0:
            request = next(chosen, None) or self._admit(lane)
            if request is None:
                break
            tokens = min(budget, request.target - request.computed)
            budget -= tokens
            squares += float(tokens) * (2.0 * request.computed + tokens)
            chunks.append((request, tokens))
        return chunks, squares

    def _admit(self, lane: LaneState) -> Request | None:
        if not lane.waiting or not lane.has_room(lane.waiting[0]):
            return None
        request = lane.waiting.popleft()
        request.at, request.computed, request.sent_ms = At.PROMPT, request.cached, 0.0
        lane.take(request)
        lane.prompts.append(request)
        if request.p != request.d and not self.lanes[request.d].incoming:
            self._reserve(request)
        return request

    def _clock(self, lane: LaneState, squares: float) -> StepClock:
        sequences, speculation, latency = len(lane.decoding), lane.spec.speculation, lane.spec.latency
        tokens = sum(tokens for _, tokens in lane.running or ())
        took = latency.step_ms(tokens, squares, lane.context, sequences, sequences * speculation.rows)
        if sequences:
            took += speculation.draft_ms + speculation.draft_sequence_ms * sequences
        took += lane.spec.every_step_ms
        prompts = min(1.0, latency.prompt_ms(tokens, squares) / took) if tokens else 0.0
        return StepClock(took, prompts, since_ms=self.now)

    def _end(self, lane: LaneState) -> None:
        self._reported(lane)
        chunks, lane.running = lane.running or [], None
        lane.busy_ms += self.now - lane.began_ms
        if lane.decoding:
            self._advance(lane)
        for request, tokens in chunks:
            self._chunk_done(lane, request, tokens)
        lane.prompts = [request for request in lane.prompts if request.at is At.PROMPT]
        self._kick(lane)

    def _advance(self, lane: LaneState) -> None:
        lane.kv_used += lane.growth
        lane.context += lane.growth
        lane.steps += 1
        for request in [request for request in lane.decoding if request.ends_at == lane.steps]:
            lane.decoding.remove(request)
            self._leave(lane, request)
            self._finish(request)

    def _finish(self, request: Request) -> None:
        request.at = At.DONE
        self.ended.append(request)
        self.last[request.index] = self.now
        self._change(self.lanes[request.d], live=-1)

    def _chunk_done(self, lane: LaneState, request: Request, tokens: int) -> None:
        if request.reserved:
            self._send(request, tokens + request.cached if request.computed == request.cached else tokens)
        request.computed += tokens
        self._change(lane, pending=-tokens)
        if request.computed == request.target:
            self._prompt_done(lane, request)

    def _prompt_done(self, lane: LaneState, request: Request) -> None:
        if request.emitted == 0:
            self.first[request.index] = self.now
        request.emitted += 1
        if request.emitted >= request.output:
            lane.kv_used -= request.target
            lane.seats -= 1
            self._finish(request)
        elif request.p == request.d:
            request.at = At.JOINED
            lane.joined.append(request)
        else:
            request.at = At.HELD
            self._hand_over(request)

    # --- hand-off --------------------------------------------------------------------------------------------------

    def _hand_over(self, request: Request) -> None:
        to = self.lanes[request.d]
        if request.reserved:
            self._push(max(self.now, request.sent_ms), _ENDING, request.index, _KV_ARRIVES, request.attempt)
        elif not to.incoming and self._reserve(request):
            self._send_all(request)
        else:
            to.incoming.append(request)

    def _reserve(self, request: Request) -> bool:
        lane = self.lanes[request.d]
        request.reserved = not lane.down and lane.has_room(request)
        if request.reserved:
            self._reported(lane).take(request)
        return request.reserved

    def _send(self, request: Request, tokens: int) -> None:
        pair = self.lanes[request.p].spec.group, self.lanes[request.d].spec.group
        if (number := self.layout.paths.get(pair)) is not None:
            link = self.layout.links[number]
            self.link_free[number] = max(self.link_free[number], self.now) + tokens * link.ms_per_token
            request.sent_ms = self.link_free[number] + link.latency_ms

    def _send_all(self, request: Request) -> None:
        request.sent_ms = self.now
        self._send(request, request.target)
        self._push(request.sent_ms, _ENDING, request.index, _KV_ARRIVES, request.attempt)

    def _kv_arrived(self, request: Request) -> None:
        self._release(self.lanes[request.p], request)
        request.at = At.JOINED
        self.lanes[request.d].joined.append(request)
        self._kick(self.lanes[request.d])

    def _release(self, lane: LaneState, request: Request) -> None:
        self._reported(lane)
        lane.kv_used -= request.target
        lane.seats -= 1
        self._kick(lane)

    # --- failures --------------------------------------------------------------------------------------------------

    def _fail(self, lane: LaneState) -> None:
        lane.down += 1
        if lane.down > 1:
            return
        live = [request for request in self.requests if request.at not in (At.ROUTER, At.DONE)]
        lost = [request for request in live if lane.index == (request.d if request.at in DECODES_IT else request.p)]
        moved = [request for request in live if request.d == lane.index and request not in lost]
        for request in lost:
            self._give_up(request)
        self._compute(lane, None)
        emptied: dict[str, Any] = vars(LaneState(lane.index, lane.spec))
        kept = {name: getattr(lane, name) for name in ("busy_ms", "steps", "live", "down", "starting", "open")}
        vars(lane).update(emptied | kept | {"version": lane.version + 1})
        for request in moved:
            self._move(request)
        for request in lost:
            self._route(request)

    def _give_up(self, request: Request) -> None:
        decode = self.lanes[request.d]
        if request.at is At.DECODING:
            request.emitted += decode.emitted_by(request)
        elif request.at is not At.JOINED and request.p != request.d:
            if request.reserved:
                self._release(decode, request)
            elif request in decode.incoming:
                decode.incoming.remove(request)
        self._change(decode, live=-1)
        request.attempt += 1

    def _move(self, request: Request) -> None:
        """Its decode lane is down: another one, wherever it is, if there is one."""
        request.attempt += 1
        request.reserved = False
        self._change(self.lanes[request.d], live=-1)
        another = self._least_live(request)
        request.d = request.d if another is None else another.index
        self._send_to(self.lanes[request.d], live=1, tokens=request.prompt)
        if request.at is At.HELD:
            self._hand_over(request)

    def _repair(self, lane: LaneState) -> None:
        lane.down -= 1
        if lane.down == 0:
            lane.next_report_ms = 0.0  # it comes back with a report
            stranded, self.stranded = self.stranded, []
            for request in stranded:
                self._route(request)
            self._kick(lane)
