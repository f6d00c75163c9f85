"""Who owns which block of the paged KV cache, and which blocks hold the KV of which tokens.

A block is free (nothing of use in it), referenced (in the table of one or more sequences), or evictable (referenced by
none, but the prefix cache still knows its tokens). Blocks are known by a digest chained over units of 16 tokens, so
that workers of any block size, and the router, name the same prefix alike.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable

from xxhash import xxh3_128_digest

from core.errors import ConfigError
from engine.sequence import Sequence

UNIT = 16
"""Tokens per link of the digest chain."""

_pack_unit = struct.Struct(f"<{UNIT}i").pack


def extend_unit_digests(digests: list[bytes], token_ids: list[int], cache_salt: str, adapter: str = "") -> None:
    """Append the digests of the full units of `token_ids` that `digests` lacks.

    digest[k] = xxh3_128(digest[k - 1] + 16 token ids as little-endian int32), digest[-1] = xxh3_128(salt), or with an
    adapter, which computes KV of its own, xxh3_128(ff + adapter + ff + salt): no salt has such bytes in UTF-8. The hash
    is not a cryptographic one: what keeps tenants apart is that they don't know each other's salt.
    """
    salt = cache_salt.encode()
    parent = (
        digests[-1] if digests else xxh3_128_digest(b"\xff%b\xff%b" % (adapter.encode(), salt) if adapter else salt)
    )
    for start in range(len(digests) * UNIT, len(token_ids) - UNIT + 1, UNIT):
        parent = xxh3_128_digest(parent + _pack_unit(*token_ids[start : start + UNIT]))
        digests.append(parent)


class BlockManager:
    """Allocates blocks to sequences. Every operation costs O(1) per block it touches.

    `block_size` is a multiple of 16 or a divisor of it. Evictable blocks go least recently used first, and of one
    prefix the last block first, so that a prefix outlives what extends it.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ConfigError(f"num_blocks is {num_blocks}; give the KV cache memory for at least one block")
        if block_size < 1 or (block_size % UNIT and UNIT % block_size):
            raise ConfigError(f"block_size {block_size} is neither a multiple nor a divisor of {UNIT}; use 8, 16 or 32")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        """Tokens looked up in the prefix cache, once per sequence."""
        self.num_hit_tokens = 0
        """Of these, the tokens found."""
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # next to go first
        self._cached: dict[bytes, int] = {}
        self._key: list[bytes | None] = [None] * num_blocks  # of a cached block, its key in _cached

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the first tokens of the sequence, in order. At least one token is left out:
        without a token to compute there would be no logits; and all of them while the prompt's logprobs are owed."""
        if not self.enable_prefix_caching or sequence.owes_prompt_logprobs:
            return []
        hits: list[int] = []
        for index in range(self._num_shareable_blocks(sequence)):
            block = self._cached.get(self._key_of(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def first_missing(self, sequence: Sequence) -> int | None:
        """The place of the first block of a sequence without blocks that the prefix cache could have and has not."""
        if not self.enable_prefix_caching or sequence.owes_prompt_logprobs:
            return None
        index = len(self.cached_prefix(sequence))
        return index if index < self._num_shareable_blocks(sequence) else None

    def brings(self, writer: Sequence, sequence: Sequence, first: int, last: int) -> bool:
        """Whether a sequence whose prompt's KV is yet to come will have these blocks in the prefix cache for
        `sequence`, from the one that `first_missing` has named on. Digests are chained: where the last of these blocks
        has the same name, all before it have."""
        if writer.num_cacheable_blocks > first:
            return False
        self._extend_digests(writer)
        num_written = len(writer.unit_digests) * UNIT // self.block_size
        if last >= min(num_written, self._num_shareable_blocks(sequence)):
            return False
        return self._key_of(writer, last) == self._key_of(sequence, last)

    def allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give a sequence without blocks its cached prefix and new blocks for all its other tokens, and set
        num_computed_tokens to the length of that prefix. False, with nothing changed, unless `spare` blocks would
        still be free."""
        hits = self.cached_prefix(sequence)
        num_new = self.blocks_for(len(sequence.token_ids)) - len(hits)
        num_revived = sum(self._references[block] == 0 for block in hits)
        if num_new + num_revived + spare > self.num_free:
            return False
        for block in hits:  # before any is taken: a hit must not be evicted to make room for the rest
            self._reference(block)
        sequence.block_table = hits + [self._take() for _ in range(num_new)]
        sequence.num_computed_tokens = len(hits) * self.block_size
        sequence.num_cacheable_blocks = len(hits)
        sequence.inexact_kv = False
        return True

    def count_query(self, sequence: Sequence) -> None:
        """Count what `allocate` has just found, if it has looked."""
        if self.enable_prefix_caching and not sequence.owes_prompt_logprobs:
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_hit_tokens += sequence.num_computed_tokens

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the block table long enough for `num_tokens` tokens. False, with nothing changed, if blocks lack."""
        num_new = self.blocks_for(num_tokens) - len(sequence.block_table)
        if num_new <= 0:
            return True
        if num_new > self.num_free:
            return False
        sequence.block_table.extend(self._take() for _ in range(num_new))
        return True

    def commit(self, sequence: Sequence) -> None:
        """Let the prefix cache know the blocks that num_computed_tokens has filled since the last call, unless their KV
        is not exact."""
        if not self.enable_prefix_caching or sequence.inexact_kv:
            return
        granule = max(UNIT, self.block_size)  # a block smaller than a unit has no name before its unit is full
        num_full = sequence.num_computed_tokens // granule * granule // self.block_size
        if num_full <= sequence.num_cacheable_blocks:
            return
        self._extend_digests(sequence)
        for index in range(sequence.num_cacheable_blocks, num_full):
            self._remember(sequence.block_table[index], self._key_of(sequence, index))
        sequence.num_cacheable_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Unreference the blocks of a sequence. The prefix cache keeps those it knows until room is needed."""
        for index in range(len(sequence.block_table) - 1, -1, -1):  # last first, so that it is evicted first
            known = index < sequence.num_cacheable_blocks
            self._unreference(sequence.block_table[index], self._key_of(sequence, index) if known else None)
        sequence.block_table = []
        sequence.block_array = None
        sequence.kv_moves = None
        sequence.num_computed_tokens = 0
        sequence.num_cacheable_blocks = 0

    def _num_shareable_blocks(self, sequence: Sequence) -> int:
        """From the first on, that it may have of the prefix cache: its last token is computed in any case."""
        self._extend_digests(sequence)
        return min(len(sequence.token_ids) - 1, len(sequence.unit_digests) * UNIT) // self.block_size

    @staticmethod
    def _extend_digests(sequence: Sequence) -> None:
        request = sequence.request
        extend_unit_digests(sequence.unit_digests, sequence.token_ids, request.cache_salt, request.adapter)

    def _key_of(self, sequence: Sequence, index: int) -> bytes:
        """Name of block `index`: the digest of the unit it ends with or, if smaller, of the unit it is in with its
        place there."""
        end = (index + 1) * self.block_size
        digest = sequence.unit_digests[(end - 1) // UNIT]
        return digest if self.block_size >= UNIT else digest + bytes((end % UNIT,))

    def _remember(self, block: int, key: bytes) -> bool:
        """Make `block` the cached one for `key`. False if an equal block already is."""
        if self._cached.setdefault(key, block) != block:
            return False
        self._key[block] = key
        return True

    def _reference(self, block: int) -> None:
        if self._references[block] == 0:
            del self._evictable[block]
        self._references[block] += 1

    def _unreference(self, block: int, key: bytes | None) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} was freed twice"
        if self._references[block]:
            return
        # Two sequences may have computed the same tokens at the same time: only one block is the cached one. The other
        # takes its place if it has been evicted since, and renews it otherwise: blocks that extend this prefix have
        # just become evictable, and the prefix must outlive them.
        if self._key[block] is not None or (key is not None and self._remember(block, key)):
            self._evictable[block] = None
            return
        self._free.append(block)
        if key is not None and (twin := self._cached[key]) in self._evictable:
            self._evictable.move_to_end(twin)

    def _take(self) -> int:
        """A block for new content, referenced once. The caller has checked num_free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            key = self._key[block]
            assert key is not None, f"block {block} is evictable but not cached"
            del self._cached[key]
            self._key[block] = None
        self._references[block] = 1
        return block

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """For tests: raise AssertionError unless the books agree with the tables of all live sequences."""
        references = Counter(block for sequence in sequences for block in sequence.block_table)
        assert self._references == [references[block] for block in range(self.num_blocks)], "references are wrong"
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a table lists a block twice"
        idle = [*self._free, *self._evictable]
        assert len(set(idle)) == len(idle), "a block is free twice"
        assert set(idle) == {b for b in range(self.num_blocks) if not self._references[b]}, "a block has leaked"
        assert {key: block for block, key in enumerate(self._key) if key is not None} == self._cached
        assert all(self._key[block] is None for block in self._free), "a free block is cached"
        assert all(self._key[block] is not None for block in self._evictable), "an evictable block is not cached"
