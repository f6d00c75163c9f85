"""How fast a served layout is at some time, beside what is predicted: requests are put to it one at a time, so that
none waits for another, right before a load and right after it. A machine that is shared goes from one speed to another
within seconds, and not all of its processes are as fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bench.planning.load import Server
from placement.layout import Layout
from placement.native import serve
from placement.outcome import Outcome
from placement.workload import Workload

_ALONE = 6
_APART_S = 1e4
_SLACK = 1.2
"""So many times as long as it is predicted to take a request has to itself, and then its workers have …"""
_REST_S = 0.5
"""… as they have between requests that come now and then: those that always compute may be faster."""


class Pace(NamedTuple):
    """How many times as long as predicted first tokens took, and further ones."""

    prompts: float = 1.0
    decodes: float = 1.0

    @staticmethod
    def mean(paces: Sequence[Pace]) -> Pace:
        """The geometric one."""
        return Pace(*(math.prod(each) ** (1 / len(paces)) for each in zip(*paces, strict=True)))

    def of(self, layout: Layout) -> Layout:
        """With steps that take as much longer."""
        groups = (replace(group, latency=group.latency.times(*self)) for group in layout.groups)
        return replace(layout, groups=tuple(groups))


def pace_of(server: Server, layout: Layout, workload: Workload) -> Pace:
    """Of its first requests, by the median. Raises Unavailable if one fails."""
    few = workload.of_length(_ALONE)
    predicted = serve(layout, few.with_gaps(np.full(_ALONE, _APART_S)), 1.0).outcome
    gaps = np.concatenate([[0.0], _SLACK * predicted.e2e_ms[:-1] / 1000.0 + _REST_S])
    return beside(predicted, server.outcome(few.with_gaps(gaps), 1.0))


def beside(predicted: Outcome, measured: Outcome) -> Pace:
    """Of the same requests. Answers of a token tell nothing of further ones."""
    further = predicted.tpot_ms > 0.0
    first = float(np.median(measured.ttft_ms / predicted.ttft_ms))
    if not further.any():
        return Pace(first, first)
    return Pace(first, float(np.median(measured.tpot_ms[further] / predicted.tpot_ms[further])))
