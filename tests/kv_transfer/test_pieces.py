"""Slots, runs, pieces: the laws that make two caches with unlike blocks the same."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import layout, pool_of_noise, tokens

from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer import pieces
from kv_transfer.messages import Piece
from kv_transfer.pieces import (
    Coverage,
    Extent,
    Frontier,
    checksum,
    copy,
    cut,
    layers_of,
    layers_per_piece,
    layers_told,
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


def parts(of: KVLayout, start: int, stop: int, max_bytes: int | None = None) -> list[Extent]:
    if start == stop:
        return []
    return list(cut(of, Extent(start, stop - start, 0, of.num_layers), max_bytes))


def test_slots_follow_the_block_table() -> None:
    assert slots_of([7, 2], block_size=4, num_tokens=6).tolist() == [28, 29, 30, 31, 8, 9]


def test_runs_are_as_long_as_both_sides_allow() -> None:
    found = runs(np.array([4, 5, 6, 7, 20]), np.array([0, 1, 8, 9, 10]))
    assert found.tolist() == [[4, 0, 2], [6, 8, 2], [20, 10, 1]]
    assert runs(np.arange(100), np.arange(50, 150)).tolist() == [[0, 50, 100]]
    assert runs(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).shape == (0, 3)


def named(extents: Iterable[Extent], num_layers: int, num_tokens: int) -> np.ndarray:
    """How often each layer of each token is in them."""
    times = np.zeros((num_layers, num_tokens), dtype=int)
    for e in extents:
        assert 0 <= e.layer < e.layer + e.num_layers <= num_layers
        assert 0 <= e.token < e.token + e.num_tokens <= num_tokens
        times[e.layer : e.layer + e.num_layers, e.token : e.token + e.num_tokens] += 1
    return times


@given(
    start=st.integers(0, 90),
    length=st.integers(1, 90),
    layers=st.tuples(st.integers(0, 4), st.integers(1, 5)),
    max_bytes=st.integers(1, 20_000),
)
def test_a_cut_covers_an_extent_once(start: int, length: int, layers: tuple[int, int], max_bytes: int) -> None:
    of, extent = layout(num_layers=9), Extent(start, length, *layers)
    pieces, rows = list(cut(of, extent, max_bytes)), rows_of(KVPool(of, 1))
    np.testing.assert_array_equal(named(pieces, 9, 180), named([extent], 9, 180))
    smallest = piece_bytes(rows, Extent(0, 1, 0, 1))
    assert all(piece_bytes(rows, piece) <= max(max_bytes, smallest) for piece in pieces)


@given(cached=st.integers(0, 20), chunks=st.lists(st.integers(1, 20), max_size=6), data=st.data())
def test_what_lies_between_frontiers_is_all_that_was_written_each_once(
    cached: int, chunks: list[int], data: st.DataObject
) -> None:
    """Whichever of the frontiers that a prompt passes were looked at."""
    passed, token = [Frontier(cached)], cached
    for rows in chunks:
        passed += [*(Frontier(token, rows, layers) for layers in range(1, 4)), Frontier(token + rows)]
        token += rows
    looked = data.draw(st.lists(st.sampled_from(passed), unique=True).map(sorted))
    seen = [Frontier(), *looked, Frontier(token)]
    extents = [e for earlier, later in pairwise(seen) for e in later.since(earlier, 4)]
    assert (named(extents, 4, token) == 1).all()


def test_tokens_before_the_first_wanted_are_left_out() -> None:
    assert Extent(10, 20, 0, 3).from_token(5) == Extent(10, 20, 0, 3)
    assert Extent(10, 20, 0, 3).from_token(12) == Extent(12, 18, 0, 3)
    assert Extent(10, 20, 0, 3).from_token(99).num_tokens == 0


def test_a_coverage_takes_each_part_once_and_nothing_else() -> None:
    coverage = Coverage(10, 20, 3)
    outside = [(9, 2, 0, 1), (19, 2, 0, 1), (10, 0, 0, 1), (10, 1, -1, 2), (10, 1, 2, 2), (10, 1, 0, 0), (-5, 99, 0, 3)]
    assert not any(coverage.add(Piece(*extent, checksum=0)) for extent in outside)
    assert coverage.add(Piece(10, 10, 0, 2, checksum=0))
    assert not coverage.add(Piece(19, 1, 1, 2, checksum=0)), "a part of it is named already"
    assert not coverage.whole
    assert coverage.add(Piece(10, 10, 2, 1, checksum=0))
    assert coverage.whole


@settings(max_examples=40)
@given(data=st.data(), ours=BLOCK_SIZES, theirs=BLOCK_SIZES, num_tokens=st.integers(1, 200))
def test_a_copy_between_any_two_block_sizes_is_exact_and_touches_nothing_else(
    data: st.DataObject, ours: int, theirs: int, num_tokens: int
) -> None:
    start = data.draw(st.integers(0, num_tokens // ours)) * ours
    giver, taker = pool_of_noise(layout(theirs), seed=1), pool_of_noise(layout(ours), seed=2)
    source_table, target_table = data.draw(tables(theirs, num_tokens)), data.draw(tables(ours, num_tokens))
    source = slots_of(source_table, theirs, num_tokens)
    target = slots_of(target_table, ours, num_tokens)
    before = rows_of(taker).copy()
    pieces = seal(rows_of(giver), source, parts(giver.layout, start, num_tokens, 4096))
    for piece in pieces:
        pairs = runs(tokens_of(source, piece), tokens_of(target, piece))
        copy(layers_of(rows_of(taker), piece), layers_of(rows_of(giver), piece), pairs)
    np.testing.assert_array_equal(
        tokens(taker, target_table, start, num_tokens), tokens(giver, source_table, start, num_tokens)
    )
    others = np.setdiff1d(np.arange(before.shape[2]), target[start:])
    np.testing.assert_array_equal(rows_of(taker)[:, :, others], before[:, :, others])
    extents = [Extent(piece.token, piece.num_tokens, piece.layer, piece.num_layers) for piece in pieces]
    assert seal(rows_of(taker), target, extents) == pieces, "a checksum depends on the blocks"


def test_a_checksum_sees_a_single_bit() -> None:
    pool = pool_of_noise(layout())
    slots, extents = slots_of([3, 1], 16, 20), parts(pool.layout, 0, 20)
    before = seal(rows_of(pool), slots, extents)
    rows_of(pool)[2, 1, 16 + 3, 31] ^= 1
    assert seal(rows_of(pool), slots, extents) != before


def test_tensors_and_arrays_are_copied_and_summed_alike() -> None:
    source, target = rows_of(pool_of_noise(layout(), seed=1)), rows_of(pool_of_noise(layout(), seed=2))
    theirs, ours = slots_of([3, 1, 2], 16, 40), slots_of([9, 8, 7], 16, 40)
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


@given(
    num_layers=st.integers(1, 80),
    num_tokens=st.integers(1, 5000),
    row=st.sampled_from([16, 96, 512]),
    last=st.booleans(),
)
def test_layers_are_told_of_by_the_piece_and_of_the_last_chunk_in_ever_smaller_ones(
    num_layers: int, num_tokens: int, row: int, last: bool
) -> None:
    of = layout(num_layers=num_layers, num_kv_heads=1, head_size=row)
    most, quick = (layers_per_piece(of, num_tokens, bound) for bound in (pieces.PIECE_BYTES, pieces.LAST_PIECE_BYTES))
    told = sorted(layers_told(of, num_tokens, last=last))
    sizes = np.diff([0, *told, num_layers]).tolist()
    assert all(0 < size <= most for size in sizes)
    if not last or most >= num_layers:
        assert set(sizes[:-1]) <= {most}
    else:
        assert sizes[-1] == quick
        assert all(size == min(most, 2 * later) for size, later in pairwise(sizes[1:]))
