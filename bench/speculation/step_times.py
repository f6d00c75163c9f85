"""T(k): how long a step takes that verifies drafts, by the rows that each request has in it, its last token included.
Up to some number they are nearly free, for the weights are read anyway.

A chain and a tree differ in what a row may see. Rows are random tokens after random KV, drawn greedily. Steps of all
sizes are interleaved, and medians reported.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bench.filled import fill
from bench.setting import setting_of
from core.errors import ConfigError
from core.types import SamplingParams
from engine.model_config import ModelConfig
from engine.runner import ModelRunner
from engine.step import SamplingRow, StepBatch
from speculation.laws import DraftLaw
from speculation.tree import DraftBatch

ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80)
FREE = 1.1
"""A step that takes this many times as long as one of a row per request is still nearly free."""
SHAPES = {"chain": 1, "tree": 3}
"""Children of each node."""
_BLOCK_SIZE = 16
_GREEDY = SamplingRow(SamplingParams(max_tokens=1, temperature=0.0), position=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    batches: tuple[int, ...]
    context: int
    """Tokens in the cache of each request."""
    runs: int
    threads: int | None
    dtype: str
    device: str

    def check(self, longest: int) -> None:
        """Raise ConfigError unless a model of `longest` positions can be measured so."""
        if self.context > longest - ROWS[-1]:
            raise ConfigError(
                f"--context: {self.context} is too long for a model of {longest} positions; give at most "
                f"{longest - ROWS[-1]}"
            )


def measure_steps(folder: Path, options: Options) -> dict[str, Any]:
    """The JSON result, but for the model's name: step_ms[batch][shape][rows], and free_rows[batch][shape], the most
    that take no more than FREE times as long as one. Raises ConfigError, ModelError."""
    options.check(ModelConfig.from_folder(folder).max_position_embeddings)
    blocks = -(-(options.context + ROWS[-1]) // _BLOCK_SIZE)  # of a request
    runner = ModelRunner.load(
        folder,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        block_size=_BLOCK_SIZE,
        num_blocks=max(options.batches) * blocks,
    )
    try:
        fill(runner.pool)
        runner.warm_up()
        step_ms = {batch: _step_ms(runner, batch, blocks, options) for batch in options.batches}
    finally:
        runner.shutdown()
        runner.pool.close()
    free = {batch: {shape: free_rows(times) for shape, times in by.items()} for batch, by in step_ms.items()}
    return {
        **setting_of(runner),
        "context": options.context,
        "runs": options.runs,
        "step_ms": step_ms,
        "free_rows": free,
    }


def _step_ms(runner: ModelRunner, batch: int, blocks: int, options: Options) -> dict[str, dict[int, float]]:
    """The first round warms up."""
    steps = {
        (shape, rows): verification(runner, draft_of(shape, rows), batch, blocks, options.context)
        for shape, rows in product(SHAPES, ROWS)
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for _ in range(1 + options.runs):
        for key, step in steps.items():
            times[key].append(_seconds(runner, step))
    return {shape: {rows: statistics.median(times[shape, rows][1:]) * 1e3 for rows in ROWS} for shape in SHAPES}


def _seconds(runner: ModelRunner, step: StepBatch) -> float:
    started = time.perf_counter()
    runner.submit(step).result()
    return time.perf_counter() - started


def draft_of(shape: str, rows: int) -> DraftBatch:
    """Of one request, with so many rows, the root's included."""
    nodes = np.arange(rows - 1)
    parents = nodes // SHAPES[shape] - 1
    return DraftBatch(np.zeros_like(nodes), parents, np.array([0, rows - 1]), DraftLaw.POINT_MASS, shape)


def verification(runner: ModelRunner, draft: DraftBatch, batch: int, blocks: int, context: int) -> StepBatch:
    """A step of `batch` requests, which have `blocks` of the cache and a draft like this each."""
    rows, size = draft.num_rows, runner.layout.block_size
    tables = np.arange(batch * blocks).reshape(batch, blocks)
    index = context + np.arange(rows)
    return StepBatch(
        token_ids=np.random.default_rng(0).integers(runner.config.vocab_size, size=batch * rows),
        positions=np.tile(np.append(context, context + draft.depths), batch),
        slots=(tables[:, index // size] * size + index % size).ravel(),
        query_starts=np.arange(batch + 1) * rows,
        context_lens=np.full(batch, context),
        block_tables=tuple(tables),
        logit_rows=np.arange(batch * rows),
        sampling=(_GREEDY,) * (batch * rows),
        tree_parents=None if draft.chains.all() else np.tile(draft.step_parents(), batch),
    )


def free_rows(times: dict[int, float]) -> int:
    """Up to the first that is not."""
    return max(takewhile(lambda rows: times[rows] <= FREE * times[1], times))
