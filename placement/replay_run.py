"""A replay under way: the simulator runs a trace, the replanner is asked every second, and workers change in the middle
as live ones do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from functools import partial

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from core import types
from core.served import Served, UnderWay
from placement.arranged import Simulated
from placement.arrangement import Arrangement
from placement.change import Change
from placement.lanes import At, LaneState, Request
from placement.layout import Layout, Role
from placement.load import Load, RoleLoad
from placement.moving import Held, ask
from placement.outcome import Outcome
from placement.replanner import Replanner
from placement.serving import World, to_outcome
from placement.shaped import Shaped
from placement.worker_shape import WorkerShape
from placement.workload import Times, Workload

TICK_S = 1.0
"""Between two questions to the replanner."""


class Changed(Struct, frozen=True):
    at_s: float
    change: Change


def run_of(workload: Workload, rate: float, workers: Simulated | Shaped, replanner: Replanner) -> Run:
    """Raises ConfigError for a request that no worker can hold."""
    if isinstance(workers, Simulated):
        return Roles(workload, rate, workers, replanner)
    return Shapes(workload, rate, workers, replanner)


class Run(ABC):
    """`lanes` are those of each worker that there may come to be."""

    def __init__(
        self, workload: Workload, rate: float, layout: Layout, overhead_ms: float, replanner: Replanner
    ) -> None:
        layout.check(workload)
        self.workload, self.overhead_ms, self.replanner = workload, overhead_ms, replanner
        self.start, self.world = replanner.arrangement, World(layout, workload)
        self.arrivals: Times = workload.arrivals_ms(rate)
        self.lanes = [[lane for lane in self.world.lanes if lane.spec.group == n] for n in range(len(layout.groups))]
        self.changes: list[Changed] = []
        self.told = 0
        """Ended requests that the replanner knows."""
        self.arrived, self.under_way = 0, list[Request]()
        """How many have come, and those that have not ended."""

    def whole(self) -> None:
        for at_s in np.arange(TICK_S, self.arrivals[-1] / 1e3, TICK_S).tolist():
            self.world.call(at_s * 1e3, self._tick)
        self.world.run(self.arrivals)

    def outcome(self) -> Outcome:
        since = self.arrivals - self.overhead_ms
        return to_outcome(self.workload, since, self.world.first, self.world.last)

    def arrangement_at(self, at_s: float) -> Arrangement:
        before = [changed.change.to for changed in self.changes if changed.at_s <= at_s]
        return before[-1] if before else self.start

    def _tick(self) -> None:
        now_s = self.world.now / 1e3
        ended, self.told = self.world.ended[self.told :], len(self.world.ended)
        self.replanner.record([self._served(request) for request in ended])
        before, self.arrived = self.arrived, int(np.searchsorted(self.arrivals, self.world.now, side="right"))
        there = [*self.under_way, *self.world.requests[before : self.arrived]]
        self.under_way = [request for request in there if request.at is not At.DONE]
        change = self.replanner.decide(now_s, self._load())
        if change is not None:
            self._carry_out(change.to)
            self.replanner.adopt(change.to, now_s)
            self.changes.append(Changed(now_s, change))

    def _served(self, request: Request) -> Served:
        came = float(self.arrivals[request.index])
        first, last = (float(times[request.index]) for times in (self.world.first, self.world.last))
        return Served(
            arrived_s=came / 1e3,
            prompt_tokens=request.prompt,
            cached_tokens=request.cached,
            output_tokens=request.output,
            ttft_ms=first - came + self.overhead_ms,
            tpot_ms=(last - first) / (request.output - 1) if request.output > 1 else None,
            ended=types.FinishReason.LENGTH,
        )

    def _so_far(self, request: Request) -> UnderWay:
        """What its gateway would know: of the tokens that were delivered."""
        lane = self.world.lanes[request.d]
        tokens = request.emitted + (lane.emitted_by(request) if request.at is At.DECODING else 0)
        for_s = (self.world.now - float(self.arrivals[request.index]) + self.overhead_ms) / 1e3
        return UnderWay(for_s, request.prompt, request.cached if tokens else 0, min(tokens, request.output - 1))

    def _load(self) -> Load:
        there = {role: [lanes for lanes in self.lanes if lanes[0].open and _role(lanes) is role] for role in types.Role}
        return Load(
            roles={role: self._role_load(of) for role, of in there.items()},
            in_flight=len(self.under_way),
            under_way=[self._so_far(request) for request in self.under_way],
        )

    def _role_load(self, workers: list[list[LaneState]]) -> RoleLoad:
        lanes = [lane for of in workers for lane in of]
        return RoleLoad(
            workers=len(workers),
            waiting_requests=sum(len(lane.waiting) for lane in lanes),
            waiting_prompt_tokens=sum(lane.pending for lane in lanes),
            running=sum(len(lane.prompts) + len(lane.joined) + len(lane.decoding) for lane in lanes),
            free_kv_tokens=int(sum(lane.spec.kv_tokens - lane.kv_used for lane in lanes)),
        )

    @abstractmethod
    def _carry_out(self, to: Arrangement) -> None:
        """Begin to."""

    @abstractmethod
    def _layout(self, roles: list[Role], chunk_tokens: int) -> Layout:
        """With a role for each of the workers."""

    def _use(self, lanes: list[LaneState], role: types.Role, chunk_tokens: int, *, is_open: bool = True) -> None:
        number = self.lanes.index(lanes)
        roles = [Role[role.name] if n == number else Role.BOTH for n in range(len(self.lanes))]
        specs = self._layout(roles, chunk_tokens).lanes
        for lane in lanes:
            self.world.use(lane, specs[lane.index], is_open=is_open)


class Roles(Run):
    """Workers that are alike."""

    def __init__(self, workload: Workload, rate: float, workers: Simulated, replanner: Replanner) -> None:
        self.workers, start = workers, replanner.arrangement
        roles = [Role.PREFILL] * start.prefill + [Role.DECODE] * start.decode + [Role.BOTH] * start.both
        spare = max(0, replanner.settings.most_workers - start.workers)
        layout = workers.layout_of([*roles, *[Role.DECODE] * spare], start.chunk_tokens)
        super().__init__(workload, rate, layout, workers.overhead_ms, replanner)
        for lanes in self.lanes[start.workers :]:
            self._use(lanes, types.Role.DECODE, start.chunk_tokens, is_open=False)

    def _layout(self, roles: list[Role], chunk_tokens: int) -> Layout:
        return self.workers.layout_of(roles, chunk_tokens)

    def _carry_out(self, to: Arrangement) -> None:
        """Workers keep their roles as far as these are wanted, first those with most to do. New ones serve once they
        have started; those that are given up get nothing new."""
        wanted, changing = [role for role in types.Role for _ in range(to.of(role))], []
        for lanes in sorted((lanes for lanes in self.lanes if lanes[0].open), key=_work, reverse=True):
            if (role := _role(lanes)) in wanted:
                wanted.remove(role)
                self._use(lanes, role, to.chunk_tokens)
            else:
                changing.append(lanes)
        for lanes, role in zip(changing, wanted, strict=False):
            self._use(lanes, role, to.chunk_tokens)
        for lanes in changing[len(wanted) :]:
            self._use(lanes, _role(lanes), to.chunk_tokens, is_open=False)
        spare = [lanes for lanes in self.lanes if not lanes[0].open and lanes not in changing]
        ready_ms = self.world.now + self.replanner.settings.startup_s * 1e3
        for lanes, role in zip(spare, wanted[len(changing) :], strict=False):
            self.world.call(ready_ms, partial(self._use, lanes, role, to.chunk_tokens))


class Shapes(Run):
    """Workers that give way to such of another shape, as devices come free. There is a place for as many of each shape
    as all devices hold; who has none of the devices is closed."""

    def __init__(self, workload: Workload, rate: float, workers: Shaped, replanner: Replanner) -> None:
        self.workers, start, settings = workers, replanner.arrangement, replanner.settings
        self.budget = max(settings.devices, start.devices)
        self.shapes, self.hosts = workers.places(self.budget)
        self.starting: set[int] = set()
        self.asked = start.of_shapes
        layout = self._layout([Role.BOTH] * len(self.shapes), start.chunk_tokens)
        super().__init__(workload, rate, layout, workers.overhead_ms, replanner)
        for lanes in self.lanes:
            self._use(lanes, types.Role.BOTH, start.chunk_tokens, is_open=False)
        for shape, count in self.asked.items():
            for number in self._places(shape)[:count]:
                self._use(self.lanes[number], types.Role.BOTH, start.chunk_tokens)
        self._assign()

    def _tick(self) -> None:
        super()._tick()
        self._move()

    def _carry_out(self, to: Arrangement) -> None:
        """From the next moment on, as `_move` has it."""

    def _layout(self, roles: list[Role], chunk_tokens: int) -> Layout:
        return self.workers.layout_of(list(zip(self.shapes, roles, strict=True)), self.hosts, chunk_tokens)

    def _role_load(self, workers: list[list[LaneState]]) -> RoleLoad:
        of = Counter(self.shapes[self.lanes.index(lanes)] for lanes in workers)
        return replace(super()._role_load(workers), shapes=dict(of))

    def _move(self) -> None:
        to = self.arrangement_at(self.world.now / 1e3)
        held = {
            shape: Held(
                serving=len(self._serving(shape)),
                starting=sum(self.shapes[number] == shape for number in self.starting),
                leaving=sum(_holds(self.lanes[number]) for number in self._places(shape) if not self._open(number)),
            )
            for shape in self.workers.of
        }
        before, self.asked = self.asked, ask(to.of_shapes, self.asked, held, self.budget)
        if before == self.asked and not self.starting and self._settled(to):
            return
        for shape, count in self.asked.items():
            for number in self._serving(shape)[count:]:  # the newest, as with Ray Serve
                self._use(self.lanes[number], _role(self.lanes[number]), to.chunk_tokens, is_open=False)
            free = [n for n in self._places(shape) if n not in self.starting and not self._open(n)]
            idle = [number for number in free if not _holds(self.lanes[number])]
            missing = count - len(self._serving(shape)) - sum(self.shapes[n] == shape for n in self.starting)
            for number in idle[: max(0, missing)]:
                self.starting.add(number)
                ready_ms = self.world.now + self.replanner.settings.startup_s * 1e3
                self.world.call(ready_ms, partial(self._up, number))
        self._assign()

    def _up(self, number: int) -> None:
        self.starting.discard(number)
        chunk_tokens = self.arrangement_at(self.world.now / 1e3).chunk_tokens
        self._use(self.lanes[number], types.Role.BOTH, chunk_tokens)
        self._assign()

    def _settled(self, to: Arrangement) -> bool:
        there = {role: Counter[WorkerShape]() for role in types.Role}
        for number, lanes in enumerate(self.lanes):
            if self._open(number):
                there[_role(lanes)][self.shapes[number]] += 1
        steps = {lanes[0].spec.chunk_tokens for number, lanes in enumerate(self.lanes) if self._open(number)}
        wanted = {role: {to.shape(role): to.of(role)} if to.of(role) else {} for role in types.Role}
        return there == wanted and steps == {to.chunk_tokens}

    def _assign(self) -> None:
        """Roles to those who serve: first to such of the shape that a role is to have, then to others instead of those
        that are to come."""
        to = self.arrangement_at(self.world.now / 1e3)
        wanted = Counter({role: to.of(role) for role in types.Role})
        serving = [number for number in range(len(self.lanes)) if self._open(number)]
        serving.sort(key=lambda number: _work(self.lanes[number]), reverse=True)
        for right in (True, False):
            for number in [*serving]:
                lanes, shape = self.lanes[number], self.shapes[number]
                roles = [role for role in types.Role if wanted[role] and (not right or to.shape(role) == shape)]
                if roles:
                    role = _role(lanes) if _role(lanes) in roles else roles[0]
                    wanted[role] -= 1
                    serving.remove(number)
                    self._use(lanes, role, to.chunk_tokens)

    def _places(self, shape: WorkerShape) -> list[int]:
        return [number for number, other in enumerate(self.shapes) if other == shape]

    def _serving(self, shape: WorkerShape) -> list[int]:
        return [number for number in self._places(shape) if self._open(number)]

    def _open(self, number: int) -> bool:
        return self.lanes[number][0].open


def _holds(lanes: list[LaneState]) -> bool:
    """Whether it has requests yet."""
    return any(lane.live or lane.pending or lane.seats for lane in lanes)


def _role(lanes: list[LaneState]) -> types.Role:
    return types.Role[lanes[0].spec.role.name]


def _work(lanes: list[LaneState]) -> int:
    return sum(lane.live + lane.pending for lane in lanes)
