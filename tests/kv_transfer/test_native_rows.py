"""The kernel that moves rows: the same bytes and sums as plain numpy and the xxhash library, and nothing beyond."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import native_rows
from kv_transfer.native_rows import Memory, move
from kv_transfer.pieces import checksum, copy, copy_summed, runs

needs_kernels = pytest.mark.skipif(native_rows.load() is None, reason="needs AVX2 and a C++ compiler")


def rows(layers: int, slots: int, width: int, seed: int) -> Memory:
    """[layers, 2, slots, width] of noise at a whole stripe."""
    nbytes = layers * 2 * slots * width
    memory = np.empty(nbytes + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][:nbytes]
    aligned[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return aligned.reshape(layers, 2, slots, width)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Memory, Memory, list[int], list[int]]:
    """Two caches, with where some tokens lie in each."""
    layers, width, slots = draw(st.integers(1, 4)), 64 * draw(st.integers(1, 9)), draw(st.integers(4, 40))
    count = draw(st.integers(2, slots))
    source, target = (draw(st.permutations(range(slots)))[:count] for _ in range(2))
    return rows(layers, slots, width, 1), rows(layers, slots, width, 2), source, target


@needs_kernels
@settings(max_examples=100, deadline=None)
@given(cases())
def test_it_copies_and_sums_what_it_is_told_and_touches_nothing_else(
    case: tuple[Memory, Memory, list[int], list[int]],
) -> None:
    source, target, theirs, ours = case
    wanted, summed = target.copy(), xxhash.xxh3_64_intdigest(source[:, :, theirs].tobytes())
    wanted[:, :, ours] = source[:, :, theirs]
    pairs = runs(np.array(theirs), np.array(ours))
    assert move(source, target, pairs, summed=True) == summed
    np.testing.assert_array_equal(target, wanted)
    assert move(target, None, runs(np.array(ours), np.array(ours)), summed=True) == summed


@needs_kernels
def test_memory_that_may_not_be_written_is_read(tmp_path: Path) -> None:
    source, target = rows(2, 8, 128, 1), rows(2, 8, 128, 2)
    (tmp_path / "pool").write_bytes(source.tobytes())
    mapped = np.memmap(tmp_path / "pool", np.uint8, "r", shape=source.shape)
    assert move(mapped, target, np.array([[0, 0, 8]]), summed=False) is not None
    np.testing.assert_array_equal(target, source)


@needs_kernels
@pytest.mark.parametrize("run", [[0, 0, 9], [-1, 0, 2], [0, 7, 2], [3, 3, 0], [2**62, 0, 2**62]])
def test_runs_that_are_not_in_the_cache_are_refused(run: list[int]) -> None:
    target = rows(1, 8, 128, 2)
    before = target.copy()
    with pytest.raises(IndexError, match="not in the cache"):
        move(rows(1, 8, 128, 1), target, np.array([run]), summed=False)
    np.testing.assert_array_equal(target, before)


def test_rows_of_unlike_shapes_are_refused() -> None:
    with pytest.raises(IndexError, match="2 layers"):
        move(rows(2, 8, 128, 1), rows(1, 8, 128, 2), np.array([[0, 0, 8]]), summed=False)


def test_rows_that_do_not_suit_the_kernel_are_left_to_others() -> None:
    whole, pairs = rows(2, 8, 128, 1), np.array([[0, 0, 8]])
    odd = rows(2, 8, 96, 1)
    shifted = whole.reshape(-1)[32 : 32 + 2 * 2 * 4 * 128].reshape(2, 2, 4, 128)
    for unsuitable in (odd, shifted, whole[..., :64], whole[:0]):
        assert move(unsuitable, None, pairs, summed=False) is None
    assert move(rows(1, 8, 64, 1), None, np.array([[0, 0, 1]]), summed=True) is None  # 128 bytes


def test_without_the_kernel_it_is_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, pairs = rows(3, 8, 128, 1), rows(3, 8, 128, 2), np.array([[1, 5, 2], [6, 0, 2]])
    ours = np.array([5, 6, 0, 1])
    found = copy_summed(target, source, pairs), checksum(target, ours)
    copied = target.copy()
    monkeypatch.setattr(native_rows, "load", lambda: None)
    again = rows(3, 8, 128, 2)
    assert (copy_summed(again, source, pairs), checksum(again, ours)) == found
    assert found[0] == found[1]
    np.testing.assert_array_equal(again, copied)
    plain = rows(3, 8, 128, 2)
    copy(plain, source, pairs)
    np.testing.assert_array_equal(plain, copied)
