"""Gaps between requests, 1 on average. The first request comes at once."""

from __future__ import annotations

import math

import numpy as np

from core.errors import ConfigError
from placement.workload import Times


def fixed_gaps(requests: int) -> Times:
    """Evenly spaced. # [requests]"""
    return _from_zero(np.ones(requests))


def gamma_gaps(requests: int, cv: float, rng: np.random.Generator) -> Times:
    """Gamma gaps with the coefficient of variation `cv`: 1 is a Poisson process, more comes in bursts. # [requests]"""
    if not cv > 0:
        raise ConfigError(f"cv is {cv}: arrivals need a coefficient of variation above 0", param="cv")
    shape = 1 / cv**2
    return _from_zero(rng.gamma(shape, 1 / shape, size=requests))


def poisson_gaps(requests: int, rng: np.random.Generator) -> Times:
    """Exponential gaps. # [requests]"""
    return gamma_gaps(requests, 1.0, rng)


def burstiness(gaps: Times) -> float:
    """Shape of the gamma law that has the variation of these gaps: 1 is a Poisson process, less is burstier, inf is a
    metronome. The first gap is left out: nobody came before it. 1 where fewer than three requests tell nothing."""
    known = gaps[1:]
    if len(known) < 2 or not (mean := float(known.mean())) > 0:
        return 1.0
    variance = float(known.var(ddof=1))
    return mean**2 / variance if variance > 0 else math.inf


def _from_zero(gaps: Times) -> Times:
    gaps[:1] = 0.0
    return gaps
