"""Lengths of requests as they are written on a command line: `prompt=512,output=128,cv=0.8,cached=0.5`."""

from __future__ import annotations

import math

import numpy as np

from core.errors import ConfigError
from placement.arrivals import gamma_gaps
from placement.workload import Lengths, Workload

REQUESTS = 3000
_EXAMPLE = (
    "write --lengths prompt=512,output=128, in tokens, cv=0.8 for how much they vary, and cached=0.5 for the share of "
    "each prompt that begins like others"
)
_MOST_VARIATION = 100.0
_MOST_TOKENS = 10**9
"""Of a prompt or an output that is drawn, as of one in a trace."""
_NAMES = ("prompt", "output", "cv", "cached")


def parse_lengths(text: str, seed: int = 0, *, burstiness: float = 1.0) -> Workload:
    """Requests that come at random, with lengths of these means, by a lognormal distribution; `cv`, of both, is the
    standard deviation over the mean, and 0 if left out; `cached` the share of each prompt that a prefix cache has, as
    of a trace's prompts it has what earlier ones began with (prefixes.py), and 0 if left out. `burstiness` is the shape
    of their gamma gaps: 1 is a Poisson process, less is burstier. Raises ConfigError."""
    parts = [part.strip().partition("=") for part in text.split(",")]
    found = {name: _number(name, value) for name, _, value in parts if name in _NAMES}
    if len(found) < len(parts) or not {"prompt", "output"} <= found.keys():
        raise ConfigError(f"--lengths: {text!r} is not one mean for prompt and one for output: {_EXAMPLE}")
    for name in ("prompt", "output"):
        if not 1 <= found[name] <= 1e7:
            raise ConfigError(f"--lengths: {name} is {found[name]:g}, not between 1 and 10 million: {_EXAMPLE}")
    if not (cv := found.get("cv", 0.0)) <= _MOST_VARIATION:
        raise ConfigError(f"--lengths: cv is {cv:g}, not between 0 and {_MOST_VARIATION:g}: {_EXAMPLE}")
    if not (share := found.get("cached", 0.0)) < 1:
        raise ConfigError(f"--lengths: cached is {share:g}, not a share from 0 to below 1: {_EXAMPLE}")
    rng = np.random.default_rng(seed)
    prompts, outputs = (_drawn(found[name], cv, rng) for name in ("prompt", "output"))
    cached = np.minimum(np.rint(share * prompts), prompts - 1).astype(np.int32)  # the last token is always computed
    return Workload(prompts, outputs, gamma_gaps(REQUESTS, burstiness**-0.5, rng), cached)


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise ConfigError(f"--lengths: {name} is {value!r}: {_EXAMPLE}") from error
    if not 0 <= number < math.inf:
        raise ConfigError(f"--lengths: {name} is {value}, not 0 or more: {_EXAMPLE}")
    return number


def _drawn(mean: float, cv: float, rng: np.random.Generator) -> Lengths:
    """# [REQUESTS]"""
    variance = math.log(1 + cv**2)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), REQUESTS)
    return np.clip(np.rint(drawn), 1, _MOST_TOKENS).astype(np.int32)
