"""Seeds of the requests that bring none."""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from typing import Protocol

from xxhash import xxh3_64_digest, xxh3_64_intdigest

SEED_RANGE = 2**63
NUM_REMEMBERED_PROMPTS = 16_384


class Seeds(Protocol):
    def draw(self, prompt_token_ids: list[int]) -> int:
        """For the next request with this prompt, 0 to SEED_RANGE - 1."""
        ...


class RandomSeeds:
    """Another one each time."""

    def draw(self, _prompt_token_ids: list[int]) -> int:
        return secrets.randbits(63)


class RepeatableSeeds:
    """Seeds by the server's own seed, the prompt, and how often that prompt has been drawn for. So a run can be
    repeated although requests sent side by side arrive in another order, and equal prompts still get different texts.

    A prompt is forgotten, and counted from the start, after NUM_REMEMBERED_PROMPTS others.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws: OrderedDict[bytes, int] = OrderedDict()

    def draw(self, prompt_token_ids: list[int]) -> int:
        key = xxh3_64_digest(array("q", prompt_token_ids).tobytes())
        count = self._draws.pop(key, 0)
        self._draws[key] = count + 1
        if len(self._draws) > NUM_REMEMBERED_PROMPTS:
            self._draws.popitem(last=False)
        return xxh3_64_intdigest(b"%b %d %d" % (key, count, self._seed)) % SEED_RANGE


def make_seeds(seed: int | None) -> Seeds:
    """`seed` is the server's; None leaves every run different."""
    return RandomSeeds() if seed is None else RepeatableSeeds(seed)
