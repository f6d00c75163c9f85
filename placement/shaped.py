"""What an arrangement of workers will do whose shapes may change, from a profile of each TP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from core.errors import ConfigError
from core.types import Role as WorkerRole
from placement.arranged import BySimulation, Simulated, simulated
from placement.arrangement import Arrangement
from placement.layout import Layout, Role
from placement.load import RoleLoad
from placement.outcome import Outcome, Targets
from placement.profile import Profile
from placement.seen import Seen
from placement.shapes import Limits
from placement.topology import Topology
from placement.worker_shape import WorkerShape


@dataclass(frozen=True)
class Shaped(BySimulation):
    """A Predictor that asks the simulator. `of` is a worker of each shape, whatever its role and its steps. Workers of
    an arrangement fill one node after the other, `per_node` devices each; `nodes`: None for as many as it takes."""

    of: Mapping[WorkerShape, Simulated]
    per_node: int = 1024
    nodes: int | None = None

    def longest_in(self, arrangement: Arrangement) -> int:
        return min(self.of[_named(shape)].longest for shape in arrangement.counts)

    def attained(self, outcome: Outcome) -> float:
        return self._any.attained(outcome)

    def as_seen(self, seen: Seen) -> Shaped:
        return replace(self, of={shape: worker.as_seen(seen) for shape, worker in self.of.items()})

    def prompt_ms(self, tokens: float, used: Arrangement) -> float:
        shape = used.prefill_shape if used.prefill else used.decode_shape
        return self.of[_named(shape)].prompt_ms(tokens, used)

    def token_ms(self, load: RoleLoad, workers: int, used: Arrangement) -> float:
        return self.of[_named(used.decode_shape)].token_ms(load, workers, used)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that workers of every shape can hold."""
        return min(worker.longest for worker in self.of.values())

    @property
    def overhead_ms(self) -> float:
        return self._any.overhead_ms

    def layout(self, arrangement: Arrangement) -> Layout:
        """Raises ConfigError for one that can't be."""
        workers = [
            (_named(arrangement.shape(role)), Role[role.name])
            for role in WorkerRole
            for _ in range(arrangement.of(role))
        ]
        return self.layout_of(workers, self._hosts([shape for shape, _ in workers]), arrangement.chunk_tokens)

    def layout_of(self, workers: Sequence[tuple[WorkerShape, Role]], hosts: list[int], chunk_tokens: int) -> Layout:
        """Workers on the nodes of these numbers."""
        on = [0] * (max(hosts, default=0) + 1)
        for (shape, _), host in zip(workers, hosts, strict=True):
            on[host] += shape.devices
        groups = tuple(
            self.of[shape].worker(role, chunk_tokens, host, crowded=on[host] > self.per_node)
            for (shape, role), host in zip(workers, hosts, strict=True)
        )
        return self._any.linked(groups, self._any.inside if len(on) == 1 else self._any.across)

    def places(self, devices: int) -> tuple[list[WorkerShape], list[int]]:
        """For as many workers of each shape as so many devices hold, and on which nodes they are; not all can be at
        work together."""
        shapes, hosts = [], []
        for shape in self.of:
            alike = [shape] * (devices // shape.devices)
            shapes += alike
            hosts += self._hosts(alike)
        return shapes, hosts

    def _hosts(self, shapes: Sequence[WorkerShape]) -> list[int]:
        """Nodes of workers, in their order. Raises ConfigError for more than there is room for, unless cores can be
        shared."""
        free, hosts = [self.per_node] * (self.nodes or 0), []
        for shape in shapes:
            host = next((number for number, left in enumerate(free) if left >= shape.devices), None)
            if host is None and self.nodes is None:
                host = len(free)
                free.append(self.per_node)
            if host is None and self._any.cores:
                host = max(range(len(free)), key=free.__getitem__)
            if host is None:
                wanted, there = sum(one.devices for one in shapes), self.per_node * len(free)
                raise ConfigError(
                    f"{len(shapes)} workers on {wanted} devices, and there are {len(free)} nodes with {there}",
                    param="workers",
                )
            free[host] -= shape.devices
            hosts.append(host)
        return hosts

    @property
    def _any(self) -> Simulated:
        """For what is the same of all."""
        return next(iter(self.of.values()))


def shaped(
    profiles: Iterable[Profile],
    shapes: Sequence[WorkerShape],
    topology: Topology,
    limits: Limits,
    targets: Targets,
    *,
    further_nodes: bool = False,
) -> Shaped:
    """As `simulated`, for each of the shapes. Raises ConfigError for one that no profile is of, for profiles of unlike
    workers, and for shapes for which the model is too large or a node too small."""
    by_tp: dict[int, Profile] = {}
    for profile in profiles:
        if profile.setting.tp in by_tp:
            raise ConfigError(f"two profiles are of TP {profile.setting.tp}: leave one out", param="profile")
        by_tp[profile.setting.tp] = profile
    _check_alike(list(by_tp.values()))
    workers: dict[WorkerShape, Simulated] = {}
    for shape in shapes:
        if (found := by_tp.get(shape.tp)) is None:
            known = ", ".join(map(str, sorted(by_tp)))
            raise ConfigError(
                f"shape {shape}: no profile is of TP {shape.tp}, only of {known}; make one with slipstream profile "
                f"--tensor-parallel-size {shape.tp}",
                param="profile",
            )
        try:
            workers[shape] = simulated(
                found, topology, replace(limits, stages=(shape.pp,)), targets, further_nodes=further_nodes
            )
        except ConfigError as error:
            raise ConfigError(f"shape {shape}: {error.message}", param="shapes") from error
    setting = next(iter(by_tp.values())).setting
    return Shaped(
        workers,
        per_node=max(1, topology.most_in_a_node(setting.device) // setting.threads),
        nodes=None if further_nodes else len(topology.sizes(setting.device)),
    )


def _check_alike(profiles: Sequence[Profile]) -> None:
    """But for their TP."""
    first, *others = profiles
    for other in others:
        pairs = {
            "model": (first.model.name, other.model.name),
            "fingerprint": (first.model.fingerprint, other.model.fingerprint),
            "quantization": (first.model.quantization, other.model.quantization),
            "device": (first.setting.device, other.setting.device),
            "threads": (first.setting.threads, other.setting.threads),
        }
        for name, (one, another) in pairs.items():
            if one != another:
                raise ConfigError(f"profiles of unlike workers: {name} {one} and {another}", param="profile")


def _named(shape: WorkerShape | None) -> WorkerShape:
    assert shape is not None, "arrangements of workers whose shapes may change name them"
    return shape
