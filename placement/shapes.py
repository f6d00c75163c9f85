"""From a topology and profiles to the space of layouts that a search looks through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations_with_replacement

from core.errors import ConfigError
from placement.candidates import Fabric, Option, Space
from placement.latency import Speculation
from placement.layout import Group, Link, Role
from placement.profile import Profile
from placement.topology import Topology, Wire

USABLE = 0.9
"""Of a device's memory; the rest is for activations."""
_STEP_TOKENS = 512
"""Whose hidden states go from stage to stage in a step, when that is reckoned."""
_ITEM_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """How a group runs: a stage takes profile.setting.devices devices."""

    profile: Profile
    stages: int
    speculation: Speculation | None

    @property
    def name(self) -> str:
        """Unique among those of a search."""
        setting = self.profile.setting
        parts = [f"{setting.device} TP{setting.tp}"]
        parts += [f"of {setting.threads} cores"] if setting.threads > 1 else []
        parts += [f"PP{self.stages}"] if self.stages > 1 else []
        parts += ["with drafts"] if self.speculation else []
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker is given, whatever its shape, and how many devices all take at the most. `kv_cache_bytes`: None is
    what the memory of a worker's devices leaves."""

    stages: tuple[int, ...] = (1,)
    chunk_tokens: tuple[int, ...] = (512, 2048)
    max_sequences: int = 64
    kv_cache_bytes: int | None = None
    handoff_min_tokens: int = 0
    overhead_ms: float = 0.0
    speculation: Speculation | None = None
    drafter: str | None = None
    """Without `speculation`: drafts of this one, as it was profiled."""
    only_drafts: bool = False
    """Shapes without drafts are left out, where there are some with."""
    learner_devices: Mapping[str, int] = field(default_factory=dict)
    devices: int | None = None


