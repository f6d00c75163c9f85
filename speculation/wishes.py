"""What a request has to say about speculation."""

from __future__ import annotations

from dataclasses import dataclass

from core.types import Request, SpeculationWish
from engine.sampler import GREEDY_TEMPERATURE

_NONE = SpeculationWish()


@dataclass(frozen=True, slots=True)
class Wishes:
    kind: str
    """Requests of one kind are taken to be alike by controllers."""
    drafter: str = ""
    """By name; empty leaves it to the controller."""
    rule: str = ""
    """By name; empty is the worker's."""
    limit: int | None = None
    """Draft tokens per step, 0 for none; None leaves it to the worker."""

    @staticmethod
    def of(request: Request) -> Wishes:
        wish, sampling = request.speculation or _NONE, request.sampling
        drawn = "greedy" if sampling.temperature < GREEDY_TEMPERATURE else "sampled"
        shape = "structured" if sampling.grammar is not None else "text"
        return Wishes(f"{request.adapter}/{drawn}/{shape}/{wish.rule}", wish.drafter, wish.rule, wish.budget)

    def budget(self, most: int) -> int:
        return most if self.limit is None else min(self.limit, most)
