"""Layouts that no other one beats in everything: goodput, what it costs, and both latencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from placement.candidates import Candidate
from placement.goodput import WARM_UP, Goal
from placement.native import serve
from placement.workload import Workload


class Point(msgspec.Struct, frozen=True):
    """A layout at its goodput: `ttft_ms` and `tpot_ms` are what the share of the goal stays below there, or that of the
    target by itself."""

    name: str
    disaggregated: bool
    devices: int
    goodput_rps: float
    ttft_ms: float
    tpot_ms: float
    dollars_per_hour: float | None = None

    @property
    def cost(self) -> float:
        """Dollars an hour, or devices where nobody knows prices."""
        return float(self.devices) if self.dollars_per_hour is None else self.dollars_per_hour

    @property
    def losses(self) -> tuple[float, float, float, float]:
        """The lower, the better."""
        return -self.goodput_rps, self.cost, self.ttft_ms, self.tpot_ms


def point(candidate: Candidate, rate: float, workload: Workload, goal: Goal, priced: bool) -> Point:
    """As it serves the workload at that rate."""
    outcome = serve(candidate.layout, workload, rate).outcome
    start = int(len(outcome.ttft_ms) * WARM_UP)
    ttft_ms, tpot_ms = (
        float(np.quantile(outcome.of(metric)[start:], goal.share_of(metric))) for metric in ("ttft", "tpot")
    )
    price = candidate.dollars_per_hour if priced else None
    return Point(candidate.name, candidate.prefill is not None, candidate.devices, rate, ttft_ms, tpot_ms, price)


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other is at least as good as in everything, and better in something; the cheapest first. Of equals
    the first stays."""
    found: list[Point] = []
    for one in sorted(points, key=lambda one: (one.cost, *one.losses)):
        if not any(_as_good(kept, one) for kept in found):
            found.append(one)
    return sorted(found, key=lambda one: (one.cost, one.goodput_rps))


def _as_good(kept: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(kept.losses, other.losses, strict=True))


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """No more than `most`, over the whole length."""
    if len(points) <= most:
        return list(points)
    return [points[place] for place in np.linspace(0, len(points) - 1, most).round().astype(int)]
