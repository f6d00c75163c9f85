"""What an arrangement of the workers of a cluster will do, from the profile of one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

from core.errors import ConfigError
from placement.arrangement import Arrangement
from placement.latency import Contention, Speculation, StepLatency
from placement.layout import NO_SPECULATION, Group, Layout, Link, Role
from placement.load import RoleLoad
from placement.native import serve
from placement.outcome import Outcome, Targets
from placement.profile import Profile
from placement.seen import Seen
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
        """The share that meets all targets at `rate` requests/s, of the requests that a worker can hold; 0 if it can
        hold none."""
        ...

    def outcome(self, arrangement: Arrangement, workload: Workload, rate: float) -> Outcome | None:
        """Of each request, at `rate` requests/s; None if a worker could not hold one, or the workers can't be used
        so."""
        ...

    def as_seen(self, seen: Seen) -> Predictor:
        """The same for workers that were found to be not quite as their profile says."""
        ...

    def prompt_ms(self, tokens: float, used: Arrangement) -> float:
        """That a worker takes for so many tokens of prompts, where workers are used so."""
        ...

    def token_ms(self, load: RoleLoad, workers: int, used: Arrangement) -> float:
        """Per output token, if so many workers had what those of a role have now; inf if they can't hold it."""
        ...


class BySimulation(ABC):
    """What a Predictor says by having the simulator serve the layout of an arrangement."""

    @abstractmethod
    def layout(self, arrangement: Arrangement) -> Layout:
        """Raises ConfigError for one that can't be."""

    @abstractmethod
    def longest_in(self, arrangement: Arrangement) -> int:
        """Tokens of the longest request that all of its workers can hold."""

    @abstractmethod
    def attained(self, outcome: Outcome) -> float:
        """The share that met the targets."""

    def why_not(self, arrangement: Arrangement) -> str | None:
        try:
            self.layout(arrangement)
        except ConfigError as error:
            return error.message
        return None

    def attainment(self, arrangement: Arrangement, workload: Workload, rate: float) -> float:
        try:
            fitting = workload.no_longer_than(self.longest_in(arrangement))
        except ConfigError:
            return 0.0
        return self.attained(serve(self.layout(arrangement), fitting, rate).outcome)

    def outcome(self, arrangement: Arrangement, workload: Workload, rate: float) -> Outcome | None:
        try:
            return serve(self.layout(arrangement), workload, rate).outcome
        except ConfigError:
            return None


