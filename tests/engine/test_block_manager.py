"""Paged blocks and the prefix cache."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import ConfigError
from core.types import Request, SamplingParams
from engine.block_manager import UNIT, BlockManager, extend_unit_digests
from engine.sequence import Sequence

BLOCK_SIZES = [8, 16, 32]


def sequence(tokens: list[int], salt: str = "") -> Sequence:
    request = Request(
        request_id="r", prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1), deadline=0, cache_salt=salt
    )
    return Sequence(request)


def computed(blocks: BlockManager, tokens: list[int], salt: str = "") -> Sequence:
    """A sequence whose tokens are all computed and known to the cache."""
    seq = sequence(tokens, salt)
    assert blocks.allocate(seq)
    seq.num_computed_tokens = len(tokens)
    blocks.commit(seq)
    return seq


def num_cached(blocks: BlockManager, tokens: list[int], salt: str = "") -> int:
    return len(blocks.cached_prefix(sequence(tokens, salt))) * blocks.block_size


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_freed_prefix_is_found_again(block_size: int) -> None:
    blocks = BlockManager(32, block_size)
    first = computed(blocks, list(range(70)))
    table = first.block_table
    blocks.free(first)
    assert blocks.num_free == 32

    second = sequence([*range(64), 999, 998])
    assert blocks.allocate(second)
    assert second.num_computed_tokens == 64
    assert second.block_table[: 64 // block_size] == table[: 64 // block_size]
    blocks.check_invariants([second])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_live_sequences_share_the_blocks_of_a_common_prefix(block_size: int) -> None:
    blocks = BlockManager(32, block_size)
    first, second = computed(blocks, list(range(65))), computed(blocks, list(range(65)))
    shared = 64 // block_size
    assert first.block_table[:shared] == second.block_table[:shared]
    assert set(first.block_table[shared:]).isdisjoint(second.block_table[shared:])
    blocks.free(first)
    blocks.check_invariants([second])


@pytest.mark.parametrize(("block_size", "expected"), [(8, 24), (16, 16), (32, 0)])
def test_at_least_one_token_is_left_to_compute(block_size: int, expected: int) -> None:
    blocks = BlockManager(32, block_size)
    blocks.free(computed(blocks, list(range(32))))
    assert num_cached(blocks, list(range(32))) == expected
    assert num_cached(blocks, list(range(33))) == 32


def test_a_difference_hides_everything_after_it() -> None:
    blocks = BlockManager(32, 16)
    blocks.free(computed(blocks, list(range(100))))
    assert num_cached(blocks, [*range(20), 7777, *range(21, 100)]) == 16
    assert num_cached(blocks, [7777, *range(1, 100)]) == 0


def test_tenants_with_different_salts_share_nothing() -> None:
    blocks = BlockManager(32, 16)
    blocks.free(computed(blocks, list(range(40)), salt="a"))
    assert num_cached(blocks, list(range(40)), salt="a") == 32
    assert num_cached(blocks, list(range(40)), salt="b") == 0
    assert num_cached(blocks, list(range(40))) == 0


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blocks_are_found_only_once_they_are_computed(block_size: int) -> None:
    blocks = BlockManager(32, block_size)
    first = sequence(list(range(100)))
    assert blocks.allocate(first)
    assert num_cached(blocks, list(range(100))) == 0
    first.num_computed_tokens = 63
    blocks.commit(first)
    assert num_cached(blocks, list(range(100))) == (32 if block_size == 32 else 48)


def test_blocks_freed_before_they_are_computed_are_forgotten() -> None:
    blocks = BlockManager(32, 16)
    first = sequence(list(range(100)))
    assert blocks.allocate(first)
    blocks.free(first)
    assert num_cached(blocks, list(range(100))) == 0
    blocks.check_invariants([])


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    blocks = BlockManager(8, 16)
    old, new = list(range(64)), list(range(1000, 1064))
    blocks.free(computed(blocks, old))
    blocks.free(computed(blocks, new))
    blocks.free(
        computed(blocks, [*old[:32], 5])
    )  # uses the first half of the old one: its other half is now the oldest

    for taken, cached_old, cached_new in [(1, 48, 64), (2, 32, 64), (3, 32, 48), (6, 32, 0), (7, 16, 0), (8, 0, 0)]:
        filler = sequence(list(range(5000, 5000 + 16 * taken)))
        assert blocks.allocate(filler)
        assert (num_cached(blocks, [*old, 0]), num_cached(blocks, [*new, 0])) == (cached_old, cached_new)
        blocks.free(filler)


def test_of_two_equal_blocks_the_one_left_keeps_the_prefix_in_the_cache() -> None:
    """Two sequences computed the same prefix at the same time; its cached block was evicted while the second ran."""
    twins = BlockManager(6, 16)
    first, second = sequence([1] * 17), sequence([1] * 16 + [2] * 17)
    assert twins.allocate(first)
    assert twins.allocate(second)
    for seq in (first, second):
        seq.num_computed_tokens = len(seq.token_ids)
        twins.commit(seq)
    twins.free(first)
    filler = sequence([3] * 48)  # evicts the cached block of the prefix
    assert twins.allocate(filler)
    assert num_cached(twins, [1] * 17) == 0
    twins.free(second)
    assert num_cached(twins, [1] * 16 + [2] * 17) == 32
    twins.check_invariants([filler])


def test_a_prefix_computed_twice_outlives_its_extension() -> None:
    blocks = BlockManager(5, 16)
    short, long = sequence([1] * 17), sequence([1] * 16 + [2] * 16 + [3])
    assert blocks.allocate(short)
    assert blocks.allocate(long)
    for seq in (short, long):
        seq.num_computed_tokens = len(seq.token_ids)
        blocks.commit(seq)
    blocks.free(short)
    blocks.free(long)
    filler = sequence([9] * 64)  # all but one block
    assert blocks.allocate(filler)
    assert num_cached(blocks, [1] * 17) == 16


def test_allocation_takes_all_or_nothing() -> None:
    blocks = BlockManager(4, 16)
    blocks.free(computed(blocks, list(range(32))))
    before = sequence([*range(32), *range(100, 133)])
    assert not blocks.allocate(before)  # five blocks
    assert blocks.num_free == 4
    fits = sequence([*range(32), *range(100, 132)])
    assert not blocks.allocate(fits, spare=1)
    assert blocks.allocate(fits)
    assert blocks.num_free == 0
    assert not blocks.extend(fits, 65)
    blocks.check_invariants([fits])


def test_a_hit_that_nobody_uses_counts_as_room_that_is_taken() -> None:
    blocks = BlockManager(2, 16)
    blocks.free(computed(blocks, list(range(16))))
    assert not blocks.allocate(sequence(list(range(33))))
    assert blocks.allocate(sequence(list(range(32))))


def test_queries_and_hits_are_counted_in_tokens() -> None:
    blocks = BlockManager(32, 16)
    for tokens in (list(range(40)), list(range(50))):
        seq = sequence(tokens)
        assert blocks.allocate(seq)
        blocks.count_query(seq)
        seq.num_computed_tokens = len(tokens)
        blocks.commit(seq)
    assert (blocks.num_queried_tokens, blocks.num_hit_tokens) == (90, 32)


def test_without_prefix_caching_nothing_is_kept() -> None:
    blocks = BlockManager(8, 16, enable_prefix_caching=False)
    blocks.free(computed(blocks, list(range(100))))
    seq = sequence(list(range(100)))
    assert blocks.allocate(seq)
    assert seq.num_computed_tokens == 0
    blocks.check_invariants([seq])


def test_workers_of_any_block_size_name_a_prefix_alike() -> None:
    digests: list[bytes] = []
    extend_unit_digests(digests, list(range(64)), "salt")
    for block_size in (16, 32):
        blocks = BlockManager(8, block_size)
        computed(blocks, list(range(64)), salt="salt")
        assert set(blocks._cached) == set(digests[block_size // UNIT - 1 :: block_size // UNIT])


def test_the_digest_chain_grows_as_tokens_are_appended() -> None:
    tokens = list(range(100))
    at_once: list[bytes] = []
    extend_unit_digests(at_once, tokens, "s")
    grown: list[bytes] = []
    for end in range(0, 101, 7):
        extend_unit_digests(grown, tokens[:end], "s")
    assert grown == at_once
    assert len(at_once) == 6


def test_freeing_twice_is_harmless_and_a_foreign_table_is_noticed() -> None:
    blocks = BlockManager(4, 16)
    seq = computed(blocks, list(range(20)))
    table = seq.block_table
    blocks.free(seq)
    blocks.free(seq)
    blocks.check_invariants([])
    seq.block_table = table
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(seq)


@pytest.mark.parametrize("block_size", [0, -16, 3, 12, 24])
def test_block_sizes_that_units_cannot_be_made_of_are_refused(block_size: int) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        BlockManager(4, block_size)


def test_a_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockManager(0, 16)


units = st.lists(st.integers(0, 1), max_size=4).map(lambda values: [value for value in values for _ in range(UNIT)])
tails = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class Blocks(RuleBasedStateMachine):
    """Sequences with much in common come, compute, grow and go, in a pool too small for them."""

    block_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12 * UNIT // self.block_size, self.block_size)
        self.live: list[Sequence] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block -> the tokens up to its end that its KV was computed of
        self.named: dict[int, tuple[str, int, list[int]]] = {}  # block -> salt, index, tokens up to the end of its unit

    @rule(head=units, tail=tails, salt=st.sampled_from(["", "x"]), spare=st.integers(0, 2))
    def allocate(self, head: list[int], tail: list[int], salt: str, spare: int) -> None:
        seq, free = sequence(head + tail, salt), self.blocks.num_free
        if not self.blocks.allocate(seq, spare):
            assert self.blocks.num_free == free
            assert free < self.blocks.blocks_for(len(seq.token_ids)) + spare
            return
        assert self.blocks.num_free >= spare
        assert seq.num_computed_tokens < len(seq.token_ids)
        for index, block in enumerate(seq.block_table[: seq.num_computed_tokens // self.block_size]):
            assert self.content[block] == tuple(seq.token_ids[: (index + 1) * self.block_size])
            assert self.named[block][0] == salt
        self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        reach = len(seq.block_table) * self.block_size
        seq.num_computed_tokens += data.draw(
            st.integers(0, min(len(seq.token_ids), reach) - min(seq.num_computed_tokens, reach))
        )
        for index in range(seq.num_computed_tokens // self.block_size):
            self.content[seq.block_table[index]] = tuple(seq.token_ids[: (index + 1) * self.block_size])
        self.blocks.commit(seq)
        for index in range(seq.num_cacheable_blocks):
            end = -(-(index + 1) * self.block_size // UNIT) * UNIT
            self.named[seq.block_table[index]] = (seq.request.cache_salt, index, seq.token_ids[:end])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=tails)
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        seq = data.draw(st.sampled_from(self.live))
        seq.token_ids.extend(tokens)
        num_blocks = len(seq.block_table)
        if self.blocks.extend(seq, len(seq.token_ids)):
            assert len(seq.block_table) == max(num_blocks, self.blocks.blocks_for(len(seq.token_ids)))
        else:
            assert len(seq.block_table) == num_blocks

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq, before = data.draw(st.sampled_from(self.live)), self.blocks.num_free
        self.live.remove(seq)
        shared = {block for other in self.live for block in other.block_table}
        num_own = len(set(seq.block_table) - shared)
        self.blocks.free(seq)
        assert self.blocks.num_free == before + num_own

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_invariants(self.live)

    @invariant()
    def every_evictable_block_can_be_hit(self) -> None:
        """No prefix has gone before what extends it."""
        for block in self.blocks._evictable:
            salt, index, tokens = self.named[block]
            assert len(self.blocks.cached_prefix(sequence([*tokens, 0], salt))) > index

    def teardown(self) -> None:
        for seq in self.live:
            self.blocks.free(seq)
        self.blocks.check_invariants([])
        assert self.blocks.num_free == self.blocks.num_blocks


class SmallBlocks(Blocks):
    block_size = 8


class LargeBlocks(Blocks):
    block_size = 32


SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase
TestBlocks.settings = SETTINGS
TestSmallBlocks = SmallBlocks.TestCase
TestSmallBlocks.settings = SETTINGS
TestLargeBlocks = LargeBlocks.TestCase
TestLargeBlocks.settings = SETTINGS
