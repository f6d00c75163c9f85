"""Runs one step of any shape, again and again: sequences join a scheduler as if their KV had come from elsewhere."""

from __future__ import annotations

import random

import numpy as np

from bench.engine_speed.timing import timed_step
from core.types import Request, SamplingParams
from engine.block_manager import BlockManager
from engine.drafts import Draft
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence
from placement.grid import Shape

DECODES = 5
"""Steps of a run in which nothing but decodes is; with prompts it is one."""


class Stepper:
    """Each run has a scheduler and a prefix cache of its own."""

    def __init__(self, runner: ModelRunner | GroupRunner) -> None:
        self._runner = runner
        self._random = random.Random(0)

    @staticmethod
    def spare_tokens(shape: Shape) -> int:
        """Room of each sequence beyond the step itself, so that none ends in the run."""
        return DECODES + shape.rows + 1

    def seconds(self, shape: Shape) -> list[float]:
        """Of each step of a run."""
        scheduler, draft = self._ready(shape), _chain(shape.rows)
        steps = 1 if shape.prompts else DECODES
        return [timed_step(self._runner, scheduler, draft).seconds for _ in range(steps)]

    def _ready(self, shape: Shape) -> Scheduler:
        computed = [(past, tokens) for past, tokens in shape.prompts if past]
        computed += [(shape.context, 1)] * shape.sequences
        scheduler = self._scheduler(shape)
        left = {}
        for past, tokens in computed:
            scheduler.reserve(sequence := self._sequence(past, tokens + self.spare_tokens(shape)))
            left[sequence.request_id] = tokens
        for sequence in scheduler.schedule().granted if left else ():
            scheduler.join(sequence.request_id, self._tokens(left[sequence.request_id]))
        for past, tokens in shape.prompts:
            if not past:
                scheduler.add(self._sequence(tokens, self.spare_tokens(shape)))
        return scheduler

    def _scheduler(self, shape: Shape) -> Scheduler:
        config = SchedulerConfig(
            max_num_seqs=len(shape.prompts) + shape.sequences,
            max_num_batched_tokens=sum(tokens for _, tokens in shape.prompts) + shape.sequences * shape.rows,
            max_model_len=self._runner.config.max_position_embeddings,
        )
        return Scheduler(config, BlockManager(self._runner.pool.num_blocks, self._runner.layout.block_size))

    def _sequence(self, length: int, max_tokens: int) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens, seed=self._random.getrandbits(32))
        request = Request(
            request_id=f"{self._random.getrandbits(64):x}",
            prompt_token_ids=self._tokens(length),
            sampling=sampling,
            deadline=0.0,
        )
        return Sequence(request)

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self._runner.config.vocab_size), k=count)


def _chain(rows: int) -> Draft | None:
    nodes = np.arange(rows - 1)
    return Draft(np.zeros_like(nodes), nodes - 1, nodes + 1) if rows > 1 else None
