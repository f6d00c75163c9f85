"""The arithmetic: from pairs of answers, one with speculation and one without, to what is reported. Pure.

    alpha                  of the first child of each accepted node or root, how many were accepted: the mean of
                           sum min(p, q) under the rules chain and tree
    tau                    tokens per step of the target and request, those without a draft included, after the first
    acceptance_length      1 + accepted / drafts
    acceptance_rate        accepted / drafted tokens
    accepted_per_position  at i: drafts accepted that far, of those that reached so far
    tokens_per_s           mean over the questions, from asking to the last token; plain_ is without speculation
    speedup                mean over the questions of the ratio of the two, as Spec-Bench has it
    geometric_speedup      their geometric mean, which noise does not raise, as it does a mean of ratios
    decode_speedup         the mean of the ratios from the first token on: what speculation can change
    draft_share            of the time of steps that could have drafts: what drafters and their budgets took, and
    verify_share           what rules and learning took, the rest being the target's

An interval is the middle 95 % of a bootstrap over batches: questions that were answered together are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import fmean
from typing import Any

import numpy as np

from bench.speculation.arms import Answer
from engine.drafts import Draft

RESAMPLES = 10_000


@dataclass(slots=True)
class Drafts:
    """Counts, over the drafts of a question."""

    drafts: int = 0
    tokens: int = 0
    accepted: int = 0
    firsts: int = 0
    """First children whose parent was accepted."""
    firsts_accepted: int = 0
    depths: Counter[int] = field(default_factory=Counter)
    """Drafts by their depth, and by how much of it was accepted."""
    accepted_depths: Counter[int] = field(default_factory=Counter)

    def add(self, draft: Draft, path: Sequence[int]) -> None:
        self.drafts += 1
        self.tokens += len(draft.token_ids)
        self.accepted += len(path)
        parents, firsts = np.unique(draft.parents, return_index=True)
        judged = firsts[np.isin(parents, [-1, *path])]
        self.firsts += len(judged)
        self.firsts_accepted += int(np.isin(judged, path).sum())
        self.depths[int(draft.depths.max())] += 1
        self.accepted_depths[len(path)] += 1


@dataclass(frozen=True, slots=True)
class Seconds:
    """Spent in and around steps that could have drafts."""

    step: float
    draft: float
    verify: float

    def part_since(self, before: Seconds, parts: int) -> Seconds:
        return Seconds(
            (self.step - before.step) / parts,
            (self.draft - before.draft) / parts,
            (self.verify - before.verify) / parts,
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """One question."""

    task: str
    batch: int
    """Which one it was part of."""
    plain: Answer
    drafted: Answer
    drafts: Drafts
    seconds: Seconds
    """Its part of those of the batch."""


def by_task(pairs: Sequence[Pair]) -> dict[str, Any]:
    """{"all": summary, "tasks": {task: summary}}"""
    tasks = sorted({pair.task for pair in pairs})
    return {"all": summary(pairs), "tasks": {task: summary([p for p in pairs if p.task == task]) for task in tasks}}


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The keys of the module's table. What was never observed is None."""
    answers, drafts = [pair.drafted for pair in pairs], [pair.drafts for pair in pairs]
    num_drafts, accepted = _total(d.drafts for d in drafts), _total(d.accepted for d in drafts)
    extra = _ratio(accepted, num_drafts)
    ratios, batches = [_rate(pair.drafted) / _rate(pair.plain) for pair in pairs], [pair.batch for pair in pairs]
    logs = [log(ratio) for ratio in ratios]
    return {
        "questions": len(pairs),
        "tokens": _total(len(answer.token_ids) for answer in answers),
        "alpha": _ratio(_total(d.firsts_accepted for d in drafts), _total(d.firsts for d in drafts)),
        "tau": _ratio(_total(len(a.token_ids) - 1 for a in answers), _total(a.steps for a in answers)),
        "acceptance_length": None if extra is None else 1 + extra,
        "acceptance_rate": _ratio(accepted, _total(d.tokens for d in drafts)),
        "accepted_per_position": _per_position(drafts),
        "tokens_per_s": fmean(_rate(answer) for answer in answers),
        "plain_tokens_per_s": fmean(_rate(pair.plain) for pair in pairs),
        **_mean("speedup", ratios, batches),
        **{key: None if mean is None else exp(mean) for key, mean in _mean("geometric_speedup", logs, batches).items()},
        **_mean("decode_speedup", *_decode_ratios(pairs)),
        **_shares([pair.seconds for pair in pairs]),
    }


def interval(values: Sequence[float], batches: Sequence[int]) -> tuple[float, float] | None:
    """Of the mean of values [n], of which those with the same number in `batches` [n] depend on each other. None if
    all do."""
    groups = sorted(set(batches))
    if len(groups) < 2:
        return None
    of_group = np.searchsorted(groups, batches)
    sums, counts = np.bincount(of_group, weights=values), np.bincount(of_group)
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def _mean(name: str, values: Sequence[float], batches: Sequence[int]) -> dict[str, float | None]:
    low, high = interval(values, batches) or (None, None)
    return {name: fmean(values) if values else None, f"{name}_low": low, f"{name}_high": high}


def _rate(answer: Answer) -> float:
    return len(answer.token_ids) / answer.seconds


def _decode_ratios(pairs: Sequence[Pair]) -> tuple[list[float], list[int]]:
    """And of which batch each is. An answer of one token has none."""
    some = [pair for pair in pairs if pair.plain.steps and pair.drafted.steps]
    return [_decode_rate(pair.drafted) / _decode_rate(pair.plain) for pair in some], [pair.batch for pair in some]


def _decode_rate(answer: Answer) -> float:
    return (len(answer.token_ids) - 1) / (answer.seconds - answer.first_s)


def _per_position(drafts: Sequence[Drafts]) -> list[float]:
    depths = sum((d.depths for d in drafts), Counter[int]())
    accepted = sum((d.accepted_depths for d in drafts), Counter[int]())
    return [
        _total(accepted[d] for d in accepted if d >= depth) / _total(depths[d] for d in depths if d >= depth)
        for depth in range(1, max(depths, default=0) + 1)
    ]


def _shares(seconds: Sequence[Seconds]) -> dict[str, float | None]:
    draft, verify = sum(s.draft for s in seconds), sum(s.verify for s in seconds)
    whole = sum(s.step for s in seconds) + draft + verify
    return {"draft_share": _ratio(draft, whole), "verify_share": _ratio(verify, whole)}


def _total(counts: Iterable[int]) -> int:
    return sum(counts)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
