"""The attention kernel against softmax written out in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.native.attention import NativeAttention
from engine.step import StepBatch
from engine.visibility import Visibility

Shape = list[tuple[int, int]]
"""Of each sequence, its rows in the step and its context."""
MIXED: Shape = [(1, 0), (1, 170), (40, 0), (130, 33), (5, 7), (2, 300)]


def make_batch(shape: Shape, block: int, parents: np.ndarray | None = None) -> StepBatch:
    needed = [-(-(rows + context) // block) for rows, context in shape]
    blocks = np.random.default_rng(0).permutation(sum(needed) + 3)
    tables = tuple(np.split(blocks, np.cumsum(needed))[: len(shape)])
    indices = [context + np.arange(rows) for rows, context in shape]
    slots = [table[i // block] * block + i % block for i, table in zip(indices, tables, strict=True)]
    total = sum(rows for rows, _ in shape)
    return StepBatch(
        token_ids=np.zeros(total, np.int64),
        positions=np.concatenate(indices),
        slots=np.concatenate(slots),
        query_starts=np.cumsum([0, *(rows for rows, _ in shape)]),
        context_lens=np.array([context for _, context in shape]),
        block_tables=tables,
        logit_rows=np.empty(0, np.int64),
        tree_parents=parents,
    )


class Case:
    """Random queries, keys and values, and a cache with NaN wherever no sequence has written."""

    def __init__(
        self,
        shape: Shape,
        heads: tuple[int, int, int],
        block: int,
        parents: np.ndarray | None = None,
        others: int = 0,
    ) -> None:
        """`others`: KV heads beside ours in a slot, of other ranks."""
        queries, keys, size = heads
        self.batch = batch = make_batch(shape, block, parents)
        total, generator = len(batch.slots), torch.Generator().manual_seed(1)
        blocks = sum(map(len, batch.block_tables)) + 3
        self.whole = torch.full((2, 2, blocks, block, keys + others, size), float("nan")).bfloat16()
        self.cache = self.whole[..., others:, :]
        qkv = torch.randn(total, (queries + 2 * keys) * size, generator=generator).bfloat16()
        self.query = qkv[:, : queries * size].view(total, queries, size)
        self.kv = qkv[:, queries * size :].view(total, 2, keys, size)
        self.block = block
        self.contents = []  # of each sequence [2, tokens, keys, size]
        slotted = self.cache[1].flatten(1, 2)
        for sequence, (rows, context) in enumerate(shape):
            i = np.arange(context + rows)
            slots = torch.from_numpy(batch.block_tables[sequence][i // block] * block + i % block)
            values = torch.randn(2, context, keys, size, generator=generator).bfloat16()
            slotted[:, slots[:context]] = values
            start = int(batch.query_starts[sequence])
            self.contents.append(torch.cat((values, self.kv[start : start + rows].transpose(0, 1)), 1))

    def expected(self, window: int | None, scale: float, softcap: float | None) -> Iterator[torch.Tensor]:
        sight = Visibility(self.batch, self.block, window)
        for sequence, content in enumerate(self.contents):
            start, end = self.batch.query_starts[sequence : sequence + 2]
            first = int(sight.first_blocks[sequence]) * self.block
            seen = torch.from_numpy(sight.of([sequence], content.shape[1] - first)[0])
            q = self.query[start:end].double().transpose(0, 1)
            k, v = content[:, first:].double().transpose(1, 2).repeat_interleave(q.shape[0] // content.shape[2], 1)
            scores = q @ k.transpose(1, 2) * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            yield (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def check(self, window: int | None = None, scale: float | None = None, softcap: float | None = None) -> None:
        got = NativeAttention(self.batch, self.cache)(1, self.query, self.kv, window, scale, softcap)
        factor = self.query.shape[2] ** -0.5 if scale is None else scale
        expected = torch.cat(list(self.expected(window, factor, softcap)))
        assert (got.double() - expected).abs().max() < 0.012 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 16), (8, 1, 128), (6, 2, 80), (3, 3, 6), (2, 1, 256)], ids=str)
@pytest.mark.parametrize("block", [8, 16, 64])
def test_rows_see_their_context_and_what_came_before_them(heads, block: int) -> None:
    Case(MIXED, heads, block).check()


@pytest.mark.parametrize("window", [1, 5, 21, 64, 1000])
def test_a_window_hides_what_is_further_back(window: int) -> None:
    Case(MIXED, (6, 2, 32), 16).check(window=window)


def test_scores_are_scaled_and_capped() -> None:
    Case(MIXED, (6, 2, 32), 16).check(scale=0.7, softcap=3.0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [[(1, 5000)], [(3, 9000), (1, 40)], [(300, 2000)]], ids=str)
def test_long_contexts_are_shared_out_over_threads(shape: Shape, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        Case(shape, (6, 2, 32), 16).check()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("window", [None, 4, 30])
def test_the_rows_of_a_tree_see_their_ancestors(window: int | None) -> None:
    shape = [(6, 50), (1, 20), (4, 0), (20, 33)]
    tree, chain = [-1, 0, 0, 1, 2, -1], list(range(-1, 19))
    chain[7] = 3
    parents = np.array([*tree, -1, -1, 0, 0, 2, *chain])
    case = Case(shape, (6, 2, 32), 16, parents)
    depths = np.array([0, 1, 1, 2, 2, 0])
    case.batch.positions[:6] = 50 + depths
    case.check(window=window)


def test_a_rank_uses_its_heads_of_a_shared_cache() -> None:
    case = Case(MIXED, (6, 2, 32), 16, others=4)
    case.check()
    assert case.whole[..., :4, :].isnan().all()


def test_keys_and_values_are_in_the_cache_before_others_are_told() -> None:
    case, told = Case([(3, 20)], (4, 2, 16), 16), []

    def on_written(layer: int) -> None:
        written = case.cache[1].flatten(1, 2)[:, torch.from_numpy(case.batch.slots)]
        told.append((layer, torch.equal(written, case.kv.transpose(0, 1))))

    NativeAttention(case.batch, case.cache, on_written, first_layer=4)(5, case.query, case.kv)
    assert told == [(5, True)]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("slots", lambda batch: batch.slots + 10_000),
        ("slots", lambda batch: -1 - batch.slots),
        ("slots", lambda batch: batch.slots[:-1]),
        ("block_tables", lambda batch: tuple(table + 10_000 for table in batch.block_tables)),
        ("block_tables", lambda batch: tuple(table[:0] for table in batch.block_tables)),
        ("block_tables", lambda batch: tuple(-1 - table for table in batch.block_tables)),
        ("query_starts", lambda batch: batch.query_starts + 1),
    ],
    ids=["slots beyond", "slots before", "slots too few", "blocks beyond", "blocks too few", "blocks before", "rows"],
)
def test_a_step_that_would_leave_the_cache_is_refused_before_anything_is_written(field, change) -> None:
    case = Case([(3, 20), (1, 5)], (6, 2, 32), 16)
    before = case.whole.clone()
    batch = replace(case.batch, **{field: change(case.batch)})
    with pytest.raises(RuntimeError):
        NativeAttention(batch, case.cache)(1, case.query, case.kv)
    assert torch.equal(case.whole.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize(("heads", "block"), [((4, 2, 5), 16), ((4, 2, 32), 24)], ids=["odd heads", "block of 24"])
def test_shapes_that_the_kernel_has_no_arithmetic_for_are_refused(heads, block: int) -> None:
    case = Case([(3, 20)], heads, block)
    with pytest.raises(RuntimeError):
        NativeAttention(case.batch, case.cache)(1, case.query, case.kv)


def test_other_types_are_refused() -> None:
    case = Case([(3, 20)], (4, 2, 16), 16)
    with pytest.raises(RuntimeError):
        NativeAttention(case.batch, case.cache)(1, case.query.half(), case.kv)
    with pytest.raises(RuntimeError):
        NativeAttention(case.batch, case.cache.float())(1, case.query, case.kv)
