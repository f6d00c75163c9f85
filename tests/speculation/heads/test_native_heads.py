"""By our own kernels a head computes what it does by PyTorch's operators, to the last few bits of bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.linear import PlainLinear, dense_maker
from engine.native import library
from engine.runner import ModelRunner
from speculation.heads.checkpoint import Checkpoint, load
from speculation.heads.eagle import Eagle
from speculation.heads.layer_cache import LayerCache
from speculation.heads.medusa import Heads
from speculation.heads.new import target_of
from tests.speculation.heads.trained import made

LINES = [np.array([5, 2, 9, 0]), np.array([7, 3])]
"""Slots of two requests."""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if not library.load():
        pytest.skip("this machine can't have the native kernels")


def of(target: ModelRunner, folder: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    shared = target.vocabulary()
    checkpoint = load(folder, target_of(target.config, shared))  # type: ignore[arg-type]
    tensors = checkpoint.with_output(shared.output)
    return checkpoint, {name: tensor.bfloat16() for name, tensor in tensors.items()}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.float() - other.float()).abs().max() <= 0.03 * other.float().abs().max())


def test_eagle(target: ModelRunner, folders: dict[str, Path]) -> None:
    """Rows of two requests, then two nodes below the first that share its slots and not each other's."""
    checkpoint, tensors = of(target, folders["eagle3"])
    torch.manual_seed(0)
    taps, embedded = torch.randn(6, 3 * 48).bfloat16(), torch.randn(8, 48).bfloat16()
    found = []
    for native in (True, False):
        make = dense_maker(True) if native else PlainLinear
        eagle = Eagle(checkpoint.config, tensors, make, native=native)
        cache = LayerCache(16, 2, 8, embedded, native=native)
        positions = np.array([3, 4, 5, 6, 0, 1])
        attention = cache.attention(LINES, [4, 2], positions)
        made = eagle(embedded[:6], eagle.fuse(taps), torch.from_numpy(positions), attention)
        nodes = [np.append(LINES[0], slot) for slot in (11, 12)]
        attention = cache.attention(nodes, [1, 1], np.array([7, 7]))
        below = eagle(embedded[6:], made[[3, 3]], torch.tensor([7, 7]), attention)
        found.append((made, below, eagle.logits(below)))
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize("kind", ["hydra", "medusa"])
def test_heads(target: ModelRunner, folders: dict[str, Path], kind: str) -> None:
    checkpoint, tensors = of(target, folders[kind])
    torch.manual_seed(0)
    hidden, *told = torch.randn(3, 5, 48).bfloat16().unbind()
    said = []
    for make in (dense_maker(True), PlainLinear):
        heads = Heads(checkpoint.config, tensors, make, native=make is not PlainLinear)
        said.append(heads.logits(heads.hidden(1, heads.enter(hidden), told)))
    assert close(*said)


def test_a_head_that_is_sure_is_no_surer_than_that(target: ModelRunner, folders: dict[str, Path]) -> None:
    """The kernel's sum of exponentials may come out below the largest of them."""
    torch.manual_seed(0)
    logits = torch.randn(200, 80)
    logits[:, 3] = 20 + torch.rand(200)
    _, chances = made("hydra", target, folders["hydra"]).likeliest(logits)
    assert chances.max() <= 1
