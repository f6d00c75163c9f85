"""What an arrangement of the workers of a cluster will do, from the profile of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

from core.errors import ConfigError
from placement.arrangement import Arrangement
from placement.latency import Speculation, StepLatency
from placement.layout import NO_SPECULATION, Group, Layout, Link, Role
from placement.load import RoleLoad
from placement.native import serve
from placement.outcome import Targets
from placement.profile import Profile
from placement.shapes import Limits, shapes, space_of
from placement.topology import Topology
from placement.workload import Workload

FREE = Link(0.0)


class Predictor(Protocol):
    """What replanning asks before it changes anything."""

    def why_not(self, arrangement: Arrangement) -> str | None:
        """Why the workers can't be used so; None if they can."""
        ...

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        """The share that meets both targets at `rate` requests/s, of the requests that a worker can hold; 0 if it can
        hold none."""
        ...

    def prompt_ms(self, tokens: float, chunk_tokens: int) -> float:
        """That a worker takes for so many tokens of prompts."""
        ...

    def token_ms(self, load: RoleLoad, workers: int) -> float:
        """Per output token, if so many workers had what those of a role have now; inf if they can't hold it."""
        ...


@dataclass(frozen=True)
class Simulated:
    """A Predictor that asks the simulator. `group` is a worker, whatever its role and its steps. `most_tokens`: longest
    sequence of the model."""

    group: Group
    targets: Targets
    most_tokens: int
    prefill_latency: StepLatency | None = None
    """In the role of prefill, where it is another."""
    inside: Link = FREE
    across: Link = FREE
    """Over which KV leaves a worker, for one of its node, and beyond."""
    workers_per_node: int = 1024
    handoff_min_tokens: int = 0
    overhead_ms: float = 0.0

    def why_not(self, arrangement: Arrangement) -> str | None:
        try:
            self.layout(arrangement)
        except ConfigError as error:
            return error.message
        return None

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        try:
            fitting = workload.no_longer_than(self.longest)
        except ConfigError:
            return 0.0
        return serve(self.layout(arrangement), fitting, rate).outcome.attainment(self.targets)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that a worker can hold, in any role."""
        held = int(self.group.kv_tokens // self.group.stages - self._speculation.acceptance_length)
        return min(self.most_tokens, held)

    def prompt_ms(self, tokens: float, chunk_tokens: int) -> float:
        a, b, _ = (self.prefill_latency or self.group.latency).prompt
        return (a / chunk_tokens + b) * tokens

    def token_ms(self, load: RoleLoad, workers: int) -> float:
        held = max(0, load.workers * self.group.kv_tokens - load.free_kv_tokens)
        if load.running > workers * self.group.max_sequences or held > workers * self.group.kv_tokens:
            return float("inf")
        if not load.running:
            return 0.0
        sequences, context = max(1, round(load.running / workers)), held / workers
        step = self.group.latency.step_ms(0, 0.0, context, sequences, sequences * self._speculation.rows)
        drafting = self._speculation.draft_ms + self._speculation.draft_sequence_ms * sequences
        return (step + drafting) / self._speculation.acceptance_length

    def layout(self, arrangement: Arrangement) -> Layout:
        """Each prefill worker sends over a link of its own. Raises ConfigError for one that can't be."""
        counts = {Role.PREFILL: arrangement.prefill, Role.DECODE: arrangement.decode, Role.BOTH: arrangement.both}
        roles = [role for role, count in counts.items() for _ in range(count)]
        return self.layout_of(roles, arrangement.chunk_tokens)

    def layout_of(self, roles: list[Role], chunk_tokens: int) -> Layout:
        """A worker for each of the roles; they fill one node after the other. Any may come to send to any."""
        groups = tuple(self._worker(number, role, chunk_tokens) for number, role in enumerate(roles))
        link = self.inside if len(roles) <= self.workers_per_node else self.across
        pairs: Mapping[tuple[int, int], int] = {
            (giver, taker): giver for giver, taker in product(range(len(roles)), repeat=2) if giver != taker
        }
        return Layout(groups, (link,) * len(roles), pairs, self.handoff_min_tokens, overhead_ms=self.overhead_ms)

    def _worker(self, number: int, role: Role, chunk_tokens: int) -> Group:
        latency = self.prefill_latency if role is Role.PREFILL else None
        host = number // self.workers_per_node
        return replace(
            self.group, role=role, chunk_tokens=chunk_tokens, host=host, latency=latency or self.group.latency
        )

    @property
    def _speculation(self) -> Speculation:
        return self.group.speculation or NO_SPECULATION


def simulated(profile: Profile, topology: Topology, limits: Limits, targets: Targets) -> Simulated:
    """Workers as the profile has them, within the limits. Raises ConfigError if the model does not fit one."""
    space = space_of(topology, shapes([profile], limits), limits, frozenset(Role))
    option = space.options[0]
    inside, across = (
        replace(link, latency_ms=link.latency_ms + option.handoff_ms)
        for link in (space.fabric.inside, space.fabric.across)
    )
    return Simulated(
        group=option.group,
        targets=targets,
        most_tokens=profile.model.max_tokens,
        prefill_latency=option.prefill_latency,
        inside=inside,
        across=across,
        workers_per_node=max(1, space.devices_per_node[option.pool] // option.devices),
        handoff_min_tokens=limits.handoff_min_tokens,
        overhead_ms=limits.overhead_ms + option.overhead_ms,
    )
