"""The devices of a cluster and what links them, from a YAML file; docs/planning.md has an example.

Nodes come in kinds, whose devices are alike. `within` links two devices of such a node, `between` is the way out of one
node and into another. Of several the slowest counts for all devices of a kind. Every error names the field.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import combinations_with_replacement, product
from pathlib import Path

import msgspec

from core.errors import ConfigError
from placement.bounded import Few
from placement.devices import device
from placement.layout import Link

_UNNAMED = "file"


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    pass


class NodeKind(_Strict, frozen=True):
    """`count` nodes with `devices` devices of the kind `device` each. `memory_gb` and `dollars_per_hour`: of one."""

    name: str
    device: str
    devices: Few
    memory_gb: float
    count: Few = 1
    dollars_per_hour: float | None = None


class Wire(_Strict, frozen=True):
    """`gb_per_s`: one way."""

    gb_per_s: float
    latency_us: float = 10.0
    within: str | None = None
    between: tuple[str, str] | None = None

    def link(self, token_bytes: int) -> Link:
        """As the simulator has it, for KV of so many bytes per token."""
        return Link(ms_per_token=token_bytes / (self.gb_per_s * 1e6), latency_ms=self.latency_us / 1e3)


class Topology(_Strict, frozen=True):
    """`source`: where it is from."""

    nodes: tuple[NodeKind, ...]
    links: tuple[Wire, ...] = ()
    source: str = _UNNAMED

    def __post_init__(self) -> None:
        _check_nodes(self.nodes)
        names = {node.name for node in self.nodes}
        for number, wire in enumerate(self.links):
            _check_wire(f"links[{number}]", wire, names)
        if missing := self._unlinked():
            told, written = ", none ".join(missing), next(iter(missing.values()))
            raise ConfigError(
                f"links: none {told}: KV would have no way there; add {len(missing)}, the first as "
                f"{{{written}, gb_per_s: 100}}",
                param="links",
            )

    @property
    def pools(self) -> dict[str, int]:
        """Devices by kind."""
        kinds = dict.fromkeys(node.device for node in self.nodes)
        return {kind: sum(node.count * node.devices for node in self.nodes if node.device == kind) for kind in kinds}

    @property
    def priced(self) -> bool:
        return all(node.dollars_per_hour is not None for node in self.nodes)

    def sizes(self, device: str) -> list[int]:
        """Devices of each node that has such."""
        return [node.devices for node in self.nodes if node.device == device for _ in range(node.count)]

    def most_in_a_node(self, device: str) -> int:
        """Devices of a kind in the largest node that has it."""
        return max(self.sizes(device))

    def node_of(self, device: str) -> NodeKind:
        """The one with the least memory, of those with such devices."""
        return min((node for node in self.nodes if node.device == device), key=lambda node: node.memory_gb)

    def inside(self, device: str) -> Wire | None:
        """The slowest link within a node that has such devices; None if each of these has one."""
        nodes = self._with(device)
        return _slowest(wire for wire in self.links if wire.within in nodes)

    def across(self, one: str, other: str) -> Wire | None:
        """The slowest between two nodes with devices of these kinds; None if there are no two."""
        ways = {frozenset(pair) for pair in product(self._with(one), self._with(other))}
        return _slowest(wire for wire in self.links if wire.between and frozenset(wire.between) in ways)

    def _with(self, device: str) -> list[str]:
        """Names of the nodes that have such devices."""
        return [node.name for node in self.nodes if node.device == device]

    def _unlinked(self) -> dict[str, str]:
        """Which links there have to be, and are not; and how a file has them."""
        within = {wire.within for wire in self.links}
        between = {frozenset(wire.between) for wire in self.links if wire.between}
        lacking = [node.name for node in self.nodes if node.devices > 1 and node.name not in within]
        missing = {f"within {name}": f"within: {name}" for name in lacking}
        for one, other in combinations_with_replacement(self.nodes, 2):
            needed = one is not other or one.count > 1
            if needed and frozenset((one.name, other.name)) not in between:
                missing[f"between {one.name} and {other.name}"] = f"between: [{one.name}, {other.name}]"
        return missing


def _slowest(wires: Iterable[Wire]) -> Wire | None:
    return min(wires, key=lambda wire: wire.gb_per_s, default=None)


NETWORK_GB_S = 50.0
"""One way, out of a node, where nobody says: 400 Gb/s."""


def of_device(kind: str, devices: int) -> Topology:
    """So many of a kind in the table, in full nodes as far as they go. Raises ConfigError for a kind that is not."""
    found = device(kind)
    whole, rest = divmod(devices, found.per_node)
    node = partial(NodeKind, device=kind, memory_gb=found.memory_gb)
    nodes = [node(name="full", devices=found.per_node, count=whole)] if whole else []
    nodes += [node(name="rest", devices=rest)] if rest else []
    links = [Wire(within=one.name, gb_per_s=found.link_gb_s) for one in nodes]
    names = [one.name for one in nodes]
    pairs = combinations_with_replacement(names, 2)
    links += [Wire(between=pair, gb_per_s=NETWORK_GB_S, latency_us=20.0) for pair in pairs]
    return Topology(nodes=tuple(nodes), links=tuple(links), source=f"{devices} x {kind}, links of the table of devices")


def read_topology(path: Path) -> Topology:
    """Raises ConfigError that names the file and the field."""
    try:
        found = msgspec.yaml.decode(path.read_bytes(), type=Topology)
        return msgspec.structs.replace(found, source=path.name) if found.source == _UNNAMED else found
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="topology") from error
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}", param="topology") from error


def to_yaml(topology: Topology) -> str:
    """As read_topology reads it, without what nobody knows."""
    builtins = msgspec.to_builtins(topology)
    lists = {key: [{k: v for k, v in item.items() if v is not None} for item in builtins[key]] for key in _LISTS}
    return msgspec.yaml.encode({"source": topology.source} | lists).decode()


_LISTS = ("nodes", "links")


def _check_nodes(nodes: tuple[NodeKind, ...]) -> None:
    if not nodes:
        raise ConfigError("nodes: there are none", param="nodes")
    names = [node.name for node in nodes]
    for number, node in enumerate(nodes):
        where = f"nodes[{number}]"
        if names.count(node.name) > 1:
            raise ConfigError(f"{where}.name: two kinds are named {node.name}; use count for several alike")
        for field in ("devices", "count"):
            if getattr(node, field) < 1:
                raise ConfigError(f"{where}.{field}: {getattr(node, field)} is not 1 or more", param="nodes")
        for field in ("memory_gb", "dollars_per_hour"):
            value = getattr(node, field)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{where}.{field}: {value} is not above 0", param="nodes")


def _check_wire(where: str, wire: Wire, names: set[str]) -> None:
    if (wire.within is None) == (wire.between is None):
        raise ConfigError(f"{where}: has either within, a node, or between, two nodes", param="links")
    for name in (wire.within,) if wire.between is None else wire.between:
        if name not in names:
            raise ConfigError(f"{where}: there is no node {name!r}; there are {', '.join(sorted(names))}")
    if not 0 < wire.gb_per_s < float("inf"):
        raise ConfigError(f"{where}.gb_per_s: {wire.gb_per_s} is not above 0", param="links")
    if not 0 <= wire.latency_us < float("inf"):
        raise ConfigError(f"{where}.latency_us: {wire.latency_us} is not 0 or more", param="links")
