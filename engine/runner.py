"""One model on one device: steps in, tokens out."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from engine.attention import AttentionPlan
from engine.device import serving_device, serving_dtype
from engine.kv_cache import DTYPES, KVLayout, KVPool
from engine.model_config import ModelConfig
from engine.models.registry import CausalModel, load_model
from engine.sampler import logprobs, sample
from engine.step import KVSink, SamplingRow, StepBatch, StepOutput
from engine.weights import fingerprint


class ModelRunner:
    """Implements engine.step.Runner. Owns the weights and the KV pool. Steps run in the caller's thread: the returned
    future is done."""

    def __init__(self, config: ModelConfig, model: CausalModel, pool: KVPool) -> None:
        self.config = config
        self.pool = pool
        self.kv_sink: KVSink | None = None
        self._model = model
        self._cache = [(keys, values) for keys, values in pool.data]

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        block_size: int = 16,
        kv_cache_bytes: int = 2**30,
        threads: int | None = None,
    ) -> ModelRunner:
        """Load a Hugging Face folder and allocate as many blocks as fit into `kv_cache_bytes`. Raises ModelError or
        ConfigError. `threads` is the process's count for torch on a CPU; None leaves it."""
        if threads is not None:
            torch.set_num_threads(threads)
        config = ModelConfig.from_folder(folder)
        on = serving_device(device)
        name = serving_dtype(dtype, on)
        layout = KVLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            dtype=name,
            block_size=block_size,
            fingerprint=fingerprint(folder),
        )
        num_blocks = kv_cache_bytes // layout.block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"--kv-cache-memory of {kv_cache_bytes} bytes does not hold one block of {layout.block_bytes}; raise it"
            )
        model = load_model(config, folder, DTYPES[name], on)
        return cls(config, model, KVPool(layout, num_blocks, on))

    @property
    def layout(self) -> KVLayout:
        return self.pool.layout

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        future: Future[StepOutput] = Future()
        try:
            future.set_result(self._run(batch))
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:  # what torch and numpy raise
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        """Nothing runs between steps; memory goes with the object."""

    @torch.inference_mode()
    def _run(self, batch: StepBatch) -> StepOutput:
        started = time.perf_counter()
        device = self.pool.device
        if batch.kv_moves is not None:
            self._move(torch.from_numpy(batch.kv_moves).to(device))
        taps: dict[int, Tensor] = dict.fromkeys(batch.taps, torch.empty(0))
        plan = AttentionPlan(batch, self.layout.block_size, self.layout.head_size, device)
        hidden = self._model.forward(
            torch.from_numpy(batch.token_ids).to(device),
            torch.from_numpy(batch.positions).to(device),
            plan,
            self._cache,
            taps,
            (lambda layer: self._publish(layer, batch)) if batch.publish else None,
        )
        rows: tuple[SamplingRow | None, ...] = batch.sampling or (None,) * len(batch.logit_rows)
        if not len(batch.logit_rows):
            return StepOutput(np.empty(0, dtype=np.int64), taps=taps, seconds=time.perf_counter() - started)
        logits = self._model.logits(hidden[torch.from_numpy(batch.logit_rows).to(device)])
        tokens = sample(logits, rows)
        return StepOutput(
            token_ids=tokens,
            logprobs=logprobs(logits, rows, tokens),
            logits=logits if batch.return_logits else None,
            taps=taps,
            seconds=time.perf_counter() - started,
        )

    def _move(self, moves: Tensor) -> None:
        """Copy the KV of slots [moves, 2]; all are read before any is written."""
        slots = self.pool.data.flatten(2, 3)  # [layers, 2, slots, kv_heads, head_size]
        slots[:, :, moves[:, 1]] = slots[:, :, moves[:, 0]]

    def _publish(self, layer: int, batch: StepBatch) -> None:
        if self.kv_sink is not None:
            self.kv_sink(layer, batch)
