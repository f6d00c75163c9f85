"""When requests are sent: a gamma renewal process, as in `vllm bench serve`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def arrival_offsets(num_requests: int, rate: float, burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds from the start of the run at which each request is due, ascending. # [num_requests]

    Gaps are Gamma(shape=burstiness, mean=1/rate): 1 is a Poisson process, below 1 clumps, above 1 evens out, inf is a
    constant gap. They are scaled so that the last request falls on num_requests / rate: runs with different seeds then
    offer the same load. A rate of inf sends everything at once.
    """
    if math.isinf(rate):
        return np.zeros(num_requests)
    gaps = np.ones(num_requests) if math.isinf(burstiness) else rng.gamma(burstiness, size=num_requests)
    # With a very small shape every gap may underflow to zero: the whole load is then one clump at the end.
    times = np.cumsum(gaps)
    last = num_requests / rate
    return times * (last / times[-1]) if times[-1] > 0 else np.full(num_requests, last)
