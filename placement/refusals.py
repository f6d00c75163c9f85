"""Why layouts, or groups of which they would be made, will not do, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from placement.goodput import Goal
from placement.outcome import Outcome
from placement.slo import shown


def reached(outcome: Outcome, metric: str, goal: Goal) -> float:
    """Milliseconds that the share which is to meet the target of this metric stays below."""
    return float(np.quantile(outcome.of(metric), goal.share_of(metric), method="lower"))


def too_slow(unloaded: Outcome, goal: Goal) -> str:
    """Of what attains the goal at no rate, by what it does with one request at a time."""
    missed = [metric for metric in goal.targets.metrics if reached(unloaded, metric, goal) > goal.targets.of(metric)]
    if missed:
        each = (
            f"{metric.upper()} is {shown(reached(unloaded, metric, goal))} ms for {goal.share_of(metric):.0%} of "
            f"requests, and is to be {goal.targets.of(metric):g}"
            for metric in missed
        )
        return f"too slow even without load: {'; '.join(each)}"
    for metrics, share in goal.demands.items():
        met = unloaded.attainment(goal.targets.only(metrics))
        if met < share:
            return f"too slow even without load: {met:.1%} of requests meet all targets, and {share:.0%} are to"
    return "attains the targets without load only, at no rate that was tried"


def by_reason(refused: Mapping[str, str], most: int) -> list[str]:
    """`what, and 3 more alike: why`, each reason once, and no more than `most` of them."""
    names: dict[str, list[str]] = {}
    for name, why in refused.items():
        names.setdefault(why, []).append(name)
    lines = [
        f"{alike[0]}{f', and {len(alike) - 1} more alike' if len(alike) > 1 else ''}: {why}"
        for why, alike in names.items()
    ]
    left = sum(len(alike) for alike in [*names.values()][most:])
    return lines[:most] + ([f"{left} more, for other reasons"] if left else [])
