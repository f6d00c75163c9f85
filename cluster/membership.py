"""Who is in the cluster and what each worker is used for. A pure decider behind the controller deployment.

State is soft: workers announce themselves every ANNOUNCE_PERIOD_S, so a restarted controller knows everybody again
within a second, and a worker that has been silent for MEMBER_TIMEOUT_S is forgotten and its role given to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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

    def announce(self, member: Member, now: float) -> None:
        """A worker is up and serves under `member.address`. Its word on its role stands: we may be a new controller."""
        self._roles[member.worker_id] = (member.role, member.layout, now)
        self._members[member.worker_id] = member

    def leave(self, worker_id: str) -> None:
        self._roles.pop(worker_id, None)
        self._members.pop(worker_id, None)

    def expire(self, now: float) -> None:
        for worker_id in [w for w, (_, _, seen) in self._roles.items() if now - seen > MEMBER_TIMEOUT_S]:
            self.leave(worker_id)

    def members(self) -> list[Member]:
        return list(self._members.values())

    def _most_wanted(self) -> Role:
        have = [role for role, _, _ in self._roles.values()]
        missing = {role: count - have.count(role) for role, count in self.wanted.items() if count}
        return max(missing, key=lambda role: missing[role])
