"""The model on one device: takes StepBatches, one after the other, and owns weights and KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from core.errors import InternalError
from core.types import TokenLogprobs
from engine.attention import PagedAttention
from engine.cuda.attention import KernelAttention, make_parts, make_static
from engine.cuda.choice import graph_sizes, why_eager
from engine.cuda.graphs import CudaRecorder, DecodeGraphs
from engine.cuda.paged import Settled, settle
from engine.cuda.transfer import to_device, wait_for
from engine.gpu_memory import CudaGpu, GpuShare, Meter, largest_step, let_go
from engine.kv_cache import DTYPES, KVPool
from engine.linears import Linears
from engine.lora.adapters import Adapters
from engine.model_config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.registry import Model, build
from engine.native import few_rows, library
from engine.native.attention import NativeAttention
from engine.parallel.group import ALONE, Group
from engine.plan import Choices, Plan, blocks_in, make_plan
from engine.quantization.make import linear_maker
from engine.sampler import sample
from engine.scoring import score
from engine.step import KVSink, StepBatch, StepOutput
from engine.vocabulary import Vocabulary, read_vocabulary
from engine.warm_up import RowTime, time_rows, warm_up
from engine.weights import Weights


class ModelRunner:
    """Implements engine.step.Runner. `pool`, `layout` and `config` say what it holds. `kv_sink` may be set between
    steps; it is called on the thread that runs the step."""

    max_steps_in_flight = 1

    def __init__(
        self,
        config: ModelConfig,
        model: Model,
        pool: KVPool,
        adapters: Adapters | None = None,
        group: Group = ALONE,
        native: bool = False,
        *,
        cuda: Settled | None = None,
    ) -> None:
        """`config` is the whole model's; as a rank of a `group`, `model` and `pool` are its share. `native`: attention
        is by our own kernel for the CPU; `cuda`: what it is by on a GPU, and which steps are captured when the runner
        is warmed up."""
        self.config = config
        self.pool = pool
        self.layout = pool.layout
        self.kv_sink: KVSink | None = None
        self.folder: Path | None = None
        """Where the weights are from."""
        self.native = native
        self.row_times: list[RowTime] = []
        """Of steps that verify, timed when it was warmed up."""
        self._model: Model | None = model
        self._adapters = adapters
        self._group = group
        self._first_layer = group.split.layers(config.num_layers).start
        # The kernel takes pairs of dimensions. Our own layers have no odd heads; a class of Transformers may.
        self._attend: Callable[..., NativeAttention | PagedAttention]
        self._attend = NativeAttention if native and config.head_size % 2 == 0 else PagedAttention
        self._cuda = cuda or Settled()
        if (make := make_parts(self._cuda.kernel, pool.device)) is not None:
            self._attend = partial(KernelAttention, make=make)
        self._graphs: DecodeGraphs | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        **choices: Unpack[Choices],
    ) -> ModelRunner:
        """Read the model in folder `path`. `threads` bounds the cores that this process computes on.

        Raises ModelError for a model that can't be run, ConfigError for a machine or memory that can't run it.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        config = ModelConfig.from_folder(path)
        plan = make_plan(path, config, **choices)
        return cls.build(plan, config)

    @classmethod
    def build(
        cls, plan: Plan, config: ModelConfig, *, group: Group = ALONE, device: str = "", memory: int | None = None
    ) -> ModelRunner:
        """Read what a rank of `group` computes, and no more, onto `device` (default: the plan's). `memory` is what the
        ranks share of the cache (KVPool)."""
        where, dtype = torch.device(device or plan.device), plan.layout.dtype
        meter = Meter(CudaGpu(where), plan.gpu) if plan.gpu is not None else None
        with torch.inference_mode(), Weights(plan.folder, device=where, dtype=DTYPES[dtype]) as weights:
            lora = Adapters(plan.adapters, device=where, dtype=DTYPES[dtype])
            native = _native(plan, where, dtype)
            make = linear_maker(plan.quantization, where, dtype, native)
            linears = Linears(weights, group, config.num_kv_heads, make=make, native=native, adapters=lora)
            model = build(group.split.view(config), weights, linears)
            lora.check_all_taken(group.split.layers(config.num_layers))
        pool = KVPool(plan.layout.of(group.split), plan.num_blocks, where, memory=memory)
        cuda = settle(
            "auto",
            config,
            group.split,
            DTYPES[dtype],
            where,
            graph_rows=plan.graph_rows,
            enforce_eager=plan.enforce_eager,
        )
        runner = cls(config, model, pool, lora, group, native, cuda=cuda)
        runner.folder = plan.folder
        if meter is not None and plan.gpu is not None:
            runner._fill(meter, plan.gpu)
        return runner

    def _fill(self, meter: Meter, share: GpuShare) -> None:
        """Find out what the largest step and the graphs take, and give the cache what they leave."""
        self.submit(largest_step(share, self.config.max_position_embeddings, self.layout.block_size)).result()
        let_go()
        left = meter.left()
        left -= meter.cost(self._capture)
        self._graphs = None
        let_go()
        self.resize(blocks_in(left, self.pool.data.nbytes // self.pool.num_blocks))

    @torch.inference_mode()
    def _capture(self) -> None:
        """Decode steps, over the cache as it is."""
        if self._cuda.graph_rows and self._model is not None:
            make, write = make_static(self._cuda.kernel)
            self._graphs = DecodeGraphs(
                self._model,
                self.pool.data,
                graph_sizes(self._cuda.graph_rows),
                max_tokens=self.config.max_position_embeddings,
                vocab_size=self.config.vocab_size,
                make=make,
                write=write,
                record=CudaRecorder(self.pool.device),
            )

    def resize(self, num_blocks: int) -> None:
        """Before the first sequence: another cache in place of this one, which has memory of its own."""
        self._graphs = None  # they read and write where the old one was
        device = self.pool.device
        self.pool.close()
        del self.pool
        self.pool = KVPool(self.layout, num_blocks, device)

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        """Run the step on the caller's thread; the future is done on return. A step that failed is its exception."""
        future: Future[StepOutput] = Future()
        try:
            future.set_result(self._run(batch))
        except Exception as error:  # noqa: BLE001 - whatever a step raises belongs to whoever waits for it
            future.set_exception(error)
        return future

    def warm_up(self, draft_tokens: int = 0) -> None:
        """Run a prompt and a decode step, so that the first request doesn't wait for kernels to be made, capture decode
        steps, and time steps that verify up to so many draft tokens. Writes to the first blocks: only before the first
        sequence."""
        warm_up(self)
        self._capture()
        if draft_tokens:
            self.row_times = time_rows(self, 1 + draft_tokens)

    def vocabulary(self) -> Vocabulary:
        """What others may share of the model. Raises ModelError for one that has no such parts as ours have."""
        if self.folder is None:
            raise InternalError("the runner was made without the model's folder")
        embedding = self._model.embedding if isinstance(self._model, Decoder) else None
        return read_vocabulary(self.folder, self.config, self.pool.device, DTYPES[self.layout.dtype], embedding)

    def check_health(self) -> None:
        """A step that failed is the engine's to tell; there is nothing else that could."""

    def shutdown(self) -> None:
        """Let go of the weights; later steps fail. The pool is closed by whoever lends it out (KVPool.close)."""
        self._model = self._graphs = None

    # --- a step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, batch: StepBatch) -> StepOutput:
        start, model = time.perf_counter(), self._model
        if model is None:
            raise InternalError("the runner was shut down; no step can be submitted any more")
        if batch.kv_moves is not None:
            self._move(batch.kv_moves)
        if self._adapters is not None:
            self._adapters.set_rows(batch)
        sink = partial(self._publish, batch) if batch.publish and self.kv_sink is not None else None
        graphs = self._graphs
        if graphs is not None and why_eager(batch, graphs.largest, publishes=sink is not None) is None:
            output = self._replay(graphs, batch)
            return replace(output, seconds=time.perf_counter() - start)
        attention = self._attend(batch, self.pool.data, sink, self._first_layer)
        hidden = self._enter(model, batch)
        hidden, taps = model.run_layers(hidden, self._tensor(batch.positions), attention, batch.taps)
        if self._group.split.last:
            output = self._answer(model, batch, hidden)
        else:
            self._group.send(hidden)
            output = StepOutput(np.empty(0, np.int64))
        wait_for(self.pool.device)  # not every step has drawn something, and waited for that
        return replace(output, taps=taps, seconds=time.perf_counter() - start)

    @staticmethod
    def _replay(graphs: DecodeGraphs, batch: StepBatch) -> StepOutput:
        logits, (tokens, logprobs) = graphs.run(batch)
        return StepOutput(tokens, logprobs, logits=logits.clone() if batch.wants_logits else None)

    def _enter(self, model: Model, batch: StepBatch) -> torch.Tensor:
        """What goes into the first of our layers: [tokens, hidden]."""
        if self._group.split.first:
            return model.embed(self._tensor(batch.token_ids))
        shape, dtype = (len(batch.token_ids), self.config.hidden_size), DTYPES[self.layout.dtype]
        return self._group.receive(torch.empty(shape, dtype=dtype, device=self.pool.device))

    def _answer(self, model: Model, batch: StepBatch, hidden: torch.Tensor) -> StepOutput:
        """Of the ranks of the last stage all compute logits, and the first draws from them."""
        scored = [score(hidden, rows, model.logits, self.config.vocab_size) for rows in batch.scored]
        tokens, logits = np.empty(0, np.int64), None
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        if len(batch.logit_rows):
            logits = model.logits(hidden[self._tensor(batch.logit_rows)]).float()
            if self._group.split.tp_rank == 0:
                tokens, logprobs = sample(logits, batch.sampling or (None,) * len(batch.logit_rows))
        return StepOutput(
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(scored),
            logits=logits if batch.wants_logits else None,
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
        return to_device(values, self.pool.device)


def _native(plan: Plan, device: torch.device, dtype: str) -> bool:
    """Whether layers run by our own kernels; these, and the one for linear layers in float32, are compiled on the way
    where that has not been done."""
    if device.type != "cpu" or plan.enforce_eager:
        return False
    if dtype == "float32":
        few_rows.load()
    return dtype == "bfloat16" and library.load()
