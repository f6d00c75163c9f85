"""How good a head is on texts that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speculation.heads.kinds import Head
from speculation.heads.lesson import Lesson


@dataclass(frozen=True, slots=True)
class Quality:
    """Of its likeliest chains, against what the target went on to say."""

    alpha: float
    """How often the first token of a chain is accepted."""
    tau: float
    """Tokens of a round, the target's own included."""
    per_depth: tuple[float, ...]
    """How often a token is accepted once those before it are."""
    rows: int
    """Of the texts, at each of which a chain began for `alpha` and `per_depth`."""

    def __str__(self) -> str:
        return f"alpha {self.alpha:.3f}, tau {self.tau:.3f}"


@torch.no_grad()
def measure(
    head: Head, lessons: Sequence[Lesson], embedding: torch.Tensor, token_ids: torch.Tensor, depth: int
) -> Quality:
    """Of chains of `depth` tokens. `token_ids` [draft vocabulary]: which token each id of the head's is."""
    matches, rounds, emitted = [], 0, 0
    for lesson in lessons:
        right = torch.ones(len(lesson.rows), dtype=torch.bool)
        found = []
        for step, logits in enumerate(head.rollout(lesson, embedding, depth)):
            right = right & lesson.there(step) & (token_ids[logits.argmax(-1)] == lesson.next_token(step))
            found.append(right)
        matches.append(torch.stack(found, 1))
        for lengths in _by_passage(matches[-1].sum(1), lesson):
            rounds, emitted = rounds + _rounds(lengths), emitted + len(lengths)
    right = torch.cat(matches)
    reached = torch.cat((torch.ones_like(right[:, :1]), right[:, :-1]), 1).sum(0)
    per_depth = (right.sum(0) / reached.clamp(min=1)).tolist()
    return Quality(per_depth[0], emitted / max(1, rounds), tuple(per_depth), len(right))


def _by_passage(values: torch.Tensor, lesson: Lesson) -> list[list[int]]:
    _, counts = torch.unique_consecutive(lesson.ends, return_counts=True)
    return [part.tolist() for part in torch.split(values, counts.tolist())]


def _rounds(lengths: Sequence[int]) -> int:
    """It takes to get through a text if at place i a chain of which lengths[i] are accepted would be drafted."""
    place = rounds = 0
    while place < len(lengths):
        place += 1 + lengths[place]
        rounds += 1
    return rounds
