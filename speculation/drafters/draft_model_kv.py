"""The KV of a draft model: whose tokens it has, in which blocks, and who goes without when there are not enough.

Blocks are the engine's, prefix cache included. Behind the tokens that a request is known to have lies the KV of tokens
that were only guessed; those that came true need not be computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from core.types import Request, SamplingParams
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from speculation.rounds import DraftRequest

_NOTHING = np.empty(0, np.int64)
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(slots=True, eq=False)
class Held:
    """A request and its blocks. The KV of token_ids[: sequence.num_computed_tokens] is there, and behind it that of
    `guesses`."""

    sequence: Sequence
    remember: bool
    guesses: NDArray[np.int64] = field(default_factory=lambda: _NOTHING)

    @property
    def num_missing(self) -> int:
        return self.sequence.num_pending_tokens

    def settle(self) -> None:
        """Guesses that came true are computed; the last token is not, as what follows it is still to be asked."""
        sequence, guesses = self.sequence, self.guesses
        known, last = sequence.num_computed_tokens, len(sequence.token_ids) - 1
        if len(guesses) and known < last:
            came = np.array(sequence.token_ids[known : min(known + len(guesses), last)], np.int64)
            wrong = np.flatnonzero(came != guesses[: len(came)])
            known += int(wrong[0]) if len(wrong) else len(came)
        sequence.num_computed_tokens = min(known, last)
        self.guesses = _NOTHING


class DraftCache:
    """At most so many requests hold blocks as there is room for: those that drafted last."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._blocks = BlockManager(num_blocks, block_size)
        self._held: OrderedDict[int, Held] = OrderedDict()  # next to go first

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free

    def hold(self, request: DraftRequest, num_guesses: int, busy: Collection[int]) -> Held | None:
        """With room for its tokens and so many guesses, taken from requests that are not among the `busy` keys if need
        be. None if there is not enough."""
        if self._blocks.blocks_for(len(request.token_ids) + num_guesses) > self._blocks.num_blocks:
            return None
        held = self._held.get(request.key) or _new(request)
        while not self._fits(held.sequence, num_guesses):
            victim = next((key for key in self._held if key not in busy), None)
            if victim is None:
                if request.key not in self._held:
                    self._blocks.free(held.sequence)
                return None
            self.drop(victim)
        self._held[request.key] = held
        self._held.move_to_end(request.key)
        held.settle()
        return held

    def computed(self, held: Held, num_tokens: int) -> None:
        """So many more of its tokens have their KV. Others with the same prefix may share it, if it may be kept."""
        held.sequence.num_computed_tokens += num_tokens
        if held.remember:
            self._blocks.commit(held.sequence)

    def drop(self, key: int) -> None:
        if (held := self._held.pop(key, None)) is not None:
            self._blocks.free(held.sequence)

    def _fits(self, sequence: Sequence, num_guesses: int) -> bool:
        there = bool(sequence.block_table) or self._blocks.allocate(sequence)
        return there and self._blocks.extend(sequence, len(sequence.token_ids) + num_guesses)


def _new(request: DraftRequest) -> Held:
    """Its tokens are the request's own list, which grows; who may share its prefix is the same scope."""
    own = Request(
        request_id=str(request.key), prompt_token_ids=[], sampling=_GREEDY, deadline=0.0, cache_salt=request.scope
    )
    return Held(Sequence(own, token_ids=cast("list[int]", request.token_ids)), request.remember)
