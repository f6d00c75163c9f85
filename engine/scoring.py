"""What the model gives the tokens of a prompt, which are known, so nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from core.types import PromptLogprobs
from engine.step import ScoredRows

MAX_LOGIT_BYTES = 64 * 2**20
"""Float32 logits that exist at a time; their logarithms take as much again. A whole prompt's would be gigabytes."""


def score(
    hidden: torch.Tensor, rows: ScoredRows, logits: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> PromptLogprobs:
    """log p(next token | tokens up to the row), p = softmax(logits), for each of `rows`. `hidden`: [tokens, hidden], of
    the whole step; `logits`: [rows, hidden] -> [rows, vocab_size]. Every rank of a group makes the same calls."""
    num_rows = len(rows.next_token_ids)
    targets = torch.from_numpy(rows.next_token_ids).to(hidden.device)
    part = max(1, MAX_LOGIT_BYTES // (4 * vocab_size))
    parts = []
    for start in range(0, num_rows, part):
        stop = min(start + part, num_rows)
        scores = logits(hidden[rows.start + start : rows.start + stop]).float().log_softmax(-1)
        parts.append(_report(scores, targets[start:stop], min(rows.num_top, vocab_size)))
    return PromptLogprobs.joined(parts)


def _report(scores: torch.Tensor, targets: torch.Tensor, num_top: int) -> PromptLogprobs:
    own = scores.gather(1, targets[:, None])
    ranks = (scores > own).sum(-1) + 1
    values, ids = scores.topk(num_top, -1)
    return PromptLogprobs(num_top, _floats(own), _ints(ranks), _ints(ids), _floats(values))


def _floats(values: torch.Tensor) -> bytes:
    return values.cpu().numpy().astype("<f4").tobytes()


def _ints(values: torch.Tensor) -> bytes:
    return values.cpu().numpy().astype("<i4").tobytes()
