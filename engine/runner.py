"""The model on one device: takes StepBatches, one after the other, and owns weights and KV cache."""

from __future__ import annotations

import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import torch

from core.errors import ConfigError, InternalError
from core.types import SamplingParams, TokenLogprobs
from engine.attention import PagedAttention
from engine.device import resolve_device, resolve_dtype
from engine.kv_cache import DTYPES, KVPool
from engine.kv_layout import KVLayout
from engine.model_config import ModelConfig
from engine.models.registry import Model, build
from engine.sampler import sample
from engine.step import KVSink, SamplingRow, StepBatch, StepOutput
from engine.weights import Weights, fingerprint

DEFAULT_KV_CACHE_BYTES = 2**30


class ModelRunner:
    """Implements engine.step.Runner. `pool`, `layout` and `config` say what it holds. `kv_sink` may be set between
    steps; it is called on the thread that runs the step."""

    def __init__(self, config: ModelConfig, model: Model, pool: KVPool) -> None:
        self.config = config
        self.pool = pool
        self.layout = pool.layout
        self.kv_sink: KVSink | None = None
        self._model: Model | None = model

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> ModelRunner:
        """Read the model in folder `path`. The cache gets `num_blocks` blocks, else as many as fit in `kv_cache_bytes`
        (default 1 GiB). `threads` bounds the cores that this process computes on.

        Raises ModelError for a model that can't be run, ConfigError for a machine or memory that can't run it.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        config = ModelConfig.from_folder(path)
        where = resolve_device(device)
        name = resolve_dtype(dtype, where)
        with torch.inference_mode(), Weights(path, device=where, dtype=DTYPES[name]) as weights:
            model = build(config, weights)
        layout = KVLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            dtype=name,
            block_size=block_size,
            fingerprint=fingerprint(path, config),
        )
        if num_blocks is None:
            num_blocks = _blocks_in(DEFAULT_KV_CACHE_BYTES if kv_cache_bytes is None else kv_cache_bytes, layout)
        return cls(config, model, KVPool(layout, num_blocks, where))

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        """Run the step on the caller's thread; the future is done on return. A step that failed is its exception."""
        future: Future[StepOutput] = Future()
        try:
            future.set_result(self._run(batch))
        except Exception as error:  # noqa: BLE001 - whatever a step raises belongs to whoever waits for it
            future.set_exception(error)
        return future

    def warm_up(self) -> None:
        """Run a prompt and a decode step, so that the first request doesn't wait for kernels to be made. Writes to
        block 0: only before the first sequence."""
        rows = np.arange(min(self.layout.block_size, self.config.max_position_embeddings), dtype=np.int64)
        block = np.zeros(1, np.int64)
        row = SamplingRow(SamplingParams(max_tokens=1, top_p=0.9, top_k=20), position=0)
        for count in {len(rows), 1}:
            batch = StepBatch(
                token_ids=np.zeros(count, np.int64),
                positions=rows[:count],
                slots=rows[:count],
                query_starts=np.array([0, count]),
                context_lens=block,
                block_tables=(block,),
                logit_rows=np.array([count - 1]),
                sampling=(row,),
            )
            self.submit(batch).result()

    def shutdown(self) -> None:
        """Let go of the weights; later steps fail. The pool is closed by whoever lends it out (KVPool.close)."""
        self._model = None

    # --- a step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, batch: StepBatch) -> StepOutput:
        start, model = time.perf_counter(), self._model
        if model is None:
            raise InternalError("the runner was shut down; no step can be submitted any more")
        if batch.kv_moves is not None:
            self._move(batch.kv_moves)
        sink = partial(self._publish, batch) if batch.publish and self.kv_sink is not None else None
        attention = PagedAttention(batch, self.pool.data, sink)
        hidden = model.embed(self._tensor(batch.token_ids))
        hidden, taps = model.run_layers(hidden, self._tensor(batch.positions), attention, batch.taps)
        tokens, logits = np.empty(0, np.int64), None
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        if len(batch.logit_rows):
            logits = model.logits(hidden[self._tensor(batch.logit_rows)]).float()
            tokens, logprobs = sample(logits, batch.sampling or (None,) * len(batch.logit_rows))
        return StepOutput(
            token_ids=tokens,
            logprobs=logprobs,
            logits=logits if batch.return_logits else None,
            taps=taps,
            seconds=time.perf_counter() - start,
        )

    def _publish(self, batch: StepBatch, layer: int) -> None:
        if self.kv_sink is not None:
            self.kv_sink(layer, batch)

    def _move(self, moves: np.ndarray) -> None:
        """Copy K and V of all layers between slots; indexing copies, so all are read before any is written."""
        slots = self.pool.data.flatten(2, 3)  # [layers, 2, slots, kv_heads, head_size]
        source, target = self._tensor(moves[:, 0]), self._tensor(moves[:, 1])
        slots.index_copy_(2, target, slots.index_select(2, source))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.pool.device)


def _blocks_in(nbytes: int, layout: KVLayout) -> int:
    blocks = nbytes // layout.block_bytes
    if blocks < 1:
        raise ConfigError(
            f"a KV cache of {nbytes} bytes holds no block of {layout.block_bytes} bytes; raise --kv-cache-memory"
        )
    return blocks
