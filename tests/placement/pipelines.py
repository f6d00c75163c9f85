"""Small pipelines and workloads to simulate, and strategies that draw them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from placement.latency import Coefficients, DistServeLatency
from placement.pipeline import Pipelines
from placement.workload import Workload

SMALL = DistServeLatency(
    Coefficients(18.1, 0.1019, 7.1e-6), Coefficients(19.9, 0.00063, 0.0385), Coefficients(7.2, 0.00058, 0.158), 4
)


def workload(prompts: list[int], outputs: list[int], gaps: list[float]) -> Workload:
    return Workload(np.array(prompts, np.int32), np.array(outputs, np.int32), np.array(gaps, np.float64))


def azure_like(requests: int, seed: int = 0) -> Workload:
    """Poisson arrivals with prompts of about 1000 tokens and about 200 output tokens."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(6.6, 0.8, requests), 8, 8000).astype(np.int32)
    outputs = np.clip(rng.lognormal(5.0, 0.8, requests), 1, 1000).astype(np.int32)
    return Workload(prompts, outputs, rng.exponential(size=requests))


@st.composite
def workloads(draw: st.DrawFn, *, longest: int = 900, most_output: int = 12) -> Workload:
    count = draw(st.integers(1, 24))

    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    gaps = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.7]), min_size=count, max_size=count))
    return workload(column(1, longest), column(1, most_output), gaps)


coefficients = st.builds(Coefficients, st.floats(0.0, 50.0), st.floats(0.0, 0.2), st.floats(0.0, 0.5))
latencies = st.builds(DistServeLatency, coefficients, coefficients, coefficients, st.integers(1, 8))


@st.composite
def pipelines(draw: st.DrawFn) -> Pipelines:
    latency, stages, cap = draw(latencies), draw(st.integers(1, 3)), draw(st.integers(900, 3000))
    if draw(st.booleans()):
        return Pipelines(latency, stages, cap, latency, stages, colocated=True)
    return Pipelines(latency, stages, cap, draw(latencies), draw(st.integers(1, 3)))
