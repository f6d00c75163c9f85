"""What a simulation predicts for each request, and what that means for targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.workload import Times


@dataclass(frozen=True)
class Targets:
    """Milliseconds."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """Per request, in the order of arrival: time to first token, time per output token after it, and until the last."""

    ttft_ms: Times  # [requests]
    tpot_ms: Times  # [requests]
    e2e_ms: Times  # [requests]

    def attained(self, targets: Targets) -> NDArray[np.bool_]:
        """Which requests meet both targets. # [requests]"""
        return (self.ttft_ms <= targets.ttft_ms) & (self.tpot_ms <= targets.tpot_ms)

    def attainment(self, targets: Targets) -> float:
        """The share of requests that meet both targets."""
        return float(np.mean(self.attained(targets)))
