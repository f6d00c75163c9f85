"""KV between groups that are split unlike, from ranks with memory of their own to ranks with memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.kv_layout import KVLayout
from kv_transfer.messages import Piece
from kv_transfer.pieces import Extent, checksum, copy_summed, cut, layers_of, runs, seal, slots_of, tokens_of
from kv_transfer.split_rows import Share, SplitRows
from kv_transfer.transports.batches import pack

TOKENS, NUM_SLOTS, LAYERS, HEAD_BYTES = 75, 256, 5, 4
SPLITS = list(product((1, 2, 4), (1, 2)))
SIZES = (8, 16, 32)


def layout(num_heads: int, block_size: int, split: tuple[int, int]) -> KVLayout:
    return KVLayout(
        num_layers=LAYERS,
        num_kv_heads=num_heads,
        head_size=2,
        dtype="bfloat16",
        block_size=block_size,
        fingerprint="tiny",
        tp_size=split[0],
        pp_size=split[1],
    )


def block_table(block_size: int, seed: int) -> list[int]:
    table: list[int] = np.random.default_rng(seed).permutation(NUM_SLOTS // block_size).tolist()
    return table


def split_rows(of: KVLayout, whole: NDArray[np.uint8], kind: type) -> SplitRows:
    """The ranks' memories with what `whole`, [layers, 2, slots, heads, head bytes], has of theirs."""
    shares = []
    for rank in of.split.all():
        layers, heads = rank.layers(LAYERS), rank.kv_heads(of.num_kv_heads)
        own = whole[layers.start : layers.stop, :, :, heads.start : heads.stop].copy()
        rows = own.reshape(len(layers), 2, NUM_SLOTS, -1)
        shares.append(Share(layers, heads, torch.from_numpy(rows) if kind is torch.Tensor else rows))
    return SplitRows(shares, LAYERS, of.num_kv_heads)


def noise(num_heads: int, seed: int) -> NDArray[np.uint8]:
    shape = (LAYERS, 2, NUM_SLOTS, num_heads, HEAD_BYTES)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def handed_over(theirs: SplitRows, ours: SplitRows, giver: KVLayout, taker: KVLayout) -> Iterator[list[Piece]]:
    """Piece by piece, through one contiguous buffer, with checksums compared on both sides."""
    source = slots_of(block_table(giver.block_size, 1), giver.block_size, TOKENS)
    target = slots_of(block_table(taker.block_size, 2), taker.block_size, TOKENS)
    for piece in seal(theirs, source, list(cut(giver, Extent(0, TOKENS, 0, LAYERS), 1000))):
        width = 2 * piece.num_layers * piece.num_tokens * theirs.shape[-1]
        buffer = torch.empty(width, dtype=torch.uint8)
        pack(buffer, theirs, source, [piece])
        part = buffer.view(piece.num_layers, 2, piece.num_tokens, -1)
        own = tokens_of(target, piece)
        came = part if ours.is_tensor else part.numpy()
        assert copy_summed(layers_of(ours, piece), came, runs(np.arange(len(own)), own)) == piece.checksum
        assert checksum(layers_of(ours, piece), tokens_of(target, piece)) == piece.checksum
        yield [piece]


@pytest.mark.parametrize("num_heads", [4, 2])
@pytest.mark.parametrize(("theirs", "ours"), list(product(SPLITS, SPLITS)))
def test_every_rank_gets_its_share_bit_for_bit_whatever_the_splits_and_block_sizes(
    num_heads: int, theirs: tuple[int, int], ours: tuple[int, int]
) -> None:
    for their_size, our_size in product(SIZES, SIZES):
        giver, taker = layout(num_heads, their_size, theirs), layout(num_heads, our_size, ours)
        given, before = noise(num_heads, 3), noise(num_heads, 4)
        mine = split_rows(taker, before, np.ndarray)
        for _ in handed_over(split_rows(giver, given, np.ndarray), mine, giver, taker):
            pass
        source = slots_of(block_table(their_size, 1), their_size, TOKENS)
        target = slots_of(block_table(our_size, 2), our_size, TOKENS)
        expected = before.copy()
        expected[:, :, target] = given[:, :, source]
        wanted = split_rows(taker, expected, np.ndarray)
        for got, want in zip(mine._shares, wanted._shares, strict=True):
            np.testing.assert_array_equal(got.rows, want.rows)


def test_tensors_are_gathered_and_scattered_as_arrays_are() -> None:
    giver, taker = layout(4, 8, (4, 2)), layout(4, 16, (2, 1))
    given, before = noise(4, 3), noise(4, 4)
    results = {}
    for kind in (np.ndarray, torch.Tensor):
        mine = split_rows(taker, before, kind)
        sealed = list(handed_over(split_rows(giver, given, kind), mine, giver, taker))
        results[kind] = sealed, [np.asarray(share.rows) for share in mine._shares]
    assert results[np.ndarray][0] == results[torch.Tensor][0]
    for got, want in zip(results[torch.Tensor][1], results[np.ndarray][1], strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_split_does_not_show_in_the_checksums() -> None:
    given = noise(4, 3)
    extents = [Extent(0, TOKENS, 0, LAYERS), Extent(3, 9, 2, 2)]
    source = slots_of(block_table(16, 1), 16, TOKENS)
    sums = {
        split: [piece.checksum for piece in seal(split_rows(layout(4, 16, split), given, np.ndarray), source, extents)]
        for split in SPLITS
    }
    assert len({tuple(found) for found in sums.values()}) == 1
