"""How large the cache of a GPU becomes, told by a device that is made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from engine.gpu_memory import GpuShare, Meter, largest_step
from engine.model_config import ModelConfig
from engine.plan import Plan, make_plan
from engine.runner import ModelRunner
from tests.engine.driver import TINY

GIB = 2**30


@dataclass
class MadeUpGpu:
    """80 GiB, of which others use `others`; `outside` is what this process holds beside the allocator."""

    others: int = 0
    allocator: int = 0
    most: int = 0
    outside: int = 0

    def free_and_total(self) -> tuple[int, int]:
        return 80 * GIB - self.others - self.allocator - self.outside, 80 * GIB

    def reserved(self) -> int:
        return self.allocator

    def peak(self) -> int:
        return self.most

    def forget_peak(self) -> None:
        self.most = 0


@given(
    others=st.integers(0, 8 * GIB),
    weights=st.integers(GIB, 40 * GIB),
    step=st.integers(0, 8 * GIB),
    outside=st.integers(0, 2 * GIB),
    utilization=st.floats(0.75, 0.9),
)
def test_the_cache_gets_what_weights_the_step_and_the_runtime_leave_of_the_share(
    others: int, weights: int, step: int, outside: int, utilization: float
) -> None:
    gpu = MadeUpGpu(others=others)
    meter = Meter(gpu, GpuShare(utilization=utilization))
    gpu.allocator, gpu.outside, gpu.most = weights, outside, weights + step
    left = meter.left()
    assert left == int(80 * GIB * utilization) - weights - step - outside
    assert left + weights + step + outside + others <= 80 * GIB


def test_nine_tenths_are_taken_when_nothing_is_said() -> None:
    assert Meter(MadeUpGpu(), GpuShare()).left() == int(80 * GIB * 0.9)


def test_what_drafters_will_take_is_left_out() -> None:
    whole = Meter(MadeUpGpu(), GpuShare()).left()
    assert Meter(MadeUpGpu(), GpuShare(kept_bytes=3 * GIB)).left() == whole - 3 * GIB


def test_a_share_that_drafters_use_up_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"weights, drafters and the largest step take 41.0 GiB; .* --speculation-memory"
    ):
        Meter(MadeUpGpu(), GpuShare(utilization=0.5, kept_bytes=41 * GIB)).left()


def test_a_share_that_others_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"asks for 72.0 GiB of the GPU's 80.0 GiB and 70.0 GiB are free"):
        Meter(MadeUpGpu(others=10 * GIB), GpuShare())


def test_a_share_without_room_for_a_cache_is_refused() -> None:
    gpu = MadeUpGpu()
    meter = Meter(gpu, GpuShare(utilization=0.5))
    gpu.most = 41 * GIB
    with pytest.raises(ConfigError, match=r"allows 40.0 GiB, but weights and the largest step take 41.0 GiB; raise it"):
        meter.left()


@pytest.mark.parametrize("tokens", [1, 40, 511, 512, 513, 1500])
def test_the_largest_step_is_one_that_a_runner_with_one_block_can_run(
    make_checkpoint: Callable[..., Path], tokens: int
) -> None:
    runner = ModelRunner.load(make_checkpoint(), dtype="float32", device="cpu", num_blocks=1)
    share = GpuShare(max_num_batched_tokens=tokens, max_num_seqs=8)
    step = largest_step(share, TINY["max_position_embeddings"], runner.layout.block_size)
    output = runner.submit(step).result()
    assert len(step.token_ids) == tokens
    assert len(output.token_ids) == min(8, tokens)
    assert (np.diff(step.query_starts) <= TINY["max_position_embeddings"]).all()


def test_a_resized_cache_is_empty_and_serves(make_checkpoint: Callable[..., Path]) -> None:
    runner = ModelRunner.load(make_checkpoint(), dtype="float32", device="cpu", num_blocks=1)
    runner.resize(7)
    runner.warm_up()
    assert runner.pool.num_blocks == runner.pool.data.shape[2] == 7


def plan(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, **options: object) -> Plan:
    import torch

    monkeypatch.setattr("engine.plan.resolve_device", lambda _: torch.device(device))
    return make_plan(folder, ModelConfig.from_folder(folder), dtype="float32", **options)  # type: ignore[arg-type]


def test_a_size_that_is_given_wins_and_only_a_gpu_is_measured(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, share = make_checkpoint(), GpuShare(utilization=0.5)
    assert plan(folder, monkeypatch, "cuda", gpu=share).gpu == share
    given = plan(folder, monkeypatch, "cuda", gpu=share, kv_cache_bytes=2**20)
    assert (given.gpu, given.num_blocks) == (None, 2**20 // given.layout.block_bytes)
    assert plan(folder, monkeypatch, "cpu", gpu=GpuShare()).gpu is None
    with pytest.raises(ConfigError, match="--gpu-memory-utilization has no meaning on the CPU"):
        plan(folder, monkeypatch, "cpu", gpu=share)


def test_what_graphs_keep_is_known_before_the_cache_is_sized() -> None:
    gpu = MadeUpGpu(allocator=3 * GIB)
    meter = Meter(gpu, GpuShare(utilization=0.5))

    def capture() -> None:
        gpu.allocator += GIB
        gpu.outside += GIB // 2

    assert meter.cost(capture) == GIB + GIB // 2
    assert meter.cost(lambda: None) == 0
