"""Who is in the cluster and what each worker is used for. A pure decider behind the controller deployment.

State is soft: workers announce themselves every ANNOUNCE_PERIOD_S, so a restarted controller knows everybody again
within a second, and a worker that has been silent for MEMBER_TIMEOUT_S is forgotten and its role given to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from core.types import Role
from engine.kv_layout import KVLayout

ANNOUNCE_PERIOD_S = 1.0
MEMBER_TIMEOUT_S = 5.0


class Member(Struct, frozen=True, kw_only=True):
    worker_id: str
    address: str
    role: Role
    layout: KVLayout


@dataclass(slots=True)
class Membership:
    """`wanted` says how many workers of each role there should be."""

    wanted: Mapping[Role, int]
    _roles: dict[str, tuple[Role, KVLayout, float]] = field(default_factory=dict)
    _members: dict[str, Member] = field(default_factory=dict)

    def admit(self, worker_id: str, layout: KVLayout, now: float) -> Role:
        """Give a starting worker its role. Raises LayoutMismatch when its KV cache can't be joined with that of a
        worker already here: better at start-up than at the first hand-off."""
        self.expire(now)
        for _, other, _ in self._roles.values():
            other.check_same_cache(layout)
        role = self._most_wanted()
        self._roles[worker_id] = (role, layout, now)
        return role

    def announce(self, member: Member, now: float) -> Role:
        """A worker is up and serves under `member.address`. Returns the role it is to have: its own, unless there are
        too many of that and too few of another. That happens when a worker is replaced before its death is noticed, or
        when this controller is new and has had to guess."""
        self.expire(now)
        self._roles[member.worker_id] = (member.role, member.layout, now)
        role = member.role
        if self._missing(role) < 0 and self._missing(scarce := self._most_wanted()) > 0:
            role = scarce
        self._roles[member.worker_id] = (role, member.layout, now)
        self._members[member.worker_id] = msgspec.structs.replace(member, role=role)
        return role

    def expire(self, now: float) -> None:
        for worker_id in [w for w, (_, _, seen) in self._roles.items() if now - seen > MEMBER_TIMEOUT_S]:
            self._roles.pop(worker_id)
            self._members.pop(worker_id, None)

    def members(self) -> list[Member]:
        return list(self._members.values())

    def _most_wanted(self) -> Role:
        return max((role for role, count in self.wanted.items() if count), key=self._missing)

    def _missing(self, role: Role) -> int:
        """How many workers of this role are lacking; negative when there are too many."""
        return self.wanted.get(role, 0) - sum(given is role for given, _, _ in self._roles.values())
