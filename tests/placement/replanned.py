"""A cluster that is not there: traffic is told to a replanner by the second, and what workers can do is arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from core.served import Served
from core.types import Role
from placement.arrangement import Arrangement
from placement.goodput import Goal
from placement.load import Load, RoleLoad
from placement.outcome import Outcome, Targets
from placement.replanner import Change, Replanner, ReplanSettings
from placement.seen import Seen
from placement.workload import Workload
from tests.placement.served import served

TARGETS = Targets(ttft_ms=1000.0, tpot_ms=50.0)


class Counted:
    """A worker computes 1000 tokens of prompts in a second, or 100 of outputs; one that does both is half of either.
    Attainment is the share of the work that there are workers for."""

    def why_not(self, arrangement: Arrangement) -> str | None:
        return None if arrangement.decode + arrangement.both else "nobody decodes"

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        prompts = (arrangement.prefill + arrangement.both / 2) * 1000 / (rate * workload.prompt_tokens.mean())
        outputs = (arrangement.decode + arrangement.both / 2) * 100 / (rate * workload.output_tokens.mean())
        return float(min(1.0, prompts, outputs))

    def outcome(self, arrangement: Arrangement, workload: Workload, rate: float) -> Outcome | None:
        return None

    def as_seen(self, seen: Seen) -> Counted:
        return self

    def prompt_ms(self, tokens: float, used: Arrangement) -> float:
        return tokens

    def token_ms(self, load: RoleLoad, workers: int, used: Arrangement) -> float:
        return 10.0 * load.running / workers if workers else float("inf")


def settings(**changes: object) -> ReplanSettings:
    return ReplanSettings(**{"goal": Goal(TARGETS), "chunk_tokens": (512,)} | changes)  # type: ignore[arg-type]


@dataclass
class Fed:
    """`rate` requests/s at a time, which end as soon as they come, of `prompt` and `output` tokens on average, with the
    times of `like`. Changes are adopted at once, unless `advisory`."""

    replanner: Replanner
    rate: Callable[[float], float] = lambda _: 10.0
    prompt: Callable[[float], float] = lambda _: 100.0
    output: Callable[[float], float] = lambda _: 10.0
    like: Served = field(default_factory=served)
    busy: RoleLoad = field(default_factory=RoleLoad)
    advisory: bool = False
    now: float = 0.0
    changes: list[tuple[float, Change]] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run(self, seconds: float, step: float = 1.0) -> list[tuple[float, Change]]:
        """The changes of this time."""
        before, end = len(self.changes), self.now + seconds
        while self.now < end:
            self.now += step
            self.replanner.record([self._one() for _ in range(self.rng.poisson(self.rate(self.now) * step))])
            change = self.replanner.decide(self.now, self.load())
            if change is not None:
                self.changes.append((self.now, change))
                if not self.advisory:
                    self.replanner.adopt(change.to, self.now)
        return self.changes[before:]

    def load(self, **there: int) -> Load:
        counts = {role: there.get(role.value, self.replanner.arrangement.of(role)) for role in Role}
        share = 1 / sum(counts.values())
        roles = {
            role: RoleLoad(
                workers=count,
                waiting_requests=round(self.busy.waiting_requests * share * count),
                waiting_prompt_tokens=round(self.busy.waiting_prompt_tokens * share * count),
                running=round(self.busy.running * share * count),
            )
            for role, count in counts.items()
        }
        return Load(roles=roles, in_flight=0)

    def _one(self) -> Served:
        prompt, output = (1 + self.rng.poisson(of(self.now) - 1) for of in (self.prompt, self.output))
        return served(0.0, prompt, output, self.like.ttft_ms, self.like.tpot_ms)
