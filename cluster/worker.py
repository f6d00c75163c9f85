"""Builds a worker process from the configuration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cluster.config.engine import EngineSection
from cluster.config.tree import SlipstreamConfig
from cluster.limits import max_model_len
from cluster.node import WorkerNode
from core.types import Role
from engine.block_manager import BlockManager
from engine.gpu_memory import GpuShare
from engine.lora.checkpoint import read_adapters
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from engine.structured.grammars import Grammars
from speculation.make import make_observer, make_speculator
from speculation.settings import Settings


def load_runner(
    folder: Path, engine: EngineSection, threads: int, speculation: Settings | None = None
) -> ModelRunner | GroupRunner:
    """The model with its KV cache, on this process's device or those of a group of processes, ready for its first
    request. Each process computes on `threads` cores. A GPU's cache leaves room for drafters."""
    # On a thread that ends: OpenMP keeps a team of threads for each that has computed, and once all teams together have
    # more threads than there are cores, none of them waits for work without going to sleep.
    with ThreadPoolExecutor(1, "load") as loading:
        return loading.submit(_load, folder, engine, threads, speculation).result()


def _load(folder: Path, engine: EngineSection, threads: int, speculation: Settings | None) -> ModelRunner | GroupRunner:
    tp_size, pp_size = engine.tensor_parallel_size, engine.pipeline_parallel_size
    load = ModelRunner.load if engine.ranks == 1 else partial(GroupRunner.load, tp_size=tp_size, pp_size=pp_size)
    runner = load(
        folder,
        dtype=engine.dtype,
        device=engine.device,
        block_size=engine.block_size,
        kv_cache_bytes=None if engine.kv_cache_memory is None else engine.kv_cache_bytes,
        gpu=_gpu_share(engine, 0 if speculation is None else speculation.device_bytes),
        enforce_eager=engine.enforce_eager,
        threads=threads,
        quantization=engine.quantization,
        adapters=read_adapters(engine.adapters, folder, engine.max_lora_rank),
    )
    runner.warm_up(0 if speculation is None else speculation.max_budget)
    return runner


def _gpu_share(engine: EngineSection, kept_bytes: int) -> GpuShare:
    """With the steps of a prefill worker, which are the larger ones: any worker can become one."""
    return GpuShare(
        utilization=engine.gpu_memory_utilization,
        max_num_batched_tokens=engine.batched_tokens(Role.PREFILL),
        max_num_seqs=engine.sequences,
        kept_bytes=kept_bytes,
    )


def make_node(
    worker_id: str, role: Role, runner: ModelRunner | GroupRunner, config: SlipstreamConfig, folder: Path
) -> WorkerNode:
    """`folder` is the model's: its tokenizer is read when a request comes with a grammar."""
    engine = config.engine
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=engine.sequences,
            max_num_batched_tokens=engine.batched_tokens(role),
            max_model_len=max_model_len(runner.config, engine, cache_tokens=runner.pool.num_blocks * engine.block_size),
            adapters=frozenset(engine.adapters),
            max_steps_in_flight=runner.max_steps_in_flight,
        ),
        BlockManager(runner.pool.num_blocks, engine.block_size, enable_prefix_caching=engine.prefix_caching),
    )
    grammars = Grammars(folder, runner.config.vocab_size)
    cluster, settings = config.cluster, config.speculation.settings
    most = config.gateway.max_concurrent_requests
    return WorkerNode(
        worker_id,
        role,
        runner,
        scheduler,
        cluster.lease_s,
        grammars,
        cluster.kv_transport,
        cluster.kv_codec,
        None if settings is None else partial(make_speculator, settings, runner, most),
        None if settings is None else partial(make_observer, settings, runner, most),
    )
