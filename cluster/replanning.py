"""Replanning of a running cluster: what gateways report goes to the replanner, and what it decides is carried out.

Knows nothing of Ray: the controller deployment and cluster.local each bring their membership and their way to have more
or fewer workers, or such of other shapes. Roles and steps follow from the membership's plan.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import and_
from typing import Literal

from cluster.drafted import Drafts
from cluster.membership import Membership, Plan
from cluster.moving import Fleet, Moving
from cluster.recorder import Report
from core.errors import Unavailable
from core.replan_metrics import Decided, ReplanStatus
from core.served import Served, UnderWay
from core.types import Role
from core.wire import WorkerStatus
from placement.arrangement import Arrangement
from placement.live_log import MOST_REQUESTS
from placement.load import NOTHING, Drafted, Load, RoleLoad
from placement.replanner import Change, Replanner
from placement.seen import Seen
from placement.worker_shape import WorkerShape

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0
REPORT_TIMEOUT_S = 5.0
"""A gateway that has not reported for so long is gone."""
NUM_REMEMBERED = 20
"""Decisions that are shown."""
NICE = 10
"""Simulating may use cores that serving leaves."""

Mode = Literal["advise", "on"]
Replan = tuple[Replanner, Mode]

Scale = Callable[[int], Awaitable[None]]
"""Have so many workers from now on; one that is too many drains before it goes. Raises Unavailable."""


class Replanning:
    """`await start()` looks every second; `await stop()` ends it. With `advise`, nothing is changed."""

    def __init__(
        self, replanner: Replanner, mode: Mode, membership: Membership, scale: Scale, fleet: Fleet | None = None
    ) -> None:
        """`fleet` is asked where shapes may change, and `scale` where they don't."""
        self._moving = None
        if fleet is not None and mode == "on" and replanner.settings.shapes:
            self._moving = Moving(fleet, replanner.settings.devices)
        self._known: set[str] = set()
        """Workers whose start was told of."""
        self._replanner = replanner
        self._mode = mode
        self._membership = membership
        self._scale = scale
        self._configured = replanner.arrangement
        self._followed = membership.plan
        self._scaled = membership.plan.workers
        self._reports: dict[str, tuple[float, Report]] = {}
        self._decided: Counter[str] = Counter()
        self._decisions: deque[Decided] = deque(maxlen=NUM_REMEMBERED)
        self._advised: Arrangement | None = None
        self._thread = ThreadPoolExecutor(1, "replanner", _be_nice)
        self._looking: asyncio.Task[None] | None = None
        self._served: deque[Served] = deque(maxlen=MOST_REQUESTS)
        """Of which the replanner has not been told."""
        self._attainment: float | None = None
        self._goodput_rps = 0.0
        self._drafts, self._seen = Drafts(), Seen()
        self._startup_s: float | None = None

    async def start(self) -> None:
        self._looking = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        """Raises what ended it, if something has."""
        if self._looking is not None and self._looking.done() and not self._looking.cancelled():
            self._looking.result()

    def report(self, report: Report, now: float) -> ReplanStatus:
        """What a gateway says, at a monotonic `now`."""
        self._reports[report.gateway_id] = now, report
        self._served.extend(report.served)
        return self.status

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            await self.look(time.monotonic())

    async def look(self, now: float) -> None:
        """Decide what is to be decided at a monotonic `now`, and carry it out."""
        if self._membership.plan != self._followed:  # this controller is new, and has learnt of it from the workers
            self._follow(self._membership.plan, now)
            self._scaled = self._membership.plan.workers
        reports = self._fresh(now)
        starts = await self._move(now, reports)
        served = list(self._served)
        self._served.clear()
        workers = [worker for report in reports for worker in report.workers]
        load = load_of(
            workers,
            sum(report.in_flight for report in reports),
            self._drafts.since(workers),
            {member.worker_id: member.shape for member in self._membership.members()},
            [request for report in reports for request in report.under_way],
            frozenset(report.gateway_id for report in reports),
        )
        loop = asyncio.get_running_loop()
        change = await loop.run_in_executor(self._thread, self._decide, served, starts, load, now)
        if change is not None and self._membership.plan == self._followed:
            await self._take(change, now)

    async def _move(self, now: float, reports: list[Report]) -> list[float]:
        """Bring workers nearer to the shapes of the plan. Returns what starts took of which nothing is known yet,
        seconds."""
        starts = [
            member.startup_s
            for member in self._membership.members()
            if member.startup_s and member.worker_id not in self._known
        ]
        self._known = {member.worker_id for member in self._membership.members()}
        if self._moving is not None:
            try:
                wanted = arrangement_of(self._membership.plan, self._configured).of_shapes
                starts += await self._moving.step(wanted, now, self._seen_by_all(reports))
            except Unavailable as error:
                logger.error("the shapes of workers stay as they are for now: %s", error.message)
        return starts

    def _seen_by_all(self, reports: list[Report]) -> Counter[WorkerShape]:
        """How many workers of a shape every gateway knows, and this controller does, that don't leave: a new one has
        heard of the plan from them."""
        shapes = {member.worker_id: member.shape for member in self._membership.members()}
        each = [
            Counter(
                shape for worker in report.workers if not worker.leaving and (shape := shapes.get(worker.worker_id))
            )
            for report in reports
        ]
        return reduce(and_, each) if each else Counter()

    def _decide(self, served: list[Served], starts: list[float], load: Load, now: float) -> Change | None:
        """On the replanner's thread: it may simulate for seconds."""
        replanner = self._replanner
        replanner.record(served)
        for seconds in starts:
            replanner.started(seconds)
        change = replanner.decide(now, load)
        met = replanner.traffic.met(now)
        self._attainment = met.attainment if met.judged else None
        self._goodput_rps = (met.judged - met.missed) / replanner.settings.recent_s
        self._seen, self._startup_s = replanner.seen, replanner.startup_s
        return change

    async def _take(self, change: Change, now: float) -> None:
        on = self._mode == "on"
        if not on and change.to == self._advised:
            return
        self._advised = change.to
        self._decided[change.by] += 1
        decided = Decided(
            at_s=time.time(),
            by=change.by,
            to=str(change.to),
            why=change.why,
            before=change.before,
            after=change.after,
            gain=change.gain,
            cost=change.cost,
            carried_out=on,
        )
        self._decisions.append(decided)
        logger.warning("%s", decided)
        if on:
            await self._carry_out(change.to, now)

    async def _carry_out(self, to: Arrangement, now: float) -> None:
        plan = plan_of(to, self._membership.plan, self._configured)
        self._membership.plan = plan
        self._follow(plan, now)
        # Where the number is not to change, one that is missing may come back after it has been planned without.
        resized = self._replanner.settings.most_workers and plan.workers != self._scaled
        if resized and not self._replanner.settings.shapes:
            try:
                await self._scale(plan.workers)
                self._scaled = plan.workers
            except Unavailable as error:
                logger.error("the number of workers stays as it is: %s", error.message)

    def _follow(self, plan: Plan, now: float) -> None:
        self._followed = plan
        self._replanner.adopt(arrangement_of(plan, self._configured), now)

    def _fresh(self, now: float) -> list[Report]:
        self._reports = {
            gateway: (at, report) for gateway, (at, report) in self._reports.items() if now - at <= REPORT_TIMEOUT_S
        }
        return [report for _, report in self._reports.values()]

    @property
    def status(self) -> ReplanStatus:
        plan, goal = self._membership.plan, self._replanner.settings.goal
        return ReplanStatus(
            mode=self._mode,
            plan_id=plan.plan_id,
            wanted={role.value: count for role, count in plan.wanted.items()},
            arrangement=str(arrangement_of(plan, self._configured)),
            shapes={role.value: str(shape) for role, shape in plan.shapes.items()},
            startup_s=self._startup_s,
            targets={f"{name}_ms": goal.targets.of(name) for name in goal.targets.metrics} | {"share": goal.share},
            decided=dict(self._decided),
            attainment=self._attainment,
            goodput_rps=self._goodput_rps,
            correction={"prompts": self._seen.prompts, "decodes": self._seen.decodes},
            acceptance_length=self._seen.acceptance_length,
            decisions=list(self._decisions),
        )


