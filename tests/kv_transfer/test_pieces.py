"""Slots, runs, pieces: the laws that make two caches with unlike blocks the same."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import layout, pool_of_noise, tokens

from engine.kv_cache import KVPool
from kv_transfer.pieces import (
    Extent,
    Run,
    checksum,
    copy,
    cut,
    layers_of,
    piece_bytes,
    rows_of,
    runs,
    seal,
    slots_of,
    tokens_of,
)

BLOCK_SIZES = st.sampled_from([8, 16, 32])


@st.composite
def tables(draw: st.DrawFn, block_size: int, num_tokens: int) -> list[int]:
    """A block table of a sequence in a pool of 64 blocks."""
    return draw(st.permutations(range(64)))[: -(-num_tokens // block_size)]


def test_slots_follow_the_block_table() -> None:
    assert slots_of([7, 2], block_size=4, start=2, stop=6).tolist() == [30, 31, 8, 9]


def test_runs_are_as_long_as_both_sides_allow() -> None:
    assert runs(np.array([4, 5, 6, 7, 20]), np.array([0, 1, 8, 9, 10])) == [Run(4, 0, 2), Run(6, 8, 2), Run(20, 10, 1)]
    assert runs(np.arange(100), np.arange(50, 150)) == [Run(0, 50, 100)]
    assert runs(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == []


@given(start=st.integers(0, 90), length=st.integers(0, 90), max_bytes=st.integers(1, 20_000))
def test_a_cut_covers_every_token_of_every_layer_once(start: int, length: int, max_bytes: int) -> None:
    of = layout(num_layers=5)
    covered = np.zeros((5, start + length), dtype=int)
    for piece in cut(of, start, start + length, max_bytes):
        covered[piece.layer : piece.layer + piece.num_layers, piece.token : piece.token + piece.num_tokens] += 1
        smallest = piece_bytes(of, Extent(0, 1, 0, 1))
        assert piece_bytes(of, piece) <= max(max_bytes, smallest)
    assert (covered[:, start:] == 1).all()
    assert (covered[:, :start] == 0).all()


@settings(max_examples=40)
@given(data=st.data(), ours=BLOCK_SIZES, theirs=BLOCK_SIZES, num_tokens=st.integers(1, 200))
def test_a_copy_between_any_two_block_sizes_is_exact_and_touches_nothing_else(
    data: st.DataObject, ours: int, theirs: int, num_tokens: int
) -> None:
    start = data.draw(st.integers(0, num_tokens // ours)) * ours
    giver, taker = pool_of_noise(layout(theirs), seed=1), pool_of_noise(layout(ours), seed=2)
    source_table, target_table = data.draw(tables(theirs, num_tokens)), data.draw(tables(ours, num_tokens))
    source = slots_of(source_table, theirs, start, num_tokens)
    target = slots_of(target_table, ours, start, num_tokens)
    before = rows_of(taker).copy()
    pieces = seal(rows_of(giver), source, list(cut(giver.layout, start, num_tokens, max_bytes=4096)))
    for piece in pieces:
        pairs = runs(tokens_of(source, piece, start), tokens_of(target, piece, start))
        copy(layers_of(rows_of(taker), piece), layers_of(rows_of(giver), piece), pairs)
    np.testing.assert_array_equal(
        tokens(taker, target_table, start, num_tokens), tokens(giver, source_table, start, num_tokens)
    )
    others = np.setdiff1d(np.arange(before.shape[2]), target)
    np.testing.assert_array_equal(rows_of(taker)[:, :, others], before[:, :, others])
    extents = [Extent(piece.token, piece.num_tokens, piece.layer, piece.num_layers) for piece in pieces]
    assert seal(rows_of(taker), target, extents) == pieces, "a checksum depends on the blocks"


def test_a_checksum_sees_a_single_bit() -> None:
    pool = pool_of_noise(layout())
    slots, extents = slots_of([3, 1], 16, 0, 20), list(cut(pool.layout, 0, 20))
    before = seal(rows_of(pool), slots, extents)
    rows_of(pool)[2, 1, 16 + 3, 31] ^= 1
    assert seal(rows_of(pool), slots, extents) != before


def test_tensors_and_arrays_are_copied_and_summed_alike() -> None:
    source, target = rows_of(pool_of_noise(layout(), seed=1)), rows_of(pool_of_noise(layout(), seed=2))
    theirs, ours = slots_of([3, 1, 2], 16, 0, 40), slots_of([9, 8, 7], 16, 0, 40)
    as_tensor = torch.from_numpy(target.copy())
    copy(as_tensor, torch.from_numpy(source), runs(theirs, ours))
    copy(target, source, runs(theirs, ours))
    np.testing.assert_array_equal(as_tensor.numpy(), target)
    assert checksum(as_tensor, ours) == checksum(target, ours) == checksum(source, theirs)


def test_rows_share_the_memory_of_the_pool() -> None:
    pool = KVPool(layout(block_size=8), 4)
    pool.data[1, 0, 2, 3] = 1.0
    row = rows_of(pool)[1, 0, 2 * 8 + 3]
    assert torch.from_numpy(row).view(torch.bfloat16).tolist() == [1.0] * 16
