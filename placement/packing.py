"""Onto how many nodes of which kind a layout goes, and what each of them holds."""

from __future__ import annotations

from collections import Counter

import msgspec

from core.errors import ConfigError
from placement.candidates import Candidate, Option
from placement.layout import Role
from placement.room import shared_out
from placement.topology import NodeKind, Topology


class Seat(msgspec.Struct, frozen=True):
    """`count` nodes of the kind `node`, with the same workers on each, which take `devices` of its devices."""

    node: str
    device: str
    count: int
    devices: int
    prefill: int = 0
    decode: int = 0
    both: int = 0

    @property
    def workers(self) -> int:
        """On each node."""
        return self.prefill + self.decode + self.both


Block = list[tuple[Role, Option]]
"""Groups that have to be on one node."""


def packed(candidate: Candidate, topology: Topology) -> list[Seat]:
    """A group is on one node, and so are those that a layout keeps near each other. The largest nodes are taken first.
    Raises ConfigError if they have no room."""
    found = Counter[_Key]()
    for pool, wanted in _wanted(candidate):
        (one, ones), (other, others) = (*wanted, ([], 0))[:2]
        nodes = [node for node in topology.nodes if node.device == pool for _ in range(node.count)]
        nodes.sort(key=lambda node: node.devices, reverse=True)
        sizes = [node.devices for node in nodes]
        if (given := shared_out(sizes, _devices(one), _devices(other) or 1, ones, others)) is None:
            several = " and ".join(f"{count} x ({_said(block)})" for block, count in wanted)
            raise ConfigError(
                f"{len(sizes)} nodes of up to {max(sizes, default=0)} {pool} have no room for {several}", param="nodes"
            )
        for node, counts in zip(nodes, given, strict=True):
            found.update([_key(node, [*one * counts[0], *other * counts[1]])] if any(counts) else [])
    return [
        Seat(kind, device, count, devices, **dict(roles)) for (kind, device, devices, roles), count in found.items()
    ]


_Key = tuple[str, str, int, tuple[tuple[str, int], ...]]


def _key(kind: NodeKind, groups: Block) -> _Key:
    roles = Counter(role.name.lower() for role, _ in groups)
    return kind.name, kind.device, _devices(groups), tuple(sorted(roles.items()))


def _wanted(candidate: Candidate) -> list[tuple[str, list[tuple[Block, int]]]]:
    """By pool, one or two blocks and how many of each."""
    prefill, decode = candidate.prefill, candidate.decode
    if prefill is None:
        return [(decode.pool, [([(Role.BOTH, decode)], candidate.decodes)])]
    givers, takers = [(Role.PREFILL, prefill)], [(Role.DECODE, decode)]
    if candidate.near:
        return [(decode.pool, [([*givers * candidate.prefills, *takers * candidate.decodes], candidate.nodes)])]
    each = [(givers, candidate.prefills), (takers, candidate.decodes)]
    if prefill.pool == decode.pool:
        return [(decode.pool, each)]
    return [(prefill.pool, each[:1]), (decode.pool, each[1:])]


def _devices(block: Block) -> int:
    return sum(option.devices for _, option in block)


def _said(block: Block) -> str:
    counts = Counter((role.name.lower(), option.name) for role, option in block)
    return " + ".join(f"{count} {role} {name}" for (role, name), count in counts.items())
