"""After a tree is verified the KV of its path lies where a plain decode would have left it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafts import moves_of
from engine.runner import ModelRunner
from tests.engine.driver import BLOCK_SIZE, Driver, Stream, close, tokens


@st.composite
def trees(draw: st.DrawFn, most: int = 12) -> tuple[list[int], list[int]]:
    """Parents of the nodes, -1 the root, and a path from below the root down."""
    parents = [draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(1, most)))]
    node, path = draw(st.integers(-1, len(parents) - 1)), list[int]()
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return parents, path


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> Driver:
    runner = ModelRunner.load(make_checkpoint(), dtype="float32", device="cpu", num_blocks=100, block_size=BLOCK_SIZE)
    return Driver(runner)


@given(trees(), st.randoms(use_true_random=False))
def test_the_path_is_moved_to_the_front_and_nothing_else_is_touched(
    tree: tuple[list[int], list[int]], chance: Random
) -> None:
    parents, path = tree
    rows = 1 + len(parents)
    slots = np.array(chance.sample(range(2 * rows), rows), np.int64)  # the blocks of a sequence lie anywhere
    pool = np.arange(2 * rows)  # what each slot holds
    moves = moves_of(slots, path)
    if moves is None:
        assert path == list(range(len(path)))
        return
    after = pool.copy()
    after[moves[:, 1]] = pool[moves[:, 0]]
    kept = slots[[0, *(1 + node for node in path)]]
    assert after[slots[: len(kept)]].tolist() == kept.tolist()
    assert len(set(moves[:, 1].tolist())) == len(moves), "two are written to one slot"
    assert (moves[:, 0] != moves[:, 1]).all(), "it was there already"
    beside = np.setdiff1d(pool, slots[1 : len(kept)])
    assert (after[beside] == pool[beside]).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tree=trees(), prefix=st.integers(1, 13), seed=st.integers(0, 99))
def test_what_follows_is_what_follows_a_plain_decode(
    model: Driver, tree: tuple[list[int], list[int]], prefix: int, seed: int
) -> None:
    (parents, path), driver = tree, Driver(model.runner)
    nodes, following = tokens(len(parents), seed=seed), tokens(3, seed=seed + 1)
    before, root = tokens(prefix, seed=seed + 2), tokens(1, seed=seed + 3)
    verified, plain = driver.new(40), driver.new(40)
    driver.run([(verified, before), (plain, before)])

    slots = verified.slots(1 + len(nodes))
    shape = [-1, *(1 + parent for parent in parents)]  # the root of the draft is a row of the step
    driver.run([(verified, root + nodes)], parents=[shape])
    verified.context = prefix + 1 + len(path)
    driver.run([(plain, root + [nodes[node] for node in path])])

    moves = moves_of(slots, path)
    [got] = driver.logits([(verified, following)], kv_moves=moves)
    [want] = driver.logits([(plain, following)])
    assert close(got, want)
    pool = driver.runner.pool.data.flatten(2, 3)  # [layers, 2, slots, …]
    held, wanted = (pool[:, :, all_slots(stream)] for stream in (verified, plain))
    assert close(held, wanted)


def all_slots(stream: Stream) -> np.ndarray:
    return Stream(stream.blocks).slots(stream.context)