def shapes(profiles: Iterable[Profile], limits: Limits) -> list[Shape]:
    """Every profile with every number of stages, without speculation and with it. Raises ConfigError for two alike."""
    found = [
        Shape(profile, stages, way)
        for profile in profiles
        for stages in limits.stages
        for way in _ways(profile, limits)
    ]
    names = [shape.name for shape in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two profiles are of {', '.join(sorted(twice))}: leave one out", param="profile")
    return found


def _ways(profile: Profile, limits: Limits) -> Iterator[Speculation | None]:
    speculation = limits.speculation
    if speculation is None and limits.drafter is not None:
        speculation = profile.drafting_of(limits.drafter).speculation
    if speculation is None or not limits.only_drafts:
        yield None
    if speculation is not None:
        yield speculation


def space_of(topology: Topology, found: Sequence[Shape], limits: Limits, roles: frozenset[Role]) -> Space:
    """Shapes whose weights leave no room for KV are in Space.refused. Raises ConfigError for a topology without devices
    of their kinds, or if none of them fits."""
    options, refused = [], {}
    for shape in found:
        if shape.profile.setting.device not in topology.pools:
            raise ConfigError(f"there is no {shape.profile.setting.device} among the devices of the topology")
        kv_bytes = _kv_bytes(shape, topology, limits)
        if (why := _why_not(shape, topology, kv_bytes)) is not None:
            refused[shape.name] = why
        else:
            options.append(_option(shape, topology, limits, kv_bytes))
    if not options:
        raise ConfigError(
            "the model fits nowhere: " + "; ".join(f"{name}: {why}" for name, why in refused.items()), param="topology"
        )
    return Space(
        options=tuple(options),
        nodes=_nodes(topology, limits.devices),
        fabric=_fabric(topology, found[0].profile.model.kv_token_bytes),
        chunk_tokens=limits.chunk_tokens,
        handoff_min_tokens=limits.handoff_min_tokens,
        overhead_ms=limits.overhead_ms,
        learner_devices=limits.learner_devices,
        roles=roles,
        refused=refused,
    )


def most_kv_tokens(topology: Topology, found: Sequence[Shape], limits: Limits) -> int:
    """That all devices hold together, with groups of the shapes that hold most. Raises ConfigError as space_of."""
    space = space_of(topology, found, limits, frozenset(Role))
    most: dict[str, int] = {}
    for option in space.options:
        held = space.most_groups(option) * option.group.kv_tokens
        most[option.pool] = max(most.get(option.pool, 0), held)
    return sum(most.values())


def _option(shape: Shape, topology: Topology, limits: Limits, kv_bytes: int) -> Option:
    profile, setting = shape.profile, shape.profile.setting
    wire = topology.inside(setting.device) or topology.across(setting.device, setting.device)
    sent = _STEP_TOKENS * profile.model.hidden_size * _ITEM_BYTES
    group = Group(
        role=Role.BOTH,
        latency=profile.served(Role.BOTH),
        kv_tokens=kv_bytes // profile.model.kv_token_bytes,
        max_sequences=limits.max_sequences,
        stages=shape.stages,
        hop_ms=wire.latency_us / 1e3 + sent / (wire.gb_per_s * 1e6) if wire and shape.stages > 1 else 0.0,
        speculation=shape.speculation,
        contention=profile.contention,
    )
    price = topology.node_of(setting.device).dollars_per_hour
    devices = setting.devices * shape.stages
    around = profile.serving
    return Option(
        shape.name,
        setting.devices,
        group,
        (price or 1.0) * devices,
        setting.device,
        prefill_latency=profile.served(Role.PREFILL),
        decode_contention=profile.decode_contention,
        overhead_ms=around.overhead_ms if around else 0.0,
        handoff_ms=around.handoff_gap_ms if around else 0.0,
    )


def _kv_bytes(shape: Shape, topology: Topology, limits: Limits) -> int:
    """Of a group: on each device the weights and KV are that many times fewer."""
    left = int(_memory(shape, topology)) - shape.profile.model.weight_bytes
    return left if limits.kv_cache_bytes is None else min(left, limits.kv_cache_bytes)


def _memory(shape: Shape, topology: Topology) -> float:
    setting = shape.profile.setting
    return topology.node_of(setting.device).memory_gb * 1e9 * USABLE * setting.devices * shape.stages


def _why_not(shape: Shape, topology: Topology, kv_bytes: int) -> str | None:
    model, setting = shape.profile.model, shape.profile.setting
    if shape.stages > model.num_layers:
        return f"{shape.stages} stages, and {model.num_layers} layers"
    if setting.devices > (most := topology.most_in_a_node(setting.device)):
        return f"a stage takes {setting.devices} devices, and a node has {most}"
    if kv_bytes >= model.kv_token_bytes:
        return None
    weights, room = model.weight_bytes / 1e9, _memory(shape, topology) / 1e9
    devices = setting.devices * shape.stages
    given = f"{room:.3g} GB that {devices} device{'s' * (devices > 1)} can give"
    return f"{weights:.3g} GB of weights leave no room for KV in the {given}"


def _nodes(topology: Topology, devices: int | None) -> dict[str, tuple[int, ...]]:
    """Devices of each node by kind, the largest first, and no more than `devices`."""
    pools, total = topology.pools, sum(topology.pools.values())
    nodes = {kind: tuple(sorted(topology.sizes(kind), reverse=True)) for kind in pools}
    if devices is None:
        return nodes
    if devices > total:
        raise ConfigError(f"--devices {devices}: the topology has {total}", param="devices")
    if len(pools) > 1:
        raise ConfigError(f"--devices: the topology has {' and '.join(pools)}; set their count there", param="devices")
    ((kind, sizes),) = nodes.items()
    before = accumulate(sizes, initial=0)
    return {kind: tuple(min(each, devices - used) for each, used in zip(sizes, before, strict=False) if used < devices)}


def _fabric(topology: Topology, token_bytes: int) -> Fabric:
    """Of several links within nodes with devices of a kind, or between two such, the slowest counts. Where a kind has
    but one of the two, no KV moves over the other."""

    def link(*wires: Wire | None) -> Link:
        """The first that there is."""
        found = next((wire for wire in wires if wire is not None), None)
        return Link(0.0) if found is None else found.link(token_bytes)

    inside, across = topology.inside, topology.across
    return Fabric(
        {kind: link(inside(kind), across(kind, kind)) for kind in topology.pools},
        {
            frozenset(pair): link(across(*pair), inside(pair[0]))
            for pair in combinations_with_replacement(topology.pools, 2)
        },
    )
