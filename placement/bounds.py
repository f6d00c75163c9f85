"""Rates that no simulation can pass, in closed form. They let a search leave out what cannot win.

A group that runs all the time at its best batch serves so many requests per second; with more, its queues grow without
end. At its best means: chunks as large as they may be, as many sequences as memory, seats and the TPOT target admit.
Requests beyond the share that meets its targets are counted as served for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.goodput import Goal
from placement.latency import Coefficients
from placement.layout import Group, Role
from placement.workload import Workload


@dataclass(frozen=True)
class Demand:
    """Means per request: tokens to compute, Σ((past + chunk)² - past²) of them, tokens after the first, and the context
    that such a token sees. What prefill groups compute, and hand over, is less where short prompts are not."""

    prompt_tokens: float
    squares: float
    handed_tokens: float
    handed_squares: float
    kv_tokens: float
    later_tokens: float
    context: float

    @staticmethod
    def of(workload: Workload, handoff_min_tokens: int) -> Demand:
        prompt, cached = workload.prompt_tokens.astype(float), workload.cached_tokens.astype(float)
        later = workload.output_tokens - 1.0
        tokens, squares = prompt - cached, prompt**2 - cached**2
        handed = (tokens > handoff_min_tokens) & (later > 0)
        return Demand(
            prompt_tokens=float(tokens.mean()),
            squares=float(squares.mean()),
            handed_tokens=float((tokens * handed).mean()),
            handed_squares=float((squares * handed).mean()),
            kv_tokens=float((prompt * handed).mean()),
            later_tokens=float(later.mean()),
            context=float((later * (prompt + later / 2)).sum() / max(1.0, later.sum())),
        )


def most_rate(group: Group, demand: Demand, goal: Goal) -> float:
    """Requests/s at which the group is busy all the time with its part of the work."""
    busy_ms = 0.0
    if group.role is not Role.DECODE:
        busy_ms += _prompt_ms(group, demand)
    if group.role is not Role.PREFILL:
        busy_ms += demand.later_tokens * _token_ms(group, demand, goal)
    return group.stages * 1000.0 / busy_ms / goal.share if busy_ms > 0 else float("inf")


def _prompt_ms(group: Group, demand: Demand) -> float:
    """Beside decodes a chunk may cost no step of its own."""
    a, b, c = group.latency.prompt
    if group.role is Role.PREFILL:
        return (a / group.chunk_tokens + b) * demand.handed_tokens + c * demand.handed_squares
    fixed = max(0.0, a - group.latency.shared_ms)
    return (fixed / group.chunk_tokens + b) * demand.prompt_tokens + c * demand.squares


def _token_ms(group: Group, demand: Demand, goal: Goal) -> float:
    """Time of a group per token, at the best batch: the largest for which a step is no longer than TPOT allows."""
    latency, rows = group.latency, 1 if group.speculation is None else group.speculation.rows
    small = _best(group, latency.decode, demand, goal, most=(latency.large_rows - 1) / rows)
    return min(small, _best(group, latency.large_decode, demand, goal, most=np.inf))


def _best(group: Group, coefficients: Coefficients, demand: Demand, goal: Goal, *, most: float) -> float:
    speculation = group.speculation
    gained, rows = (1.0, 1) if speculation is None else (speculation.acceptance_length, speculation.rows)
    fixed = coefficients.a + group.hop_ms * (group.stages - 1) + (speculation.draft_ms if speculation else 0.0)
    each = coefficients.b * (demand.context + 1) + coefficients.c * rows
    each += speculation.draft_sequence_ms if speculation else 0.0
    allowed = (goal.targets.tpot_ms * gained - fixed) / each if each > 0 else np.inf
    held = group.kv_tokens / max(1.0, demand.context)
    batch = min(most, allowed, held / group.stages, group.max_sequences / group.stages)
    return (fixed / batch + each) / gained if batch > 0 else np.inf
