from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest
import torch

from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from engine.parallel.split import Split

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_size=64, dtype="float32", block_size=16, fingerprint="a")
BLOCKS = 256


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.fixture
def pool() -> Iterator[KVPool]:
    made = KVPool(LAYOUT, BLOCKS)
    yield made
    made.close()


def test_no_step_waits_for_the_kernel_to_find_memory(pool) -> None:
    before = faults()
    pool.data.fill_(1.0)
    assert faults() - before < pool.data.nbytes / 4096 / 16


def test_nor_does_a_rank_that_shares_it(pool) -> None:
    split = Split(tp_rank=1, tp_size=2)
    share = KVPool(LAYOUT.of(split), BLOCKS, memory=os.dup(pool.fd))
    try:
        before = faults()
        share.data.fill_(1.0)
        assert faults() - before < share.data.nbytes / 4096 / 16
        assert torch.equal(pool.data[..., 0, :], torch.zeros_like(pool.data[..., 0, :]))
    finally:
        share.close()
