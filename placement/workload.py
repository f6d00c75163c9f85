"""What is asked of a layout: requests in the order in which they come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError

Lengths = NDArray[np.int32]
Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests and the gaps before them. The gaps have no unit: divided by a rate they are seconds, so that every rate
    and every layout meets the same requests in the same rhythm (common random numbers). Raises ConfigError if empty,
    or if a length or a gap can't be."""

    prompt_tokens: Lengths  # [requests]
    output_tokens: Lengths  # [requests]
    gaps: Times  # [requests], about 1 on average
    cached_tokens: Lengths = field(default_factory=lambda: np.empty(0, np.int32))
    """[requests]: leading tokens of each prompt that a prefix cache has; none if left out."""

    def __post_init__(self) -> None:
        if len(self.cached_tokens) == 0:
            object.__setattr__(self, "cached_tokens", np.zeros(len(self), np.int32))
        for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("gaps", 0.0), ("cached_tokens", 0)):
            self._check(name, least)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def arrivals_ms(self, rate: float) -> Times:
        """When each request comes at `rate` requests per second. Raises ConfigError if they would not come within any
        time. # [requests]"""
        if not (rate > 0 and float(self.gaps.sum()) / rate * 1000.0 < math.inf):
            raise ConfigError(
                f"at {rate:g} requests/s the last of {len(self)} never comes: give a rate above 0, as 0.5", param="rate"
            )
        return np.cumsum(self.gaps / rate * 1000.0)

    def with_gaps(self, gaps: Times) -> Workload:
        """The same requests in another rhythm."""
        return replace(self, gaps=gaps)

    def of_length(self, requests: int) -> Workload:
        """The first `requests` requests, over and over if there are fewer."""
        return self.chosen(np.arange(requests) % len(self))

    def parts(self, count: int) -> list[Workload]:
        """The same requests in so many runs, as long as each other within a request. Raises ConfigError if there are
        fewer requests."""
        return [self.chosen(rows) for rows in np.array_split(np.arange(len(self)), count)]

    def scaled(self, prompt: float, output: float) -> Workload:
        """With lengths so many times as long, though none longer than the longest here."""
        columns = {
            "prompt_tokens": (self.prompt_tokens, prompt, 1),
            "output_tokens": (self.output_tokens, output, 1),
            "cached_tokens": (self.cached_tokens, prompt, 0),
        }
        changed = {
            name: np.clip(np.rint(tokens * times), least, max(least, tokens.max())).astype(np.int32)
            for name, (tokens, times, least) in columns.items()
        }
        return replace(self, **changed)

    def no_longer_than(self, tokens: int) -> Workload:
        """Without the requests of more tokens, prompt and output together. The others come when they came, at as much
        of the rate as they are of all requests. Raises ConfigError if none is left."""
        lengths = self.prompt_tokens.astype(np.int64) + self.output_tokens
        kept = np.flatnonzero(lengths <= tokens)
        gaps = np.diff(np.cumsum(self.gaps)[kept], prepend=0.0)
        return self.chosen(kept).with_gaps(gaps * (len(kept) / len(self)))

    def resampled(self, requests: int, rng: np.random.Generator, *, block: int = 50) -> Workload:
        """`requests` requests drawn from these in runs of `block`, so that lengths and gaps keep what they have to do
        with their neighbours; the mean gap stays what it is here."""
        starts = rng.integers(len(self), size=-(-requests // block))
        chosen = ((starts[:, None] + np.arange(block)) % len(self)).ravel()[:requests]
        drawn = self.chosen(chosen)
        mean = drawn.gaps.mean()
        return drawn.with_gaps(drawn.gaps * (self.gaps.mean() / mean)) if mean > 0 else drawn

    def chosen(self, rows: NDArray[np.int64]) -> Workload:
        """Those at these places."""
        columns = self.prompt_tokens[rows], self.output_tokens[rows]
        return Workload(*columns, self.gaps[rows], self.cached_tokens[rows])

    def _check(self, name: str, least: float) -> None:
        values = getattr(self, name)
        if len(self) == 0:
            raise ConfigError("the workload is empty: at least one request is needed", param=name)
        if len(values) != len(self):
            raise ConfigError(f"the workload has {len(self)} prompts but {len(values)} {name}", param=name)
        wrong = np.flatnonzero(~((values >= least) & np.isfinite(values)))
        if len(wrong):
            raise ConfigError(f"request {wrong[0]}: {name} is {values[wrong[0]]}, not {least} or more", param=name)
