"""What the workers of a cluster have to do at a moment, as replanning is told."""

from __future__ import annotations

from msgspec import Struct

from core.served import UnderWay
from core.types import Role
from placement.worker_shape import WorkerShape


class RoleLoad(Struct, frozen=True, kw_only=True):
    """Of all workers in a role, together."""

    workers: int = 0
    waiting_requests: int = 0
    waiting_prompt_tokens: int = 0
    """Of those that wait, and what is left of those begun."""
    running: int = 0
    """Sequences in its steps."""
    free_kv_tokens: int = 0
    shapes: dict[WorkerShape, int] = {}
    """How many workers have which, where shapes may change."""


class Drafted(Struct, frozen=True, kw_only=True):
    """What drafts did: in so many `steps`, of a sequence each, `tokens` were drafted, of which some were accepted."""

    steps: float = 0.0
    tokens: float = 0.0
    accepted: float = 0.0


NOTHING = Drafted()


class Load(Struct, frozen=True, kw_only=True):
    roles: dict[Role, RoleLoad]
    in_flight: int
    """Requests that gateways have accepted and that have not ended."""
    under_way: list[UnderWay] = []
    """These, as far as gateways tell of them."""
    told_by: frozenset[str] = frozenset()
    """The gateways that do. Where others did the last time, who is under way tells nothing of who has come since."""
    drafted: Drafted = NOTHING
    """Since the last time."""

    @property
    def waiting_requests(self) -> int:
        return sum(load.waiting_requests for load in self.roles.values())

    def of(self, role: Role) -> RoleLoad:
        return self.roles.get(role, RoleLoad())
