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
        handed = (tokens >= handoff_min_tokens) & (later > 0)
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
    saved = group.latency.shared_ms
    if group.role is Role.PREFILL:
        busy_ms = _prompt_ms(group, demand.handed_tokens, demand.handed_squares)
    elif group.role is Role.DECODE:
        busy_ms = _decode_ms(group, demand, goal)
    else:  # what a step with both saves is taken off what either takes
        busy_ms = max(
            _prompt_ms(group, demand.prompt_tokens, demand.squares, prompts) + _decode_ms(group, demand, goal, decodes)
            for prompts, decodes in ((saved, 0.0), (0.0, saved))
        )
    return group.stages * 1000.0 / busy_ms / goal.least if busy_ms > 0 else float("inf")


def _prompt_ms(group: Group, tokens: float, squares: float, saved: float = 0.0) -> float:
    """Of a request, in chunks of the best size; a chunk beside decodes saves so much."""
    latency, chunk = group.latency, group.chunk_tokens
    border = chunk + 1 if latency.large_prompt is None else latency.large_tokens
    sizes = [(latency.prompt, 1, min(chunk, border - 1)), (latency.prompts(border), border, chunk)]
    able = [(c, least, most) for c, least, most in sizes if least <= most]
    each = min(_per_token(c.a - saved, c.b, least, most) for c, least, most in able)
    return each * tokens + min(c.c for c, *_ in able) * squares


def _per_token(fixed: float, each: float, least: float, most: float) -> float:
    """Of steps that take `fixed` and `each` for each of their tokens, as many as are best."""
    return max(0.0, fixed / (most if fixed > 0 else least) + each)


def _decode_ms(group: Group, demand: Demand, goal: Goal, saved: float = 0.0) -> float:
    """Of a request. Answers of one token need none, however long a step takes."""
    return demand.later_tokens * _token_ms(group, demand, goal, saved) if demand.later_tokens else 0.0


def _token_ms(group: Group, demand: Demand, goal: Goal, saved: float = 0.0) -> float:
    """Time of a group per token, at the best batch: the largest for which a step is no longer than TPOT allows, unless
    what it saves beside prompts makes up for all that it takes whatever the batch."""
    latency, rows = group.latency, 1 if group.speculation is None else group.speculation.rows
    border = latency.large_rows / rows
    small = _best(group, latency.decode, demand, goal, saved, least=1.0, most=(latency.large_rows - 1) / rows)
    return min(small, _best(group, latency.large_decode, demand, goal, saved, least=border, most=np.inf))


def _best(
    group: Group,
    coefficients: Coefficients,
    demand: Demand,
    goal: Goal,
    saved: float,
    *,
    least: float,
    most: float,
) -> float:
    speculation = group.speculation
    gained, rows = (1.0, 1) if speculation is None else (speculation.acceptance_length, speculation.rows)
    fixed = coefficients.a + group.hop_ms * (group.stages - 1) + (speculation.draft_ms if speculation else 0.0)
    each = coefficients.b * (demand.context + 1) + coefficients.c * rows
    each += speculation.draft_sequence_ms if speculation else 0.0
    allowed = (goal.targets.tpot_ms * gained - fixed) / each if each > 0 else np.inf
    held = group.kv_tokens / max(1.0, demand.context)
    batch = min(most, allowed, held / group.stages, group.max_sequences / group.stages)
    return _per_token(fixed - saved, each, min(least, batch), batch) / gained if batch > 0 else np.inf
