"""What is around the steps of a worker that serves: gateway, links, hand-off. Requests are put to real workers, alone
and eight at once, and what their tokens take longer than the workers say of their steps is what serving adds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bench.planning.load import Computed, Server, serving
from bench.profiling.together import Together
from bench.serving.timeline import Timeline
from engine.checkpoints import Progress
from placement.latency import StepLatency
from placement.profile import Profile, Serving
from placement.workload import Workload

_PROMPT = 256
"""Tokens of the longer prompts; the shorter have a quarter."""
_OUTPUT = 33
_HANDED = 9
"""Tokens of answers to prompts that are handed over."""
_BATCH = 8
_LEAST_GAP_S = 0.1
_ALONE = 8
"""Requests of a length that come one at a time."""
_SHORT = 16
"""Tokens of the prompt of an answer that others come beside."""
_SPARE = 1.3
"""So many times as long it goes on, as machines get faster, too."""
_PAIRS = 16
"""Of a length, where prompts are handed over and where they are not."""


def measure_serving(
    profile: Profile, folder: Path, engine: dict[str, Any], cores: int, rounds: int, progress: Progress
) -> Serving:
    """`engine`: settings of the workers. Hand-offs are measured where there are `cores` for two workers, and in so many
    `rounds` how workers slow each other down, if steps were measured beside others. Raises ConfigError, Unavailable."""
    apart = 2 * profile.setting.devices <= cores
    progress.begin("measuring what serving adds", 1 + apart)
    model, others = profile.model, profile.setting.beside
    longest = min(_PROMPT, model.max_tokens // 2)
    asked = _Asked(profile.latency, [longest // 4, longest])

    def served(**cluster: Any) -> AbstractContextManager[Server]:
        return serving({"model": model.name, "engine": engine, "cluster": cluster}, folder, profile.setting)

    with served(colocated=True, decode_replicas=1) as server:
        around = asked.around(server)
    progress.update(1)
    handed, beside = None, None
    if apart:
        with served(prefill_replicas=1, decode_replicas=1, handoff_min_tokens=0) as server:
            handed = asked.handed_over(server, model.max_tokens)
        progress.update(2)
    together = asked.together(around, model.max_tokens)
    if others and together.lasts:
        with served(colocated=True, decode_replicas=1 + others) as server:
            server.warm_up(1 + others, _at_once([(longest, _OUTPUT)]))
            beside = together.contention(server, others, rounds, progress)
    return Serving(
        overhead_ms=around.overhead_ms,
        prompt_token_ms=around.prompt_token_ms,
        step_ms=around.step_ms,
        sequence_ms=around.sequence_ms,
        handoff_step_ms=handed.step_ms if handed else 0.0,
        handoff_gap_ms=handed.gap_ms if handed else 0.0,
        handoff_decode=handed.decode if handed else None,
        contention=beside.contention if beside else None,
        contention_quartiles=beside.quartiles if beside else None,
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


class Asked(Protocol):
    """A server whose workers tell how long they have computed."""

    def timelines(self, workload: Workload, rate: float) -> list[Timeline]: ...

    def computed(self) -> Computed: ...


@dataclass(frozen=True)
class _Around:
    """As in Serving, and what first tokens of the longest prompts took, and further ones."""

    overhead_ms: float
    prompt_token_ms: float
    step_ms: float
    sequence_ms: float
    ttft_ms: float
    gap_ms: float


class HandedOver(NamedTuple):
    """As in Serving: what hand-offs add to the steps of prompts, and to the gap after the first token, and how many
    times as long decodes take where KV comes; None if no answer went on meanwhile."""

    step_ms: float
    gap_ms: float
    decode: float | None


@dataclass(frozen=True)
class _Asked:
    """Requests with prompts of these `lengths`, the shorter first."""

    latency: StepLatency
    lengths: list[int]

    def around(self, server: Asked) -> _Around:
        """By what the worker says that its steps took meanwhile: a machine that has become slower since these were
        measured, as one that is shared does, makes them longer, and not what is around them."""
        firsts = [self._watched(server, [(length, 1)] * _ALONE) for length in self.lengths]
        outside = [statistics.fmean(t.ttft for t in found) * 1e3 - spent.ms / _ALONE for found, spent in firsts]
        overhead_ms, token_ms = _line([*zip(self.lengths, outside, strict=True)])
        alone, spent = self._watched(server, [(self.lengths[0], _OUTPUT)] * _ALONE)
        later = sum(t.latency for t in alone) * 1e3 - spent.ms - _ALONE * outside[0]
        one = max(0.0, later / (_ALONE * (_OUTPUT - 1)))
        batch, spent = self._watched(server, [(self.lengths[0], _OUTPUT)] * _BATCH, at_once=True)
        took_ms = (max(t.end for t in batch) - min(t.start for t in batch)) * 1e3
        each = max(0.0, ((took_ms - spent.ms - outside[0]) / spent.steps - one) / (_BATCH - 1))
        return _Around(
            overhead_ms=overhead_ms,
            prompt_token_ms=token_ms,
            step_ms=max(0.0, one - each),
            sequence_ms=each,
            ttft_ms=statistics.median(t.ttft for t in firsts[-1][0]) * 1e3,
            gap_ms=_gap_ms(alone),
        )

    def _watched(
        self, server: Asked, asked: list[tuple[int, int]], *, at_once: bool = False
    ) -> tuple[list[Timeline], Computed]:
        """And what the worker computed meanwhile."""
        server.timelines(_at_once(asked), 1.0)  # a first step of a kind takes longer
        before = server.computed()
        found = server.timelines(
            _at_once(asked).with_gaps(np.full(len(asked), 0.0 if at_once else self._gap_s(asked))), 1.0
        )
        return found, server.computed().since(before)

    def _gap_s(self, asked: list[tuple[int, int]]) -> float:
        """That one has ended when the next comes."""
        prompt, output = max(prompt for prompt, _ in asked), max(output for _, output in asked)
        decode_ms = self.latency.step_ms(0, 0.0, prompt + output, 1, 1)
        return max(_LEAST_GAP_S, 1.3e-3 * (self.latency.prompt_ms(prompt, prompt**2) + output * decode_ms))

    def handed_over(self, server: Asked, most_tokens: int) -> HandedOver:
        """Answers of a token end where the prompt is computed: they are what there is without hand-offs, and come right
        before those or right after, as a machine is not as fast at all times. Meanwhile another answer is computed, for
        as long as one of `most_tokens` goes on: where KV leaves and where it comes somebody computes then, and who
        seals and copies it is in the way. Its own tokens tell what decodes take meanwhile. The gap is that of prompts
        alone: beside others a step has to end first, which is none of a hand-off."""
        turns = [(1, _HANDED), (_HANDED, 1)] * (_PAIRS // 2)
        asked = [(length, output) for turn in turns for length in self.lengths for output in turn]
        gap_s = self._gap_s(asked)
        lasts = round(_SPARE * len(asked) * gap_s * 1e3 / self.latency.step_ms(0, 0.0, self.lengths[0], 1, 1))
        asked.insert(0, (_SHORT, min(lasts, most_tokens - _SHORT)))
        server.timelines(_at_once(asked[1 : 1 + 2 * len(self.lengths)]), 1.0)  # each kind once: it takes longer then
        beside, *found = server.timelines(_at_once(asked).with_gaps(np.full(len(asked), gap_s)), 1.0)
        pairs = [sorted(pair, key=lambda t: len(t.chunks)) for pair in zip(found[::2], found[1::2], strict=True)]
        pairs = [pair for pair in pairs if max(t.end for t in pair) <= beside.end] or pairs
        step_ms = statistics.median(two.ttft - one.ttft for one, two in pairs) * 1e3
        few = _at_once([(self.lengths[0], _HANDED)] * _ALONE)
        alone = server.timelines(few.with_gaps(np.full(_ALONE, gap_s)), 1.0)
        gap_ms = statistics.median(t.itl[0] for t in alone) * 1e3 - _gap_ms(alone)
        return HandedOver(max(0.0, step_ms), max(0.0, gap_ms), _slower(beside, found))

    def together(self, around: _Around, max_tokens: int) -> Together:
        """With the longer prompts."""
        return Together(
            prompt_tokens=self.lengths[-1],
            prompt_ms=around.ttft_ms - around.overhead_ms,
            decode_ms=around.gap_ms,
            overhead_ms=around.overhead_ms,
            max_tokens=max_tokens,
        )


def _gap_ms(timelines: Sequence[Timeline]) -> float:
    """Of the later half of the gaps between tokens the mean, which is what the time per token is made of: some steps
    take longer than most. Of the requests the median."""
    return statistics.median(statistics.fmean(t.itl[len(t.itl) // 2 :]) for t in timelines) * 1e3


def _slower(answer: Timeline, prompts: Sequence[Timeline]) -> float | None:
    """How many times as long tokens of an answer take while prompts are computed that are handed over to where it is,
    as right before each of them, when nothing else was asked: of these the median. Never below 1; None if there are
    none."""
    ends = [answer.chunks[0], *(t.end for t in prompts)]
    ratios = []
    for end, prompt in zip(ends, prompts, strict=False):
        if len(prompt.chunks) > 1:
            idle = answer.gaps_within(end, prompt.start)
            beside = answer.gaps_within(prompt.start, prompt.chunks[0])
            if idle and beside:
                ratios.append(statistics.fmean(beside) / statistics.fmean(idle))
    return max(1.0, statistics.median(ratios)) if ratios else None
