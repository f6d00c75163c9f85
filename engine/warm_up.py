"""Steps before the first request: so that it waits for no kernel to be made, and what a few rows take is known."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Protocol

import numpy as np

from core.types import SamplingParams
from engine.step import Runner, SamplingRow, StepBatch

if TYPE_CHECKING:
    from engine.kv_cache import Pool
    from engine.kv_layout import KVLayout
    from engine.model_config import ModelConfig

ROWS = (2, 3, 5, 9, 13, 17, 25, 33, 49, 65)
CONTEXTS = (0, 512)
ROUNDS = 2
ENOUGH_S = 4.0
"""After this no other round is begun."""
_DRAWN = SamplingRow(SamplingParams(max_tokens=1, top_p=0.9, top_k=20), position=0)
_GREEDY = SamplingRow(SamplingParams(max_tokens=1, temperature=0.0), position=0)


class Loaded(Runner, Protocol):
    """A runner that says what it holds."""

    config: ModelConfig
    layout: KVLayout

    @property
    def pool(self) -> Pool: ...


def warm_up(runner: Loaded) -> None:
    """A prompt that fills a block, all but one of its tokens after that one, and a decode step."""
    num_tokens = min(runner.layout.block_size, runner.config.max_position_embeddings)
    for count, context in {(num_tokens, 0), (num_tokens - 1, 1), (1, 0)}:
        if count:
            runner.submit(_step(count, context, 1, np.zeros(1, np.int64), num_tokens, _DRAWN)).result()


@dataclass(frozen=True, slots=True)
class RowTime:
    """A step of one request: so many rows, all verified, after so many tokens of context."""

    rows: int
    context: int
    seconds: float


def time_rows(runner: Loaded, most: int) -> list[RowTime]:
    """Steps of up to `most` rows, with a context where the cache has room for it, in turns with such of a single row.
    After a round that is not told of."""
    block_size = runner.layout.block_size
    room = min(runner.pool.num_blocks * block_size, runner.config.max_position_embeddings)
    most = min(most, room)
    sizes = [rows for rows in (*(rows for rows in ROWS if rows < most), most) if rows > 1]
    contexts = [context for context in CONTEXTS if context + most <= room]
    timed: list[RowTime] = []
    started = time.monotonic()
    for round_ in range(1 + ROUNDS):
        if round_ > 1 and time.monotonic() - started > ENOUGH_S:
            break
        for context, size, rows in ((c, s, r) for c, s in product(contexts, sizes) for r in (1, s)):
            blocks = np.arange(-(-(context + size) // block_size))
            step = _step(rows, context, rows, blocks, context + size, _GREEDY)
            seconds = runner.submit(step).result().seconds
            if round_:
                timed.append(RowTime(rows, context, seconds))
    return timed


def _step(count: int, context: int, sampled: int, blocks: np.ndarray, length: int, sampling: SamplingRow) -> StepBatch:
    """So many rows after a context, of a sequence of `length` tokens in `blocks`; the last `sampled` are sampled."""
    rows = np.arange(length, dtype=np.int64)[context : context + count]
    return StepBatch(
        token_ids=np.zeros(count, np.int64),
        positions=rows,
        slots=rows,
        query_starts=np.array([0, count]),
        context_lens=np.array([context]),
        block_tables=(blocks,),
        logit_rows=np.arange(count - sampled, count),
        sampling=(sampling,) * sampled,
    )
