"""What a simulation predicts for each request, and what that means for targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.workload import Times

METRICS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Targets:
    """Milliseconds, inf for a metric without a target. `shares`: of requests, that are to meet one target whatever they
    do by the others, by metric; targets without such a share are to be met together (`demands`)."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float = math.inf
    shares: tuple[tuple[str, float], ...] = ()

    def of(self, metric: str) -> float:
        value: float = getattr(self, f"{metric}_ms")
        return value

    def only(self, metrics: Iterable[str]) -> Targets:
        """Those of some metrics, with their shares."""
        kept = {*metrics}
        ttft, tpot, e2e = (self.of(metric) if metric in kept else math.inf for metric in METRICS)
        return Targets(ttft, tpot, e2e, tuple(pair for pair in self.shares if pair[0] in kept))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that have a target."""
        return tuple(metric for metric in METRICS if self.of(metric) < math.inf)

    @property
    def percentiles(self) -> dict[str, float]:
        """`shares` of 100, by metric."""
        return {metric: 100 * share for metric, share in self.shares}

    def demands(self, share: float) -> dict[tuple[str, ...], float]:
        """Which targets a request has to meet together, and how many requests have to: `share`, unless a target has a
        share of its own."""
        alone = dict(self.shares)
        together = tuple(metric for metric in self.metrics if metric not in alone)
        return ({together: share} if together else {}) | {(metric,): part for metric, part in self.shares}

    def told(self) -> str:
        """As `--slo` has it: `ttft=200@p95,tpot=50`."""
        alone = dict(self.shares)
        parts = (f"{metric}={self.of(metric):g}" for metric in self.metrics)
        places = (f"@p{100 * alone[metric]:g}" if metric in alone else "" for metric in self.metrics)
        return ",".join(part + place for part, place in zip(parts, places, strict=True))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Per request, in the order of arrival: time to first token, time per output token after it, and until the last."""

    ttft_ms: Times  # [requests]
    tpot_ms: Times  # [requests]
    e2e_ms: Times  # [requests]

    @staticmethod
    def joined(parts: Sequence[Outcome]) -> Outcome:
        """Of the requests of all parts, one part after the other."""
        return Outcome(*(np.concatenate([part.of(metric) for part in parts]) for metric in METRICS))

    def of_length(self, requests: int) -> Outcome:
        """Of the first `requests` requests, over and over if there are fewer, as Workload.of_length has them."""
        return Outcome(*(np.resize(self.of(metric), requests) for metric in METRICS))

    def of(self, metric: str) -> Times:
        """# [requests]"""
        values: Times = getattr(self, f"{metric}_ms")
        return values

    def attained(self, targets: Targets) -> NDArray[np.bool_]:
        """Which requests meet all targets. # [requests]"""
        in_time = (self.ttft_ms <= targets.ttft_ms) & (self.tpot_ms <= targets.tpot_ms)
        return in_time & (self.e2e_ms <= targets.e2e_ms)

    def attainment(self, targets: Targets) -> float:
        """The share of requests that meet all targets."""
        return float(np.mean(self.attained(targets)))

    def met(self, targets: Targets) -> dict[str, float]:
        """The share that meets each, by metric."""
        return {metric: self.attainment(targets.only([metric])) for metric in targets.metrics}
