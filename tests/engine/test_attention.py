"""Paged attention against attention written out, in the types and shapes that a runner of tiny models doesn't reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention import FOLD_ROWS, SLACK_BLOCKS, PagedAttention, _buckets
from engine.step import StepBatch

BLOCK = 8


def attend_plainly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(head_size)) V in float64; query [rows, heads, head_size], sees [rows, keys]."""
    group = query.shape[1] // keys.shape[1]
    q, k, v = (t.double().transpose(0, 1) for t in (query, keys, values))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * query.shape[2] ** -0.5
    return (scores.masked_fill(~sees, float("-inf")).softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize(
    "shape",
    [
        [(1, 0)],
        [(1, 7), (1, 8), (1, 100)],
        [(FOLD_ROWS, 3), (FOLD_ROWS, 70), (FOLD_ROWS + 1, 20), (1, 5), (40, 0)],
        [(1, 900), (1, 3), (2, 4), (1, 500), (1, 0), (2, 700)],
    ],
    ids=str,
)
def test_rows_see_their_context_and_what_came_before_them(
    shape: list[tuple[int, int]], heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    size, rng, total = 16, np.random.default_rng(0), sum(rows for rows, _ in shape)
    needed = [-(-(rows + context) // BLOCK) for rows, context in shape]
    blocks = rng.permutation(sum(needed) + 3)
    tables = tuple(np.split(blocks, np.cumsum(needed))[: len(shape)])
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 2, len(blocks), BLOCK, kv_heads, size, generator=generator).to(dtype)
    qkv = torch.randn(total, heads + 2 * kv_heads, size, generator=generator).to(dtype)
    slots = [t[(i := c + np.arange(r)) // BLOCK] * BLOCK + i % BLOCK for (r, c), t in zip(shape, tables, strict=True)]
    batch = StepBatch(
        token_ids=np.zeros(total, np.int64),
        positions=np.zeros(total, np.int64),
        slots=np.concatenate(slots),
        query_starts=np.cumsum([0, *(rows for rows, _ in shape)]),
        context_lens=np.array([context for _, context in shape]),
        block_tables=tables,
        logit_rows=np.empty(0, np.int64),
    )
    untouched = cache[0].clone()

    got = PagedAttention(batch, cache)(1, qkv[:, :heads], qkv[:, heads:].view(total, 2, kv_heads, size))

    for (rows, context), table, start in zip(shape, tables, batch.query_starts, strict=False):
        own = slice(int(start), int(start) + rows)
        keys, values = cache[1][:, table].flatten(1, 2)[:, : context + rows]
        assert torch.equal(keys[context:], qkv[own, heads : heads + kv_heads])
        assert torch.equal(values[context:], qkv[own, heads + kv_heads :])
        sees = torch.ones(rows, context + rows, dtype=torch.bool).tril(context)
        want = attend_plainly(qkv[own, :heads], keys, values, sees)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(got[own].double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(cache[0], untouched)


def test_sequences_of_similar_length_attend_together() -> None:
    blocks = np.array([10, 1, 2 * 1 + SLACK_BLOCKS, 7])
    assert list(_buckets([0, 1, 2, 3], blocks)) == [[0, 1, 2, 3]]


def test_a_long_sequence_does_not_make_short_ones_pay() -> None:
    blocks = np.array([5, 1000, 6, 990, 300])
    assert list(_buckets([0, 1, 2, 3, 4], blocks)) == [[1, 3], [4], [0, 2]]
