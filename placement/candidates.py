"""The layouts that a search looks at: groups of which shape, how many of each role, and how close together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, product, takewhile
from typing import Literal

from core.errors import ConfigError
from placement.latency import Contention, StepLatency
from placement.layout import Group, Layout, Link, Role
from placement.room import most_beside, shared_out

Objective = Literal["per-device", "per-dollar", "total"]
"""What goodput is divided by."""


@dataclass(frozen=True)
class Option:
    """A way to run the model on one group of devices of a pool. `group` has its latency, memory and speculation; roles
    and chunks are what is searched. `dollars_per_hour` is for all its devices."""

    name: str
    tp: int
    group: Group
    dollars_per_hour: float = 1.0
    pool: str = "default"
    prefill_latency: StepLatency | None = None
    """In the role of prefill, where it is another."""
    decode_contention: Contention | None = None
    """In the role of decode, where it is another."""
    overhead_ms: float = 0.0
    handoff_ms: float = 0.0
    """As measured where it serves: around its groups, and of a hand-off beyond the link."""

    @property
    def devices(self) -> int:
        return self.tp * self.group.stages


@dataclass(frozen=True)
class Fabric:
    """Links of KV: one for each prefill group to the others of its node, by the pool of these, and one out of each
    node, by the pools of who gives and who takes."""

    inside: Mapping[str, Link]
    across: Mapping[frozenset[str], Link]


@dataclass(frozen=True)
class Space:
    """`nodes`: devices of each, by their kind, the largest first; the learner has `learner_devices` of the last ones.
    `refused`: shapes that cannot run, and why, to be told with the result."""

    options: tuple[Option, ...]
    nodes: Mapping[str, tuple[int, ...]]
    fabric: Fabric
    chunk_tokens: tuple[int, ...] = (2048,)
    handoff_min_tokens: int = 0
    overhead_ms: float = 0.0
    learner_devices: Mapping[str, int] = field(default_factory=dict)
    roles: frozenset[Role] = frozenset(Role)
    refused: Mapping[str, str] = field(default_factory=dict)
    _free: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for pool in {option.pool for option in self.options} | set(self.learner_devices):
            if self.budget(pool) < 1:
                raise ConfigError(
                    f"the pool {pool} has {sum(self.nodes.get(pool, ()))} devices, of which the learner has "
                    f"{self.learner_devices.get(pool, 0)}: none is left to serve with",
                    param="pools",
                )
        if not self.chunk_tokens:
            raise ConfigError("chunk_tokens has at least one size to try", param="chunk_tokens")

    def why_not(self, option: Option) -> str | None:
        """Why no group of this option can be placed; None if one can."""
        if option.tp > (most := self.largest(option.pool)):
            return f"{option.tp} tensor parallel ranks, but {most} devices in a node"
        if not self.most_groups(option):
            left = self.budget(option.pool)
            return f"needs {option.devices} devices, and the pool {option.pool} has {left} to serve with"
        return None

    def free(self, pool: str) -> list[int]:
        """Devices to serve with, of each node that has some."""
        if pool not in self._free:
            budget, nodes = self.budget(pool), self.nodes.get(pool, ())
            before = accumulate(nodes, initial=0)
            left = (min(devices, budget - used) for devices, used in zip(nodes, before, strict=False))
            self._free[pool] = [devices for devices in left if devices > 0]
        return self._free[pool]

    def budget(self, pool: str) -> int:
        return sum(self.nodes.get(pool, ())) - self.learner_devices.get(pool, 0)

    def largest(self, pool: str) -> int:
        """Devices of a node to serve with, at the most."""
        return max(self.free(pool))

    def unit(self, option: Option) -> tuple[int, int]:
        """Devices that have to be on one node, and how often a group has them: only a group that is larger than any
        node has its stages on several."""
        return (option.devices, 1) if option.devices <= self.largest(option.pool) else (option.tp, option.group.stages)

    def most_groups(self, option: Option) -> int:
        devices, times = self.unit(option)
        return sum(each // devices for each in self.free(option.pool)) // times

    def hosts(self, *wanted: tuple[Option, int]) -> list[list[int]]:
        """The nodes of so many groups of one or two options of a pool, as packing.py has them; of a group that is
        larger than a node that where it begins."""
        (one, ones), (other, others) = (*wanted, (wanted[0][0], 0))[:2]
        first = sum(len(self.nodes[pool]) for pool in takewhile(lambda pool: pool != one.pool, self.nodes))
        given = shared_out(self.free(one.pool), one.devices, other.devices, ones, others)
        if given is not None:
            return [[first + node for node, both in enumerate(given) for _ in range(both[kind])] for kind in (0, 1)]
        begins = accumulate([one.devices] * ones + [other.devices] * others, initial=0)
        found = [first + before // self.largest(one.pool) for before in begins]
        return [found[:ones], found[ones:-1]]


@dataclass(frozen=True)
class Candidate:
    """`prefills` and `decodes` groups on each of `nodes` nodes if `near`; else in all, anywhere. Of one that does not
    disaggregate, `prefill` is None and `decode` does both."""

    space: Space
    prefill: Option | None
    decode: Option
    prefills: int
    decodes: int
    chunk_tokens: int
    near: bool = False
    nodes: int = 1

    @property
    def stages(self) -> int:
        """Of all groups."""
        prefill = self.prefill.group.stages * self.prefills if self.prefill else 0
        return self.nodes * (prefill + self.decode.group.stages * self.decodes)

    @property
    def devices(self) -> int:
        prefill = self.prefill.devices * self.prefills if self.prefill else 0
        return self.nodes * (prefill + self.decode.devices * self.decodes)

    @property
    def dollars_per_hour(self) -> float:
        prefill = self.prefill.dollars_per_hour * self.prefills if self.prefill else 0.0
        return self.nodes * (prefill + self.decode.dollars_per_hour * self.decodes)

    @property
    def totals(self) -> tuple[int, int]:
        """Groups that prefill only, and those that decode, on all nodes."""
        return self.nodes * self.prefills, self.nodes * self.decodes

    def cost(self, objective: Objective) -> float:
        return {"per-device": float(self.devices), "per-dollar": self.dollars_per_hour, "total": 1.0}[objective]

    @property
    def kinds(self) -> tuple[object, ...]:
        """Equal for candidates that differ in how many groups they have only."""
        return self.prefill and self.prefill.name, self.decode.name, self.chunk_tokens

    @property
    def kind_name(self) -> str:
        decode = f"{self.decode.name}, chunks of {self.chunk_tokens}"
        return f"{self.prefill.name} + {decode}" if self.prefill else decode

    @property
    def name(self) -> str:
        """As a person would say it: `4 prefill TP2 + 2 decode TP4, near`."""
        if self.prefill is None:
            return f"{self.decodes} x {self.decode.name}, chunks of {self.chunk_tokens}"
        counts = self.totals
        nodes = f"each of {self.nodes} nodes" if self.nodes > 1 else "a node"
        place = f"together on {nodes}" if self.near else "anywhere"
        roles = f"{counts[0]} prefill {self.prefill.name} + {counts[1]} decode {self.decode.name}"
        return f"{roles}, {place}, chunks of {self.chunk_tokens}"

    def most_rate(self, most_each: Callable[[Option, Role, int], float], kv_tokens: float) -> float:
        """The rate of all, given that of a group by option, role and chunk: prompts need the prefill groups, outputs
        the decode groups, and `kv_tokens` per request the links."""
        if self.prefill is None:
            return self.decodes * most_each(self.decode, Role.BOTH, self.chunk_tokens)
        prefill = self.prefills * most_each(self.prefill, Role.PREFILL, self.chunk_tokens)
        decode = self.decodes * most_each(self.decode, Role.DECODE, self.chunk_tokens)
        busy_ms = kv_tokens * self.link.ms_per_token
        return min(self.nodes * min(prefill, decode), self.num_links * 1000.0 / busy_ms if busy_ms else float("inf"))

    @cached_property
    def layout(self) -> Layout:
        if self.prefill is None:
            alone = self.space.hosts((self.decode, self.decodes))[0]
            return Layout((*self._groups(self.decode, Role.BOTH, alone),), overhead_ms=self.overhead_ms)
        hosts = self._hosts(self.prefill)
        prefills = self._groups(self.prefill, Role.PREFILL, hosts[0])
        decodes = self._groups(self.decode, Role.DECODE, hosts[1])
        takers, links = range(len(prefills), len(prefills) + len(decodes)), self.num_links
        paths = {(giver, taker): giver % links for giver, taker in product(range(len(prefills)), takers)}
        return Layout(
            (*prefills, *decodes),
            (self.link,) * links,
            paths,
            self.space.handoff_min_tokens,
            overhead_ms=self.overhead_ms,
        )

    @property
    def overhead_ms(self) -> float:
        return self.space.overhead_ms + self.decode.overhead_ms

    @property
    def link(self) -> Link:
        """Over which the KV of a prefill group leaves."""
        taker, fabric = self.decode.pool, self.space.fabric
        giver = self.prefill.pool if self.prefill else taker
        link = fabric.inside[taker] if self.near else fabric.across[frozenset((giver, taker))]
        more = self.prefill.handoff_ms if self.prefill else 0.0
        return replace(link, latency_ms=link.latency_ms + more) if more else link

    @property
    def num_links(self) -> int:
        """Near, each prefill group has a link of its own; else one out of the node it is on. They are spread over the
        nodes that the layout takes in their pool."""
        if self.near:
            return self.prefills * self.nodes
        if self.prefill is None:
            return 0
        mine = self.devices if self.prefill.pool == self.decode.pool else self.prefills * self.prefill.devices
        return min(self.prefills, -(-mine // self.space.largest(self.prefill.pool)))

    def _hosts(self, prefill: Option) -> list[list[int]]:
        """Of prefill groups and of those that decode."""
        if self.near:
            return [[node for node in range(self.nodes) for _ in range(each)] for each in (self.prefills, self.decodes)]
        one, other = (prefill, self.prefills), (self.decode, self.decodes)
        if prefill.pool == self.decode.pool:
            return self.space.hosts(one, other)
        return [self.space.hosts(one)[0], self.space.hosts(other)[0]]

    def _groups(self, option: Option, role: Role, hosts: list[int]) -> list[Group]:
        on = {host: self._group(option, role, host) for host in set(hosts)}
        return [on[host] for host in hosts]

    def _group(self, option: Option, role: Role, host: int) -> Group:
        island = host if self.near else 0
        group = option.group.in_role(role, option.prefill_latency, option.decode_contention)
        return replace(group, chunk_tokens=self.chunk_tokens, island=island, host=host)


def candidates(space: Space) -> Iterator[Candidate]:
    """All layouts of the space on its devices, or fewer. A group's tensor parallel ranks are in one node."""
    options = [option for option in space.options if space.why_not(option) is None]
    for chunk_tokens in space.chunk_tokens:
        if Role.BOTH in space.roles:
            for option in options:
                for count in range(1, space.most_groups(option) + 1):
                    yield Candidate(space, None, option, 0, count, chunk_tokens)
        if {Role.PREFILL, Role.DECODE} <= space.roles:
            plain = [option for option in options if option.group.speculation is None]
            for prefill, decode in product(plain or options, options):  # only those that decode draft
                yield from _apart(space, prefill, decode, chunk_tokens)


def _apart(space: Space, prefill: Option, decode: Option, chunk_tokens: int) -> Iterator[Candidate]:
    """Devices of one pool that fit a node are kept in one, and repeated over nodes; others are anywhere."""
    nodes_with = space.free(decode.pool) if prefill.pool == decode.pool else []
    for prefills, most in enumerate(_most_decodes(space, prefill, decode)):
        for decodes in range(1, most + 1 if prefills else 0):
            devices = prefills * prefill.devices + decodes * decode.devices
            if able := sum(devices <= each for each in nodes_with):
                for nodes in range(1, able + 1):
                    yield Candidate(space, prefill, decode, prefills, decodes, chunk_tokens, near=True, nodes=nodes)
            else:
                yield Candidate(space, prefill, decode, prefills, decodes, chunk_tokens)


def _most_decodes(space: Space, prefill: Option, decode: Option) -> list[int]:
    """Beside 0, 1, … prefill groups."""
    if prefill.pool != decode.pool:
        return [space.most_groups(decode)] * (space.most_groups(prefill) + 1)
    (one, times), (other, each) = space.unit(prefill), space.unit(decode)
    return [most // each for most in most_beside(space.free(decode.pool), one, other)[::times]]
