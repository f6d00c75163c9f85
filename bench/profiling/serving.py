"""What is around the steps of a worker that serves: gateway, links, hand-off. Requests are put to real workers, alone
and eight at once, and what their tokens take longer than the fit says of their steps is what serving adds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.planning.load import Server, serving
from bench.serving.timeline import Timeline
from engine.checkpoints import Progress
from placement.latency import StepLatency
from placement.profile import Profile, Serving
from placement.workload import Workload

_PROMPT = 256
"""Tokens of the longer prompts; the shorter have a quarter."""
_OUTPUT = 33
_BATCH = 8
_LEAST_GAP_S = 0.1
_ALONE = 5
"""Requests of a length that come one at a time."""


def measure_serving(profile: Profile, folder: Path, engine: dict[str, Any], cores: int, progress: Progress) -> Serving:
    """`engine`: settings of the workers. Hand-offs are measured where there are `cores` for two workers. Raises
    ConfigError, Unavailable."""
    progress.begin("measuring what serving adds")
    model = profile.model
    longest = min(_PROMPT, model.max_tokens // 2)
    asked = _Asked(profile.latency, [longest // 4, longest])
    tree = {"model": model.name, "engine": engine}
    with serving(tree | {"cluster": {"colocated": True, "decode_replicas": 1}}, folder, profile.setting) as server:
        alone = asked.one_at_a_time(server)
        batch = asked.at_once(server)
    overhead, token = _line([(length, asked.later_ms(found)) for length, found in alone.items()])
    one = max(0.0, asked.gap_ms(alone[asked.lengths[0]]) - asked.decode_ms(1))
    each = max(0.0, (asked.gap_ms(batch) - asked.decode_ms(_BATCH) - one) / (_BATCH - 1))
    step_ms, gap_ms = 0.0, 0.0
    if 2 * profile.setting.devices <= cores:
        apart = {"prefill_replicas": 1, "decode_replicas": 1, "handoff_min_tokens": 0}
        with serving(tree | {"cluster": apart}, folder, profile.setting) as server:
            handed = asked.one_at_a_time(server)
        step_ms = statistics.mean(asked.later_ms(handed[n]) - asked.later_ms(alone[n]) for n in asked.lengths)
        firsts = [timeline.itl[0] for found in handed.values() for timeline in found]
        gap_ms = statistics.median(firsts) * 1e3 - asked.gap_ms(handed[asked.lengths[0]])
    return Serving(
        overhead_ms=overhead,
        prompt_token_ms=token,
        step_ms=max(0.0, one - each),
        sequence_ms=each,
        handoff_step_ms=max(0.0, step_ms),
        handoff_gap_ms=max(0.0, gap_ms),
    )


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope through two points; neither is below 0."""
    (x, y), (other_x, other_y) = points
    slope = max(0.0, (other_y - y) / (other_x - x))
    return max(0.0, (y + other_y) / 2 - slope * (x + other_x) / 2), slope


@dataclass(frozen=True)
class _Asked:
    """Requests with prompts of these `lengths`."""

    latency: StepLatency
    lengths: list[int]

    def one_at_a_time(self, server: Server) -> dict[int, list[Timeline]]:
        """By length, in turns."""
        lengths = self.lengths * _ALONE
        alone_ms = self.latency.prompt.at(max(lengths), max(lengths) ** 2) + _OUTPUT * self.decode_ms(1)
        found = self._timelines(server, lengths, max(_LEAST_GAP_S, 1.3e-3 * alone_ms))
        return {length: [t for n, t in zip(lengths, found, strict=True) if n == length] for length in self.lengths}

    def at_once(self, server: Server) -> list[Timeline]:
        return self._timelines(server, [self.lengths[0]] * _BATCH, 0.0)

    def _timelines(self, server: Server, lengths: list[int], gap: float) -> list[Timeline]:
        """The same again after a first time, at once, that warms up."""
        prompts, outputs = np.array(lengths, np.int32), np.full(len(lengths), _OUTPUT, np.int32)
        for gaps in (np.zeros(len(lengths)), np.full(len(lengths), gap)):
            found = server.timelines(Workload(prompts, outputs, gaps), 1.0)
        return found

    def later_ms(self, timelines: list[Timeline]) -> float:
        """By how much their first tokens came later than the step of the prompt takes, by the median."""
        tokens = timelines[0].prompt_tokens or 0
        return statistics.median(t.ttft for t in timelines) * 1e3 - self.latency.prompt.at(tokens, tokens**2)

    def decode_ms(self, sequences: int) -> float:
        context = sequences * (self.lengths[0] + _OUTPUT * 3 // 4)
        return self.latency.step_ms(0, 0.0, context, sequences, sequences)

    def gap_ms(self, timelines: list[Timeline]) -> float:
        """Median of the later gaps between tokens: all of the requests decode by then."""
        return statistics.median(gap for timeline in timelines for gap in timeline.itl[-_OUTPUT // 2 :]) * 1e3
