"""Onto how many nodes of which kind a layout goes, and what each of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from core.errors import ConfigError
from placement.candidates import Candidate, Option
from placement.layout import Role
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
    """First fit, the largest first: a group is on one node, and so are those that a layout keeps near each other.
    Raises ConfigError if one has no room."""
    free = [(kind, Counter[Role](), [kind.devices]) for kind in topology.nodes for _ in range(kind.count)]
    for block in sorted(_blocks(candidate), key=_devices, reverse=True):
        pool, needed = block[0][1].pool, _devices(block)
        fitting = (node for node in free if node[0].device == pool and node[2][0] >= needed)
        if (found := next(fitting, None)) is None:
            raise ConfigError(f"no node of {pool} has {needed} devices left for {_said(block)}", param="nodes")
        found[1].update(role for role, _ in block)
        found[2][0] -= needed
    used = Counter(_key(kind, roles, kind.devices - left[0]) for kind, roles, left in free if roles)
    return [Seat(kind, device, count, devices, **dict(roles)) for (kind, device, devices, roles), count in used.items()]


_Key = tuple[str, str, int, tuple[tuple[str, int], ...]]


def _key(kind: NodeKind, roles: Counter[Role], devices: int) -> _Key:
    return kind.name, kind.device, devices, tuple(sorted((role.name.lower(), count) for role, count in roles.items()))


def _blocks(candidate: Candidate) -> Iterator[Block]:
    if candidate.prefill is None:
        yield from ([(Role.BOTH, candidate.decode)] for _ in range(candidate.decodes))
        return
    prefills: Block = [(Role.PREFILL, candidate.prefill)] * candidate.prefills
    decodes: Block = [(Role.DECODE, candidate.decode)] * candidate.decodes
    if candidate.near:
        yield from ([*prefills, *decodes] for _ in range(candidate.nodes))
    else:
        yield from ([group] for group in [*prefills, *decodes])


def _devices(block: Block) -> int:
    return sum(option.devices for _, option in block)


def _said(block: Block) -> str:
    counts = Counter((role.name.lower(), option.name) for role, option in block)
    return " + ".join(f"{count} {role} {name}" for (role, name), count in counts.items())
