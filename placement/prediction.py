"""What a simulation of a layout says, in a form to print."""

from __future__ import annotations

import time

import msgspec
import numpy as np

from placement.layout import Layout
from placement.native import load, serve
from placement.outcome import Targets
from placement.workload import Times, Workload

_PERCENTILES = (50, 90, 95, 99)


class Prediction(msgspec.Struct):
    """Milliseconds by statistic (`mean`, `p50`, …); `attainment` and `goodput_rps`, of requests that meet all targets,
    where some were given, and `met`, the share that meets each. `busy` is the share of the time that each group
    computes, the mean of its stages; `cpu_s` what simulating it took."""

    requests: int
    rate_rps: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    e2e_ms: dict[str, float]
    preemptions: int
    busy: list[float]
    cpu_s: float
    attainment: float | None = None
    goodput_rps: float | None = None
    met: dict[str, float] = {}


def predict(layout: Layout, workload: Workload, rate: float, targets: Targets | None = None) -> Prediction:
    """Raises ConfigError for a request that a group could never hold."""
    load()  # compiling is not part of simulating
    started = time.process_time()
    served = serve(layout, workload, rate)
    cpu_s = time.process_time() - started
    outcome = served.outcome
    attainment = None if targets is None else outcome.attainment(targets)
    groups = np.array([lane.group for lane in layout.lanes])
    return Prediction(
        requests=len(workload),
        rate_rps=rate,
        ttft_ms=statistics_of(outcome.ttft_ms),
        tpot_ms=statistics_of(outcome.tpot_ms),
        e2e_ms=statistics_of(outcome.e2e_ms),
        preemptions=served.preemptions,
        busy=[float(served.busy_ms[groups == group].mean() / served.end_ms) for group in range(len(layout.groups))],
        cpu_s=cpu_s,
        attainment=attainment,
        goodput_rps=None if attainment is None else attainment * rate,
        met={} if targets is None else outcome.met(targets),
    )


def statistics_of(values: Times) -> dict[str, float]:
    """Mean and percentiles, by name."""
    shares = np.percentile(values, _PERCENTILES)
    return {"mean": float(values.mean())} | {f"p{p}": float(v) for p, v in zip(_PERCENTILES, shares, strict=True)}
