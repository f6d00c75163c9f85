"""What groups of one shape and role can do at most, if the other role costs nothing.

A pool of as many of them as there may be, with ideal groups for the rest of the work, is simulated once. Fewer groups
do no better for each, as they share less of each other's luck; and with real groups beside them, and a router that does
not know at all times what they have to do, they do no better either. But for one thing: groups that prefill one prompt
after the other keep bursts from those that decode. So to a pool that decodes requests come at even distances. So a
layout's goodput is bounded by that of its pools, and there are few pools for many layouts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.bounds import Demand, most_rate
from placement.goodput import UNLOADED, Goal, attains, goodput_near
from placement.latency import Coefficients, StepLatency
from placement.layout import ALONE, Group, Layout, Role
from placement.native import serve
from placement.outcome import METRICS
from placement.refusals import too_slow
from placement.workload import Workload

SLACK = 1.08
"""A sample of requests may treat fewer groups a little better than many."""
REQUESTS_PER_STAGE = 150
LEAST_REQUESTS = 2000
"""How many requests a layout is tried with. With fewer a run is over before its queues have grown to what they stay at,
and goodput comes out too high; whether it does so here the best layouts are asked in longer runs (search.py)."""
_MISSES = 1.2
"""So many times as many requests may miss their targets in a pool: where a target is at the edge of reach, luck decides
at which rates the share attains it, and a layout may be lucky where its pools are not."""

_FREE = Coefficients(0.0, 0.0, 0.0)
_IDEAL = Group(Role.BOTH, StepLatency(_FREE, _FREE, _FREE, 1), 2**50, chunk_tokens=2**40, max_sequences=2**30)


def sized(workload: Workload, stages: int) -> Workload:
    """As many requests as it takes to try a layout whose groups have `stages` stages together."""
    return workload.of_length(max(LEAST_REQUESTS, REQUESTS_PER_STAGE * stages))


def most_each(group: Group, count: int, workload: Workload, handoff_min_tokens: int, goal: Goal) -> float:
    """Requests/s that each of up to `count` such groups, in the role it has, can contribute to a layout. What a request
    takes around the groups is left out, which makes it no lower."""
    ceiling = count * most_rate(group, Demand.of(workload, handoff_min_tokens), goal)
    if ceiling in (0.0, float("inf")):
        return ceiling
    layout, part = _pool(group, count, handoff_min_tokens), _part(group.role, goal).with_misses(_MISSES)
    workload = sized(workload, count * group.stages)
    if group.role is Role.DECODE:
        workload = workload.with_gaps(np.ones(len(workload)))
    if not attains(layout, workload, UNLOADED, part):
        return 0.0
    found = goodput_near(layout, workload, part, ceiling)
    return min(ceiling, SLACK * found if found > 0.0 else ceiling) / count


def why_none(group: Group, workload: Workload, handoff_min_tokens: int, goal: Goal) -> str:
    """Of a group that can't contribute anything."""
    unloaded = serve(_pool(group, 1, handoff_min_tokens), workload, UNLOADED).outcome
    return too_slow(unloaded, _part(group.role, goal))


def _pool(group: Group, count: int, handoff_min_tokens: int) -> Layout:
    pool = (replace(group, island=0, contention=ALONE),) * count
    if group.role is Role.BOTH:
        return Layout(pool, report_ms=0.0)
    other = Role.DECODE if group.role is Role.PREFILL else Role.PREFILL
    return Layout((*pool, replace(_IDEAL, role=other)), handoff_min_tokens=handoff_min_tokens, report_ms=0.0)


def _part(role: Role, goal: Goal) -> Goal:
    """Prefill groups are not to blame for TPOT, nor decode groups for TTFT; all of a request takes no less with ideal
    groups for the rest."""
    others = {Role.PREFILL: "tpot", Role.DECODE: "ttft"}.get(role)
    return Goal(goal.targets.only(metric for metric in METRICS if metric != others), goal.share)
