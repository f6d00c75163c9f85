"""Builds a worker process from the configuration."""

from __future__ import annotations

from pathlib import Path

from cluster.config import EngineSection, SlipstreamConfig, parse_bytes
from cluster.limits import max_model_len
from cluster.node import WorkerNode
from core.types import Role
from engine.block_manager import BlockManager
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig


def load_runner(folder: Path, engine: EngineSection, threads: int) -> ModelRunner:
    """The model with its KV cache, on this process's device, ready for its first request."""
    runner = ModelRunner.load(
        folder,
        dtype=engine.dtype,
        device=engine.device,
        block_size=engine.block_size,
        kv_cache_bytes=parse_bytes(engine.kv_cache_memory),
        threads=threads,
    )
    runner.warm_up()
    return runner


def make_node(worker_id: str, role: Role, runner: ModelRunner, config: SlipstreamConfig) -> WorkerNode:
    engine = config.engine
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=engine.sequences,
            max_num_batched_tokens=engine.batched_tokens(role),
            max_model_len=max_model_len(runner.config, engine, runner.layout.dtype),
        ),
        BlockManager(runner.pool.num_blocks, engine.block_size, enable_prefix_caching=engine.prefix_caching),
    )
    return WorkerNode(worker_id, role, runner, scheduler, lease_s=config.cluster.lease_s)
