"""Workers of one shape, which are deployed together."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.tree import SlipstreamConfig
from core.types import Role
from placement.worker_shape import WorkerShape


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
    def shape(self) -> WorkerShape:
        return WorkerShape(self.config.engine.tensor_parallel_size, self.config.engine.pipeline_parallel_size)

    @property
    def prefills_only(self) -> bool:
        return self.roles == (Role.PREFILL,)


def groups_of(config: SlipstreamConfig) -> list[Group]:
    """One for any role if all workers have one shape, else one for each role; where shapes may change one for each of
    these, of which some have no workers to begin with."""
    if config.replan.shapes:
        most = config.most_devices
        return [_of_shape(config, shape) for shape in config.replan.worker_shapes if shape.devices <= most]
    if config.one_shape:
        return [Group(config, tuple(Role), config.cluster.num_workers, config.most_workers)]
    return [Group(config.for_role(role), (role,), count, count) for role, count in config.cluster.roles.items()]


def _of_shape(config: SlipstreamConfig, shape: WorkerShape) -> Group:
    roles = config.cluster.roles.items()
    workers = sum(count for role, count in roles if config.shape_of(role) == shape)
    return Group(config.of_shape(shape), tuple(Role), workers, config.most_devices // shape.devices)


def group_of(config: SlipstreamConfig, role: Role, shape: WorkerShape | None = None) -> Group:
    """The one whose workers may have that role, and have that shape, or if none is named that which is configured."""
    if config.replan.shapes and shape is None:
        shape = config.shape_of(role)
    return next(group for group in groups_of(config) if role in group.roles and shape in (None, group.shape))


def most_ranks(config: SlipstreamConfig) -> int:
    """That all workers there may come to be have together."""
    if config.replan.shapes:
        return config.most_devices
    return sum(group.most * group.config.engine.ranks for group in groups_of(config))
