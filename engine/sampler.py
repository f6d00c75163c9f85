"""From logits to tokens, in float32 on the device.

Order: penalties, bias and forbidden tokens, temperature, min_p, top_k, top_p, draw. The uniform number of a draw is a
hash of (seed, position): a token depends on nothing else in the batch, on no generator's state, and a sequence that
moves to another worker goes on as if it had stayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.types import SamplingParams, TokenLogprobs
from engine.step import SamplingRow

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows."""


def uniforms(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of the two, mixed one
    after the other so that neighbouring seeds and positions have nothing in common. 53 bits."""
    with np.errstate(over="ignore"):
        mixed = _split_mix(_split_mix(seeds.astype(np.uint64)) + positions.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _split_mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits: Tensor, rows: Sequence[SamplingRow | None]) -> NDArray[np.int64]:
    """A token per row of logits [rows, vocab] float32; -1 where the row is None. `logits` is not changed."""
    tokens = np.full(len(rows), -1, dtype=np.int64)
    wanted = [(index, row) for index, row in enumerate(rows) if row is not None]
    if any(_adjusts(row) for _, row in wanted):
        logits = adjust(logits, rows)
    greedy = [index for index, row in wanted if is_greedy(row.params)]
    if greedy:
        best = logits.argmax(-1) if len(greedy) == len(rows) else logits[greedy].argmax(-1)
        tokens[greedy] = best.cpu().numpy()
    drawn = [(index, row) for index, row in wanted if not is_greedy(row.params)]
    if drawn:
        indices = [index for index, _ in drawn]
        tokens[indices] = _draw(logits[indices], [row for _, row in drawn])
    return tokens


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The law tokens are drawn from, [rows, vocab] float32, after temperature and truncation."""
    temperature = _column(logits, [p.temperature for p in params])
    p = torch.softmax(logits / temperature, -1)
    if any(q.min_p > 0 for q in params):
        floor = p.amax(-1, keepdim=True) * _column(logits, [q.min_p for q in params])
        p = p.masked_fill(p < floor, 0.0)
    if any(q.top_k > 0 or q.top_p < 1 for q in params):
        p = _truncate(p, params)
    return p / p.sum(-1, keepdim=True)


def _truncate(p: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the top_k most likely tokens, and of those the fewest whose mass reaches top_p of what top_k and min_p left.
    Ties at the boundary are broken by the sort, as elsewhere."""
    ordered, order = p.sort(-1, descending=True, stable=True)
    vocab = p.shape[-1]
    ranks = torch.arange(vocab, device=p.device)
    top_k = torch.tensor([q.top_k or vocab for q in params], device=p.device).unsqueeze(1)
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    total = ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= _column(p, [q.top_p for q in params]) * total, 0.0)
    return torch.zeros_like(p).scatter_(-1, order, ordered)


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> NDArray[np.int64]:
    """Inverse transform: the first token at which the cumulative law exceeds the row's uniform number."""
    cumulative = probabilities(logits, [row.params for row in rows]).double().cumsum(-1)
    seeds = np.array([row.params.seed for row in rows], dtype=np.int64)
    u = torch.from_numpy(uniforms(seeds, np.array([row.position for row in rows], dtype=np.int64)))
    # Scaling by the total, which rounding keeps from being 1, makes every token past the last possible one unreachable.
    u = u.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u, right=True).squeeze(1).cpu().numpy()


# --- penalties, bias, forbidden tokens -----------------------------------------------------------------------------


def _adjusts(row: SamplingRow) -> bool:
    return bool(has_penalty(row.params) or row.params.logit_bias or row.forbidden)


def has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def adjust(logits: Tensor, rows: Sequence[SamplingRow | None]) -> Tensor:
    """A copy of the logits with each row's penalties, bias and forbidden tokens applied."""
    logits = logits.clone()
    for scores, row in zip(logits, rows, strict=True):
        if row is None:
            continue
        if has_penalty(row.params):
            _penalise(scores, row)
        if row.params.logit_bias:
            ids = torch.tensor(list(row.params.logit_bias), device=scores.device)
            scores[ids] += torch.tensor(list(row.params.logit_bias.values()), device=scores.device)
        if row.forbidden:
            scores[list(row.forbidden)] = -torch.inf
    return logits


def _penalise(scores: Tensor, row: SamplingRow) -> None:
    """Repetition divides positive and multiplies negative scores of every token seen (arXiv:1909.05858); frequency and
    presence subtract from tokens of the output, as in OpenAI's API."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_token_ids, *row.output_token_ids}), device=scores.device)
        if len(seen):
            old = scores[seen]
            scores[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if len(row.output_token_ids):
        ids, counts = np.unique(np.asarray(row.output_token_ids, dtype=np.int64), return_counts=True)
        subtract = params.frequency_penalty * counts + params.presence_penalty
        scores[torch.from_numpy(ids).to(scores.device)] -= torch.from_numpy(subtract).to(scores.device, scores.dtype)


# --- logprobs ------------------------------------------------------------------------------------------------------


def logprobs(
    logits: Tensor, rows: Sequence[SamplingRow | None], tokens: NDArray[np.int64]
) -> tuple[TokenLogprobs | None, ...]:
    """What the rows that ask for them report, from the model's own law; empty if none asks."""
    asking = [i for i, row in enumerate(rows) if row is not None and row.params.logprobs is not None]
    if not asking:
        return ()
    result: list[TokenLogprobs | None] = [None] * len(rows)
    law = torch.log_softmax(logits[asking], -1)
    for index, scores in zip(asking, law, strict=True):
        row = rows[index]
        count = (row.params.logprobs or 0) if row is not None else 0
        top = scores.topk(count)
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        result[index] = TokenLogprobs(float(scores[int(tokens[index])]), pairs)
    return tuple(result)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
