"""The logprobs of a prompt's tokens, from the arrays that workers send to the shapes clients read."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from core.types import PromptLogprobs, TokenLogprobs
from gateway.tokenizer import ServedModel

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


class ScoredToken(NamedTuple):
    token_id: int
    rank: int
    """1 is what the model took for most likely."""
    logprobs: TokenLogprobs


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def scored_tokens(token_ids: list[int], scores: PromptLogprobs | None) -> Iterator[ScoredToken]:
    """The tokens of a prompt after the first, before which there is nothing to go by. `scores` is None if that is
    the only one."""
    if scores is None:
        return
    own, ranks = _unpack("f", scores.logprobs), _unpack("i", scores.ranks)
    ids, values = _unpack("i", scores.top_ids), _unpack("f", scores.top_logprobs)
    for row, (token_id, logprob, rank) in enumerate(zip(token_ids[1:], own, ranks, strict=True)):
        part = slice(row * scores.num_top, (row + 1) * scores.num_top)
        top = list(zip(ids[part], values[part], strict=True))
        yield ScoredToken(token_id, rank, TokenLogprobs(logprob, top))


def prompt_logprobs_body(
    model: ServedModel, token_ids: list[int], scores: PromptLogprobs | None, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then for each an object of token ids to logprob, rank and
    text, with the token itself first and the `num_top` most likely after it."""

    def entry(token_id: int, rank: int, logprob: float) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": model.token_text(token_id)}

    found: list[dict[str, Any] | None] = [None]
    for token in scored_tokens(token_ids, scores):
        entries = {str(token.token_id): entry(token.token_id, token.rank, token.logprobs.logprob)}
        for rank, (other, logprob) in enumerate(token.logprobs.top[:num_top], start=1):
            entries.setdefault(str(other), entry(other, rank, logprob))
        found.append(entries)
    return found


def _unpack(kind: str, data: bytes) -> array[Any]:
    values: array[Any] = array(kind, data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
