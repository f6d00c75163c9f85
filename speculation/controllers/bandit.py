"""Goodput's budgets, and for each class of requests the drafter that makes it fastest.

Drafters are the arms of a bandit, one for each class: discounted UCB (Garivier and Moulines, arXiv:0805.3415) on the
speed-up over a plain step that its requests have had, which is 1 where a drafter is not worth being asked. An arm is
kept for EPISODE steps, for a drafter with a cache of its own first has to read what it has missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from speculation.controllers.base import Limits
from speculation.controllers.goodput import Goodput
from speculation.rounds import Budgets, Load, Tally, Timing

EPISODE = 32
"""Steps."""
FORGETTING = 0.98
"""Weight of an episode relative to the next."""
CURIOSITY = 0.3
"""In speed-up: the more, the more often the worse arms are played."""
MAX_CLASSES = 64
"""Requests of further ones are taken to be of one."""


@dataclass(slots=True)
class Arms:
    """Of one class."""

    plays: list[float]
    """Weighted episodes of each."""
    rewards: list[float]
    """Weighted sums of their mean speed-ups."""
    playing: int = 0
    steps: int = 0
    speedup: float = 0.0
    """Sum over the steps of the episode."""

    @classmethod
    def of(cls, count: int) -> Arms:
        return cls([0.0] * count, [0.0] * count)

    def record(self, speedup: float) -> None:
        self.steps += 1
        self.speedup += speedup
        if self.steps == EPISODE:
            self.plays = [FORGETTING * plays for plays in self.plays]
            self.rewards = [FORGETTING * rewards for rewards in self.rewards]
            self.plays[self.playing] += 1.0
            self.rewards[self.playing] += self.speedup / EPISODE
            self.steps, self.speedup, self.playing = 0, 0.0, self._best()

    def _best(self) -> int:
        """The one with the highest upper bound, the first that was never played before all others."""
        total = math.log(max(sum(self.plays), math.e))

        def bound(arm: int) -> float:
            plays = self.plays[arm]
            return self.rewards[arm] / plays + CURIOSITY * math.sqrt(total / plays) if plays else math.inf

        return max(range(len(self.plays)), key=bound)


class Bandit(Goodput):
    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._arms: dict[str, Arms] = {}

    def preferred(self, load: Load) -> list[str]:
        playing = {name: self.limits.drafters[self._of_class(name).playing] for name in set(load.classes)}
        return load.drafters([playing[name] for name in load.classes])

    def record(self, load: Load, budgets: Budgets, tally: Tally, timing: Timing) -> None:
        super().record(load, budgets, tally, timing)
        if not self._time.known:
            return
        plain, classes = self._time.plain(load), np.array(load.classes)
        played = np.array([not asked for asked in load.drafters([""] * len(classes))])  # of others arms learn nothing
        for name in {*classes[played].tolist()}:
            arms = self._of_class(name)
            for _ in range(timing.rested):
                arms.record(1.0)
            arms.record(float(tally.emitted[played & (classes == name)].mean()) * plain / timing.seconds)

    def _of_class(self, name: str) -> Arms:
        if name not in self._arms and len(self._arms) >= MAX_CLASSES:
            name = ""
        return self._arms.setdefault(name, Arms.of(len(self.limits.drafters)))


def build(limits: Limits) -> Bandit:
    return Bandit(limits)