@dataclass(frozen=True)
class Simulated(BySimulation):
    """A Predictor that asks the simulator. `group` is a worker, whatever its role and its steps. `most_tokens`: longest
    sequence of the model. `nodes` have room for `workers_per_node` each, None for as many nodes as it takes; further
    workers share the cores of these, of which one computes on the share `cores`, or can't be if that is 0."""

    group: Group
    targets: Targets
    most_tokens: int
    prefill_latency: StepLatency | None = None
    """In the role of prefill, where it is another."""
    decode_contention: Contention | None = None
    """In the role of decode, where it is another."""
    inside: Link = FREE
    across: Link = FREE
    """Over which KV leaves a worker, for one of its node, and beyond."""
    workers_per_node: int = 1024
    nodes: int | None = None
    cores: float = 0.0
    handoff_min_tokens: int = 0
    overhead_ms: float = 0.0

    def longest_in(self, arrangement: Arrangement) -> int:  # noqa: ARG002 - any of them
        return self.longest

    def attained(self, outcome: Outcome) -> float:
        return outcome.attainment(self.targets)

    def as_seen(self, seen: Seen) -> Simulated:
        latency = self.group.latency.times(seen.prompts, seen.decodes)
        prefill = None if self.prefill_latency is None else self.prefill_latency.times(seen.prompts, seen.decodes)
        drafts = None if self.group.speculation is None else seen.of_drafts(self.group.speculation)
        return replace(self, group=replace(self.group, latency=latency, speculation=drafts), prefill_latency=prefill)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that a worker can hold, in any role."""
        held = int(self.group.kv_tokens // self.group.stages - self._speculation.acceptance_length)
        return min(self.most_tokens, held)

    def prompt_ms(self, tokens: float, used: Arrangement) -> float:
        a, b, _ = (self.prefill_latency or self.group.latency).prompts(used.chunk_tokens)
        return (a / used.chunk_tokens + b) * tokens

    def token_ms(self, load: RoleLoad, workers: int, used: Arrangement) -> float:  # noqa: ARG002 - any of them
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
        """A worker for each of the roles; they fill one node after the other. Any may come to send to any. Raises
        ConfigError for more than can be."""
        each = self._to_a_node(len(roles))
        if each > self.workers_per_node and not self.cores:
            places = (self.nodes or 0) * self.workers_per_node
            raise ConfigError(f"{len(roles)} workers, and there are devices for {places}", param="workers")
        crowded = each > self.workers_per_node
        groups = tuple(
            self.worker(role, chunk_tokens, number // each, crowded=crowded) for number, role in enumerate(roles)
        )
        return self.linked(groups, self.inside if len(roles) <= each else self.across)

    def linked(self, groups: tuple[Group, ...], link: Link) -> Layout:
        """Workers, each of which sends over such a link of its own."""
        pairs: Mapping[tuple[int, int], int] = {
            (giver, taker): giver for giver, taker in product(range(len(groups)), repeat=2) if giver != taker
        }
        return Layout(groups, (link,) * len(groups), pairs, self.handoff_min_tokens, overhead_ms=self.overhead_ms)

    def on_a_node(self, workers: int) -> int:
        """At the most, of so many."""
        return min(workers, self._to_a_node(workers))

    def _to_a_node(self, workers: int) -> int:
        """As many as there is room for, or more if there are no further nodes."""
        return max(self.workers_per_node, -(-workers // (self.nodes or workers or 1)))

    def worker(self, role: Role, chunk_tokens: int, host: int, *, crowded: bool) -> Group:
        """`crowded`: together the workers of the host want more cores than it has."""
        return replace(
            self.group.in_role(role, self.prefill_latency, self.decode_contention),
            chunk_tokens=chunk_tokens,
            host=host,
            speculation=self._with_room(chunk_tokens),
            cores=self.cores if crowded else 0.0,
        )

    def _with_room(self, chunk_tokens: int) -> Speculation | None:
        """Of a full batch so many tokens are drafted as steps of this length have room for beside a prompt."""
        speculation = self.group.speculation
        if speculation is None:
            return None
        seats = max(1, self.group.max_sequences // self.group.stages)
        most = max(1, (chunk_tokens - 1) // seats)
        accepted = min(speculation.acceptance_length, most)
        return replace(speculation, acceptance_length=accepted, rows=min(speculation.rows, most))

    @property
    def _speculation(self) -> Speculation:
        return self.group.speculation or NO_SPECULATION


def simulated(
    profile: Profile, topology: Topology, limits: Limits, targets: Targets, *, further_nodes: bool = False
) -> Simulated:
    """Workers as the profile has them, within the limits, and with drafts if these have some, on the nodes of the
    topology, or if `further_nodes` on as many like these as it takes. Raises ConfigError if the model does not fit."""
    space = space_of(topology, shapes([profile], limits), limits, frozenset(Role))
    option = space.options[-1]  # with drafts, if there are any
    inside, across = (
        replace(link, latency_ms=link.latency_ms + option.handoff_ms)
        for link in (space.fabric.inside[option.pool], space.fabric.across[frozenset((option.pool,))])
    )
    devices = topology.most_in_a_node(option.pool)
    return Simulated(
        group=option.group,
        targets=targets,
        most_tokens=profile.model.max_tokens,
        prefill_latency=option.prefill_latency,
        decode_contention=option.decode_contention,
        inside=inside,
        across=across,
        workers_per_node=max(1, devices // option.devices),
        nodes=None if further_nodes else len(topology.sizes(option.pool)),
        cores=option.devices / devices if option.pool == "cpu" else 0.0,
        handoff_min_tokens=limits.handoff_min_tokens,
        overhead_ms=limits.overhead_ms + option.overhead_ms,
    )
