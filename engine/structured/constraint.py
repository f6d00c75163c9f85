"""What the grammar of one sequence allows next.

A constraint stands behind the output tokens that it was given, wherever they were drawn: by this worker, by the prefill
worker of a hand-off, or by a worker that has gone. Preemption leaves it as it is, since no token is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from core.errors import InvalidRequest
from core.grammar import Vocabulary, describe
from core.types import Finish, FinishReason

Renew = Callable[[], LLMatcher]
"""A matcher at the start of the text that shares nothing with those before it."""


class Constraint:
    """Belongs to one thread at a time.

    `allowed` [ceil(vocab / 32)] uint32 has the bits of the tokens that may be drawn next: those that go on with a text
    of the grammar and, where the text may end, the stop tokens. Elsewhere a stop token is allowed only if no other
    token goes on, and cuts the text off, as it does without a grammar. `end` is None while the sequence goes on; where
    nothing can follow it is STOP, and an error for a grammar that has become too costly.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, stop_token_ids: Sequence[int], renew: Renew) -> None:
        self.end: Finish | None = None
        self.allowed = vocabulary.words([])
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._renew = renew
        self._num_renewed_at = -1
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stops = vocabulary.words(list(stop_token_ids))
        self._token_ids: list[int] = []
        self._look_ahead()

    def advance(self, token_ids: Sequence[int]) -> None:
        """These came next. A stop token ends the output, so that nothing comes after it."""
        text = [token_id for token_id in token_ids if token_id not in self._stop_token_ids]
        self._token_ids += text
        if text and self.end is None:
            self._matcher.consume_tokens(text)
            self._look_ahead()

    def look_along(self, token_ids: Sequence[int], parents: Sequence[int]) -> list[NDArray[np.uint32] | None]:
        """What would be allowed after each node of a tree of tokens that may come next; None for a node that may not
        come, or after which the text has ended. Parents come before children, -1 is what was given last."""
        after: list[NDArray[np.uint32] | None] = [None] * len(token_ids)
        if self.end is not None:
            return after
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            children.setdefault(parent, []).append(node)
        matcher = self._matcher.deep_copy()  # an error in a text that may never come is not this text's

        def follow(node: int, allowed: NDArray[np.uint32]) -> None:
            token_id = token_ids[node]
            if token_id in self._stop_token_ids or not allowed[token_id // 32] >> np.uint32(token_id % 32) & 1:
                return
            if not matcher.consume_token(token_id):
                return
            own, ended = self._allowed_by(np.frombuffer(matcher.compute_bitmask(), np.uint32))
            if not (ended or matcher.is_stopped() or matcher.is_error()):
                after[node] = own
                for child in children.get(node, ()):
                    follow(child, own)
            matcher.rollback(1)

        for node in children.get(-1, ()):
            follow(node, self.allowed)
        return after

    def _look_ahead(self) -> None:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            self._start_over()
            return
        self.allowed, ended = self._allowed_by(mask)
        if self._matcher.is_stopped() or ended:
            self.end = Finish(reason=FinishReason.STOP)
        elif not self.allowed.any():
            self._fail("no token of the model goes on with it")

    def _allowed_by(self, mask: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], bool]:
        """What may be drawn where a matcher gives `mask`, and whether the text can only end there."""
        vocabulary = self._vocabulary
        may_end = bool(mask[vocabulary.end_id // 32] >> np.uint32(vocabulary.end_id % 32) & 1)
        goes_on = mask[: len(self._stops)] & vocabulary.drawable & ~self._stops
        if may_end:
            return goes_on | self._stops, not goes_on.any()
        return (goes_on if goes_on.any() else mask[: len(self._stops)] & vocabulary.drawable), False

    def _start_over(self) -> None:
        """The copies of a matcher share a lexer with a bounded number of states, which others may have filled. A new
        one that is at its bounds after the same tokens has only this text to blame."""
        if self._num_renewed_at == len(self._token_ids):
            self._fail(describe(self._matcher))
            return
        self._num_renewed_at = len(self._token_ids)
        try:
            self._matcher = self._renew()
        except InvalidRequest as error:
            self._fail(error.message)
            return
        self._matcher.consume_tokens(self._token_ids)
        self._look_ahead()

    def _fail(self, reason: str) -> None:
        self.end = Finish.from_error(
            InvalidRequest(f"the grammar can't be followed after {len(self._token_ids)} tokens: {reason}; simplify it")
        )
