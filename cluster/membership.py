"""Who is in the cluster and what each worker is used for. A pure decider behind the controller deployment.

State is soft: workers announce themselves every ANNOUNCE_PERIOD_S, so a restarted controller knows everybody again
within a second, and a worker that has been silent for MEMBER_TIMEOUT_S is forgotten and its role given to the next. The
plan is kept by the workers too: each announcement says by which one it works.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from core.types import Role
from engine.kv_layout import KVLayout
from placement.worker_shape import WorkerShape

ANY = tuple(Role)
ANNOUNCE_PERIOD_S = 1.0
MEMBER_TIMEOUT_S = 5.0


class Plan(Struct, frozen=True, kw_only=True):
    """How many workers of each role there should be. One with a higher id replaces the others."""

    plan_id: int = 0
    """0: as configured."""
    wanted: dict[Role, int]
    step_tokens: int | None = None
    """Of a worker's steps; None: as configured."""
    shapes: dict[Role, WorkerShape] = {}
    """That workers of a role are to have, where shapes may change."""

    @property
    def workers(self) -> int:
        return sum(self.wanted.values())


class Orders(Struct, frozen=True):
    """What a worker is to be."""

    role: Role
    plan: Plan


class Member(Struct, frozen=True, kw_only=True):
    worker_id: str
    address: str
    role: Role
    layout: KVLayout
    plan: Plan | None = None
    """By which it works; None before its first orders."""
    node: str = ""
    """Of the cluster; empty: nobody knows."""
    roles: tuple[Role, ...] = ANY
    """That its shape is for."""
    shape: WorkerShape | None = None
    """None: nobody asks."""
    startup_s: float = 0.0
    """That it took until it served; 0: nobody knows."""


@dataclass(slots=True)
class Membership:
    """`plan` may be replaced at any time by one with a higher id. Workers follow at their next announcement, one after
    the other, from roles with too many to roles with too few: so no two of them swap, and once there are as many as
    planned they have the roles of the plan after one announcement each, and keep them. A worker gets only roles that
    its shape is for, whatever the plan says. Where shapes may change one of another shape than the plan has for a role
    stands in there as long as workers are lacking, and is not counted as one of those."""

    plan: Plan
    _roles: dict[str, tuple[Role, KVLayout, float]] = field(default_factory=dict)
    _members: dict[str, Member] = field(default_factory=dict)
    _nodes: dict[str, str] = field(default_factory=dict)
    _shapes: dict[str, WorkerShape | None] = field(default_factory=dict)

    def admit(
        self,
        worker_id: str,
        layout: KVLayout,
        now: float,
        node: str = "",
        able: tuple[Role, ...] = ANY,
        shape: WorkerShape | None = None,
    ) -> Role:
        """Give a starting worker its role. Raises LayoutMismatch when its KV cache can't be joined with that of a
        worker already here: better at start-up than at the first hand-off."""
        self.expire(now)
        for _, other, _ in self._roles.values():
            other.check_same_cache(layout)
        role = self.most_wanted(node, able, shape)
        self._roles[worker_id] = (role, layout, now)
        self._nodes[worker_id], self._shapes[worker_id] = node, shape
        return role

    def announce(self, member: Member, now: float) -> Orders:
        """A worker is up and serves under `member.address`. Returns the role it is to have: its own, unless there are
        too many of that and too few of another. That happens when the plan has changed, when a worker is replaced
        before its death is noticed, or when this controller is new and has had to guess. A new one takes over the plan
        by which the workers work."""
        self.expire(now)
        if member.plan is not None and member.plan.plan_id > self.plan.plan_id:
            self.plan = member.plan
        self._roles[member.worker_id] = (member.role, member.layout, now)
        self._nodes[member.worker_id], self._shapes[member.worker_id] = member.node, member.shape
        role, shape = member.role, member.shape
        scarce = self.most_wanted(member.node, member.roles, shape)
        spared = self._missing(role, shape) < 0 or (self._fits(scarce, shape) and not self._fits(role, shape))
        if spared and self._missing(scarce, shape) > 0:
            role = scarce
        self._roles[member.worker_id] = (role, member.layout, now)
        self._members[member.worker_id] = msgspec.structs.replace(member, role=role)
        return Orders(role, self.plan)

    def leave(self, worker_id: str) -> None:
        """A worker ends what it has and takes nothing more. Its role goes to another."""
        self._roles.pop(worker_id, None)
        self._members.pop(worker_id, None)
        self._nodes.pop(worker_id, None)
        self._shapes.pop(worker_id, None)

    def expire(self, now: float) -> None:
        for worker_id in [w for w, (_, _, seen) in self._roles.items() if now - seen > MEMBER_TIMEOUT_S]:
            self.leave(worker_id)

    def members(self) -> list[Member]:
        return list(self._members.values())

    def most_wanted(self, node: str = "", able: tuple[Role, ...] = ANY, shape: WorkerShape | None = None) -> Role:
        """What the next worker is for, of the roles that it is `able` to have. Of those that lack some, one that is to
        have its shape; then one that `node` has least of for its share in the plan, so that prefill and decode workers
        meet on every node; then the one that lacks most."""
        roles = [role for role, count in self.plan.wanted.items() if count and role in able]
        if not roles:
            return able[0]
        lacking = [role for role in roles if self._missing(role, shape) > 0] or roles
        fitting = [role for role in lacking if self._fits(role, shape)] or lacking
        return min(
            fitting, key=lambda role: (self._on(node, role) / self.plan.wanted[role], -self._missing(role, shape))
        )

    def _fits(self, role: Role, shape: WorkerShape | None) -> bool:
        """Whether a worker of that shape is one that the plan has for the role."""
        return not self.plan.shapes or self.plan.shapes.get(role) == shape

    def _on(self, node: str, role: Role) -> int:
        """Workers of the role there; 0 if nobody knows where they are."""
        there = [worker for worker, place in self._nodes.items() if node and place == node]
        return sum(self._roles[worker][0] is role for worker in there)

    def _missing(self, role: Role, shape: WorkerShape | None = None) -> int:
        """How many workers of this role are lacking; negative when there are too many. For one with the shape of the
        role those that stand in don't count."""
        there = [worker for worker, (given, _, _) in self._roles.items() if given is role]
        if self.plan.shapes and self._fits(role, shape):
            there = [worker for worker in there if self._shapes.get(worker) == shape]
        return self.plan.wanted.get(role, 0) - len(there)