def load_of(
    workers: Iterable[WorkerStatus],
    in_flight: int,
    drafted: Drafted = NOTHING,
    shapes: Mapping[str, WorkerShape | None] | None = None,
    under_way: Sequence[UnderWay] = (),
    told_by: frozenset[str] = frozenset(),
) -> Load:
    """What workers say, by role; those that leave are not counted. Of a worker that several gateways tell of, the last
    is taken. `shapes`: by worker, where they may change. `under_way`: of those in flight, as these gateways tell."""
    roles: dict[Role, RoleLoad] = {}
    for worker in {worker.worker_id: worker for worker in workers if not worker.leaving}.values():
        before = roles.get(worker.role, RoleLoad())
        shape = (shapes or {}).get(worker.worker_id)
        roles[worker.role] = RoleLoad(
            workers=before.workers + 1,
            waiting_requests=before.waiting_requests + worker.num_waiting,
            waiting_prompt_tokens=before.waiting_prompt_tokens + worker.num_waiting_tokens,
            running=before.running + worker.num_running,
            free_kv_tokens=before.free_kv_tokens + worker.num_free_blocks * worker.block_size,
            shapes=before.shapes | ({} if shape is None else {shape: before.shapes.get(shape, 0) + 1}),
        )
    return Load(roles=roles, in_flight=in_flight, under_way=list(under_way), told_by=told_by, drafted=drafted)


def plan_of(to: Arrangement, before: Plan, configured: Arrangement) -> Plan:
    """The plan that comes after `before`. Steps stay as configured, by role, until an arrangement has others."""
    as_before = before.step_tokens is None and to.chunk_tokens == configured.chunk_tokens
    return Plan(
        plan_id=before.plan_id + 1,
        wanted={role: to.of(role) for role in Role if to.of(role)},
        step_tokens=None if as_before else to.chunk_tokens,
        shapes={role: shape for role in Role if to.of(role) and (shape := to.shape(role)) is not None},
    )


def arrangement_of(plan: Plan, configured: Arrangement) -> Arrangement:
    prefill, decode, both = (plan.wanted.get(role, 0) for role in (Role.PREFILL, Role.DECODE, Role.BOTH))
    chunk_tokens = plan.step_tokens or configured.chunk_tokens
    if configured.decode_shape is None:
        return Arrangement(prefill, decode, both, chunk_tokens)
    given = {role: plan.shapes.get(role) or configured.shape(role) for role in Role}
    decode_shape = given[Role.DECODE] if decode else given[Role.BOTH]
    return Arrangement(
        prefill, decode, both, chunk_tokens, given[Role.PREFILL] if prefill else decode_shape, decode_shape
    )


def _be_nice() -> None:
    """Of the thread that calls it; Linux has a priority for each."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
