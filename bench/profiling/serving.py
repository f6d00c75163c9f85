"""What is around the steps of a worker that serves: gateway, links, hand-off. Requests are put to real workers, alone
and eight at once, and what their tokens take longer than the fit says of their steps is what serving adds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.planning.load import Server, serving
from bench.profiling.together import Together
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
_ALONE = 8
"""Requests of a length that come one at a time."""


def measure_serving(
    profile: Profile, folder: Path, engine: dict[str, Any], cores: int, rounds: int, progress: Progress
) -> Serving:
    """`engine`: settings of the workers. Hand-offs are measured where there are `cores` for two workers, and in so many
    `rounds` how workers slow each other down, if steps were measured beside others. Raises ConfigError, Unavailable."""
    progress.begin("measuring what serving adds")
    model, others = profile.model, profile.setting.beside
    longest = min(_PROMPT, model.max_tokens // 2)
    asked = _Asked(profile.latency, [longest // 4, longest])

    def served(**cluster: Any) -> AbstractContextManager[Server]:
        return serving({"model": model.name, "engine": engine, "cluster": cluster}, folder, profile.setting)

    with served(colocated=True, decode_replicas=1) as server:
        alone = asked.one_at_a_time(server)
        batch = asked.at_once(server)
    step_ms, gap_ms, contention = 0.0, 0.0, None
    if 2 * profile.setting.devices <= cores:
        with served(prefill_replicas=1, decode_replicas=1, handoff_min_tokens=0) as server:
            step_ms, gap_ms = asked.handed_over_ms(server)
    together = asked.together(alone, model.max_tokens)
    if others and together.lasts:
        with served(colocated=True, decode_replicas=1 + others) as server:
            server.warm_up(1 + others, _at_once([(longest, _OUTPUT)]))
            contention = together.contention(server, others, rounds, progress)
            again = asked.one_at_a_time(server)  # a while later, as the machine is not as fast at all times
        alone = {length: found + again[length] for length, found in alone.items()}
    overhead, token = asked.overhead(alone)
    one = max(0.0, asked.gap_ms(alone[asked.lengths[0]]) - asked.decode_ms(1))
    each = max(0.0, (asked.gap_ms(batch) - asked.decode_ms(_BATCH) - one) / (_BATCH - 1))
    return Serving(
        overhead_ms=overhead,
        prompt_token_ms=token,
        step_ms=max(0.0, one - each),
        sequence_ms=each,
        handoff_step_ms=step_ms,
        handoff_gap_ms=gap_ms,
        contention=contention,
    )


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope through two points; neither is below 0."""
    (x, y), (other_x, other_y) = points
    slope = max(0.0, (other_y - y) / (other_x - x))
    return max(0.0, (y + other_y) / 2 - slope * (x + other_x) / 2), slope


def _at_once(asked: list[tuple[int, int]]) -> Workload:
    """Tokens of prompts and of answers."""
    prompts, outputs = np.array(asked, np.int32).T
    return Workload(prompts, outputs, np.zeros(len(asked)))


@dataclass(frozen=True)
class _Asked:
    """Requests with prompts of these `lengths`."""

    latency: StepLatency
    lengths: list[int]

    def one_at_a_time(self, server: Server, outputs: Sequence[int] = (_OUTPUT,)) -> dict[int, list[Timeline]]:
        """By length, in turns, and of a length answers of all these `outputs` in turns."""
        asked = [(length, output) for _ in range(_ALONE) for length in self.lengths for output in outputs]
        longest = max(self.lengths)
        alone_ms = self.latency.prompt.at(longest, longest**2) + max(outputs) * self.decode_ms(1)
        found = self._timelines(server, asked, max(_LEAST_GAP_S, 1.3e-3 * alone_ms))
        return {length: [t for (n, _), t in zip(asked, found, strict=True) if n == length] for length in self.lengths}

    def at_once(self, server: Server) -> list[Timeline]:
        return self._timelines(server, [(self.lengths[0], _OUTPUT)] * _BATCH, 0.0)

    def _timelines(self, server: Server, asked: list[tuple[int, int]], gap: float) -> list[Timeline]:
        """The same again after a first time, at once, that warms up."""
        requests = _at_once(asked)
        for gaps in (requests.gaps, np.full(len(asked), gap)):
            found = server.timelines(requests.with_gaps(gaps), 1.0)
        return found

    def overhead(self, alone: dict[int, list[Timeline]]) -> tuple[float, float]:
        """What first tokens take longer than steps of prompts: at all, and for each token of the prompt; ms."""
        return _line([(length, self.later_ms(found)) for length, found in alone.items()])

    def handed_over_ms(self, server: Server) -> tuple[float, float]:
        """What hand-offs add to the steps of prompts, and to the gap after the first token. Answers of a token end
        where the prompt is computed: they are what there is without."""
        found = self.one_at_a_time(server, (1, _OUTPUT))
        kept, handed = (
            {n: [t for t in found[n] if (len(t.chunks) > 1) is over] for n in found} for over in (False, True)
        )
        step_ms = statistics.mean(self.later_ms(handed[n]) - self.later_ms(kept[n]) for n in self.lengths)
        firsts = [timeline.itl[0] for some in handed.values() for timeline in some]
        gap_ms = statistics.median(firsts) * 1e3 - self.gap_ms(handed[self.lengths[0]])
        return max(0.0, step_ms), max(0.0, gap_ms)

    def together(self, alone: dict[int, list[Timeline]], max_tokens: int) -> Together:
        """With the longer prompts, by what they and the tokens of their answers took `alone`."""
        longest, (overhead_ms, _) = self.lengths[-1], self.overhead(alone)
        return Together(
            prompt_tokens=longest,
            prompt_ms=statistics.median(t.ttft for t in alone[longest]) * 1e3 - overhead_ms,
            decode_ms=self.gap_ms(alone[longest]),
            overhead_ms=overhead_ms,
            max_tokens=max_tokens,
        )

    def later_ms(self, timelines: list[Timeline]) -> float:
        """By how much their first tokens came later than the step of the prompt takes, by the median."""
        tokens = timelines[0].prompt_tokens or 0
        return statistics.median(t.ttft for t in timelines) * 1e3 - self.latency.prompt.at(tokens, tokens**2)

    def decode_ms(self, sequences: int) -> float:
        context = sequences * (self.lengths[0] + _OUTPUT * 3 // 4)
        return self.latency.step_ms(0, 0.0, context, sequences, sequences)

    def gap_ms(self, timelines: list[Timeline]) -> float:
        """Of the later gaps between tokens, as all of the requests decode by then, the mean, which is what the time per
        token is made of: some steps take longer than most. Of the requests the median."""
        return statistics.median(statistics.fmean(timeline.itl[-_OUTPUT // 2 :]) for timeline in timelines) * 1e3
