"""Workers of one shape, which are deployed together."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.tree import SlipstreamConfig
from core.types import Role


@dataclass(frozen=True, slots=True)
class Group:
    """`config` is as its workers have it, `roles` what they may be used for. There are `workers` of them to begin with,
    and `most` at the most."""

    config: SlipstreamConfig
    roles: tuple[Role, ...]
    workers: int
    most: int

    @property
    def name(self) -> str:
        """Of the deployment. Two shapes may differ in their cores only."""
        engine = self.config.engine
        name = f"worker-tp{engine.tensor_parallel_size}-pp{engine.pipeline_parallel_size}"
        return f"{name}-{self.roles[0]}" if len(self.roles) == 1 else name

    @property
    def prefills_only(self) -> bool:
        return self.roles == (Role.PREFILL,)


def groups_of(config: SlipstreamConfig) -> list[Group]:
    """One for any role if all workers have one shape, else one for each role."""
    if config.one_shape:
        return [Group(config, tuple(Role), config.cluster.num_workers, config.most_workers)]
    return [Group(config.for_role(role), (role,), count, count) for role, count in config.cluster.roles.items()]


def group_of(config: SlipstreamConfig, role: Role) -> Group:
    """The one whose workers may have that role."""
    return next(group for group in groups_of(config) if role in group.roles)
