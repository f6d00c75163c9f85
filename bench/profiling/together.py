"""How workers that serve slow each other down: requests are put to several of them through one gateway, whose work, and
that of whoever reads the answers, takes its part of the cores that the workers compute on.

Prompts that end with their first token, and long answers, are alone and beside others, by turns, as a machine is not as
fast at all times. Rounds are short and many. What they take beside others is compared with what they took alone in the
same round, and every other round goes backwards: so a machine that becomes slower bit by bit makes as many comparisons
worse as better. Of these the median counts: a machine may go from one speed to another for some seconds and back,
whether others compute or not. Their quartiles say how sure that is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bench.serving.timeline import Timeline
from core.wire import STATUS_PERIOD_S
from engine.checkpoints import Progress
from placement.latency import Contention
from placement.workload import Workload

_SHORT = 16
"""Tokens of a prompt whose answer is long."""
_TURNS = 2
"""In which prompts come, one after the other."""
_LEAST_TURN_S = 1.4 * STATUS_PERIOD_S
"""After it the router knows again who has nothing to do."""
_SLACK = 2.0
"""Prompts and answers may take so many times as long as alone."""


class Asked(Protocol):
    """A server of workers alike, each of which does both."""

    def timelines(self, workload: Workload, rate: float) -> list[Timeline]: ...


_SPARE = 1.2
"""Answers are so many times as long, as machines get faster, too."""

Load = tuple[int, int]
"""Answers at once, and prompts at once in each turn beside them."""


class Found(NamedTuple):
    """What the median round says, and the lower and the upper quartile of what rounds say."""

    contention: Contention
    quartiles: tuple[Contention, Contention]


@dataclass(frozen=True, kw_only=True)
class Together:
    """Prompts have `prompt_tokens`, and take `prompt_ms` alone; a token of an answer takes `decode_ms`. Requests have
    `max_tokens` at the most. Of the time until a first token `overhead_ms` are none of the worker's."""

    prompt_tokens: int
    prompt_ms: float
    decode_ms: float
    overhead_ms: float
    max_tokens: int

    @property
    def turn_s(self) -> float:
        return max(_LEAST_TURN_S, _SLACK * (self.overhead_ms + self.prompt_ms) / 1e3)

    @property
    def answer_tokens(self) -> int:
        """So many that answers go on while prompts come, if they may be so long."""
        return min(self.max_tokens - _SHORT, round((1 + _TURNS) * self.turn_s * 1e3 / self.decode_ms * _SPARE))

    @property
    def lasts(self) -> bool:
        """Whether an answer goes on in as many turns as tell anything."""
        return self.answer_tokens * self.decode_ms / 1e3 >= (1 + _TURNS / 2) * self.turn_s

    def contention(self, server: Asked, others: int, rounds: int, progress: Progress) -> Found | None:
        """What one of `others` adds, which compute beside a worker; None if answers are too short to tell. Raises
        Unavailable if a request fails."""
        if not self.lasts:
            return None
        progress.begin("measuring workers beside each other", rounds)
        # each beside others next to its like alone
        loads = [*dict.fromkeys([(0, 1), (0, 1 + others), (others, 1), (1, others), (1 + others, 0), (1, 0)])]
        ratios: list[list[float]] = [[] for _ in range(4)]
        for done in range(rounds):
            prompt_ms, token_ms = self._round(server, loads if done % 2 == 0 else loads[::-1])
            pairs = [
                (prompt_ms, (0, 1 + others), (0, 1)),
                (prompt_ms, (others, 1), (0, 1)),
                (token_ms, (1, others), (1, 0)),
                (token_ms, (1 + others, 0), (1, 0)),
            ]
            for known, (took, beside, alone) in zip(ratios, pairs, strict=True):
                known += [1.0 + (two / one - 1.0) / others for two in took[beside] for one in took[alone]]
            progress.update(done + 1)
        if not all(ratios):
            return None
        low, middle, high = (_contention(*(float(np.quantile(one, at)) for one in ratios)) for at in (0.25, 0.5, 0.75))
        return Found(middle, (low, high))

    def _round(self, server: Asked, loads: Sequence[Load]) -> tuple[dict[Load, list[float]], dict[Load, list[float]]]:
        """What prompts took under each load, and tokens: a figure each, or none."""
        prompt_ms: dict[Load, list[float]] = {}
        token_ms: dict[Load, list[float]] = {}
        for load in loads:
            answers, turns = self._asked(server, *load)
            prompt_ms[load] = self.prompts_ms(turns)
            token_ms[load] = self.tokens_ms(answers, turns if load[1] else None)
        return prompt_ms, token_ms

    def _asked(self, server: Asked, answers: int, prompts: int) -> tuple[list[Timeline], list[list[Timeline]]]:
        """The answers, and the prompts of each turn that was over before an answer was."""
        turns = np.repeat((np.arange(_TURNS) + bool(answers)) * self.turn_s, prompts)
        at_s = np.concatenate([np.zeros(answers), turns])
        shapes = [(_SHORT, self.answer_tokens)] * answers + [(self.prompt_tokens, 1)] * len(turns)
        tokens, outputs = np.array(shapes, np.int32).T
        found = server.timelines(Workload(tokens, outputs, np.diff(at_s, prepend=0.0)), 1.0)
        ended = min((t.end for t in found[:answers]), default=math.inf)
        beside = [found[n : n + prompts] for n in range(answers, len(found), max(1, prompts))]
        return found[:answers], [turn for turn in beside if max(t.end for t in turn) <= ended]

    def prompts_ms(self, turns: list[list[Timeline]]) -> list[float]:
        """The median of what prompts took; none of none."""
        took = [t.ttft * 1e3 - self.overhead_ms for turn in turns for t in turn]
        return [statistics.median(took)] if took else []

    def tokens_ms(self, answers: list[Timeline], turns: list[list[Timeline]] | None) -> list[float]:
        """The mean of what a token took while all prompts of a turn were computed, or, None, while all answers went on;
        none if no two tokens came in such a time."""
        spans = []
        if turns is not None:
            overhead_s = self.overhead_ms / 1e3
            spans = [(max(t.start for t in turn) + overhead_s, min(t.chunks[0] for t in turn)) for turn in turns]
        elif answers:
            spans = [(max(t.chunks[0] for t in answers), min(t.end for t in answers))]
        gaps = [gap for answer in answers for span in spans for gap in answer.gaps_within(*span)]
        return [statistics.fmean(gaps) * 1e3] if gaps else []


def _contention(*factors: float) -> Contention:
    """Nobody is faster beside others."""
    prompts, decodes, beside_prompts, beside_decodes = (max(1.0, factor) for factor in factors)
    return Contention(prompt=(prompts, decodes), decode=(beside_prompts, beside_decodes))
