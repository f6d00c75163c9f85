"""What replanning would have done with a trace: the simulator runs it, the replanner is asked every second, and workers
change their roles in the middle of the run as live ones do."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from msgspec import Struct

from core import types
from core.errors import ConfigError
from core.served import Served
from placement.arranged import Simulated
from placement.arrangement import Arrangement
from placement.change import Change
from placement.lanes import LaneState, Request
from placement.layout import Role
from placement.load import Load, RoleLoad
from placement.native import serve
from placement.outcome import Outcome
from placement.replanner import Replanner
from placement.serving import World, to_outcome
from placement.workload import Times, Workload

_MOST_INTERVALS = 50
_INTERVALS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
TICK_S = 1.0
"""Between two questions to the replanner."""
MOST_S = 14 * 86400.0


class Changed(Struct, frozen=True):
    at_s: float
    change: Change


class Interval(Struct, frozen=True):
    """Of the requests that came from `at_s` to the next interval, the share that met both targets, with replanning and
    `without`; None if none came. `arrangement` is that at its beginning, with replanning."""

    at_s: float
    requests: int
    arrangement: Arrangement
    attainment: float | None
    without: float | None


class Replayed(Struct, frozen=True, kw_only=True):
    """`attainment` and `without` are of all requests but the `left_out`, which no worker can hold; `workers` is how
    many there were on average. `warnings`: what is extrapolated."""

    start: Arrangement
    requests: int
    rate_rps: float
    attainment: float
    without: float
    workers: float
    changes: list[Changed]
    intervals: list[Interval]
    left_out: int = 0
    warnings: list[str] = []


def replay(
    workload: Workload,
    rate: float,
    workers: Simulated,
    replanner: Replanner,
    interval_s: float | None = None,
    left_out: int = 0,
) -> Replayed:
    """From the replanner's arrangement on, which `without` keeps. Intervals are round, and some tens of them, unless
    given. Raises ConfigError for a request that no worker can hold, and for more than MOST_S."""
    start = replanner.arrangement
    if (lasts_s := float(workload.arrivals_ms(rate)[-1] / 1e3)) > MOST_S:
        raise ConfigError(
            f"the trace takes {lasts_s / 86400:.3g} days at {rate:.3g} requests/s, and a replay {MOST_S / 86400:g} at "
            "the most: give a higher --rate, or a part of it",
            param="rate",
        )
    run = _Run(workload, rate, workers, replanner)
    run.whole()
    targets = replanner.settings.goal.targets
    met = run.outcome().attained(targets)
    met_without = serve(workers.layout(start), workload, rate).outcome.attained(targets)
    end_s = float(run.arrivals[-1] / 1e3)
    if interval_s is None:
        interval_s = next((each for each in _INTERVALS_S if end_s <= _MOST_INTERVALS * each), end_s)
    edges = np.arange(0.0, end_s + interval_s, interval_s)
    place = np.digitize(run.arrivals / 1e3, edges) - 1
    every_s = np.arange(0.0, max(edges[-1], TICK_S), TICK_S).tolist()
    intervals = []
    for number, at_s in enumerate(edges[: place.max() + 1].tolist()):
        inside = place == number
        share, without = (float(of[inside].mean()) if inside.any() else None for of in (met, met_without))
        intervals.append(Interval(at_s, int(inside.sum()), run.arrangement_at(at_s), share, without))
    return Replayed(
        start=start,
        requests=len(workload),
        rate_rps=rate,
        attainment=float(met.mean()),
        without=float(met_without.mean()),
        workers=float(np.mean([run.arrangement_at(at_s).workers for at_s in every_s])),
        changes=run.changes,
        intervals=intervals,
        left_out=left_out,
    )


@dataclass
class _Run:
    workload: Workload
    rate: float
    workers: Simulated
    replanner: Replanner
    changes: list[Changed] = field(default_factory=list)
    told: int = 0
    """Ended requests that the replanner knows."""

    def __post_init__(self) -> None:
        start = self.replanner.arrangement
        roles = [Role.PREFILL] * start.prefill + [Role.DECODE] * start.decode + [Role.BOTH] * start.both
        spare = max(0, self.replanner.settings.most_workers - start.workers)
        layout = self.workers.layout_of([*roles, *[Role.DECODE] * spare], start.chunk_tokens)
        layout.check(self.workload)
        self.start, self.world = start, World(layout, self.workload)
        self.arrivals: Times = self.workload.arrivals_ms(self.rate)
        self.lanes = [[lane for lane in self.world.lanes if lane.spec.group == n] for n in range(len(layout.groups))]
        """Of each worker."""
        for lanes in self.lanes[start.workers :]:
            self._use(lanes, types.Role.DECODE, start.chunk_tokens, is_open=False)

    def whole(self) -> None:
        for at_s in np.arange(TICK_S, self.arrivals[-1] / 1e3, TICK_S).tolist():
            self.world.call(at_s * 1e3, self._tick)
        self.world.run(self.arrivals)

    def outcome(self) -> Outcome:
        since = self.arrivals - self.workers.overhead_ms
        return to_outcome(self.workload, since, self.world.first, self.world.last)

    def arrangement_at(self, at_s: float) -> Arrangement:
        before = [changed.change.to for changed in self.changes if changed.at_s <= at_s]
        return before[-1] if before else self.start

    def _tick(self) -> None:
        now_s = self.world.now / 1e3
        ended, self.told = self.world.ended[self.told :], len(self.world.ended)
        self.replanner.record([self._served(request) for request in ended])
        arrived = int(np.searchsorted(self.arrivals, self.world.now, side="right"))
        change = self.replanner.decide(now_s, self._load(arrived - self.told))
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
            ttft_ms=first - came + self.workers.overhead_ms,
            tpot_ms=(last - first) / (request.output - 1) if request.output > 1 else None,
            ended=types.FinishReason.LENGTH,
        )

    def _load(self, in_flight: int) -> Load:
        there = {role: [lanes for lanes in self.lanes if lanes[0].open and _role(lanes) is role] for role in types.Role}
        return Load(roles={role: _role_load(of) for role, of in there.items()}, in_flight=in_flight)

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

    def _use(self, lanes: list[LaneState], role: types.Role, chunk_tokens: int, *, is_open: bool = True) -> None:
        number = self.lanes.index(lanes)
        roles = [Role[role.name] if n == number else Role.BOTH for n in range(len(self.lanes))]
        specs = self.workers.layout_of(roles, chunk_tokens).lanes
        for lane in lanes:
            self.world.use(lane, specs[lane.index], is_open=is_open)


def _role(lanes: list[LaneState]) -> types.Role:
    return types.Role[lanes[0].spec.role.name]


def _work(lanes: list[LaneState]) -> int:
    return sum(lane.live + lane.pending for lane in lanes)


def _role_load(workers: list[list[LaneState]]) -> RoleLoad:
    lanes = [lane for of in workers for lane in of]
    return RoleLoad(
        workers=len(workers),
        waiting_requests=sum(len(lane.waiting) for lane in lanes),
        waiting_prompt_tokens=sum(lane.pending for lane in lanes),
        running=sum(len(lane.prompts) + len(lane.joined) + len(lane.decoding) for lane in lanes),
        free_kv_tokens=int(sum(lane.spec.kv_tokens - lane.kv_used for lane in lanes)),
    )
