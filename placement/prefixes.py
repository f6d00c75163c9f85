"""How much of each prompt a prefix cache has, from the prompts that came before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from placement.workload import Lengths


def prefix_hits(prefixes: Sequence[Sequence[Hashable]], block_tokens: int, capacity_tokens: float) -> Lengths:
    """Leading tokens of each prompt found in a least-recently-used cache of `capacity_tokens`, which sees the prompts
    in their order. A prompt is named by its blocks of `block_tokens` tokens, each name standing for all up to it.
    # [prompts]"""
    capacity = capacity_tokens // block_tokens
    cached: OrderedDict[Hashable, None] = OrderedDict()
    hits = np.zeros(len(prefixes), np.int32)
    for index, blocks in enumerate(prefixes):
        found = next((number for number, block in enumerate(blocks) if block not in cached), len(blocks))
        hits[index] = found * block_tokens
        # From the last to the first, so that what only longer prompts need is the first to be evicted.
        for block in reversed(blocks):
            cached[block] = None
            cached.move_to_end(block)
        while len(cached) > capacity:
            cached.popitem(last=False)
    return hits
