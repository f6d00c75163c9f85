"""How the cluster's processors are shared out among the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.config.tree import SlipstreamConfig
from cluster.groups import Group, groups_of, most_ranks
from cluster.ray_nodes import RayNode
from core.errors import ConfigError
from engine.quantization.methods import check_method


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker gets."""

    cpus: float
    gpus: int = 0
    reserved: float = 0.0
    """Cores that it keeps from others, if more than `cpus`."""

    @property
    def bundle(self) -> dict[str, float]:
        """The bundle of its placement group; Ray refuses resources of zero. All devices of a worker are in one: its
        ranks are children of the replica, and a bundle is never split over nodes."""
        return {"CPU": max(self.cpus, self.reserved)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def __str__(self) -> str:
        return f"{self.cpus:g} cores per worker" + (f", {self.gpus} GPU{'s' * (self.gpus > 1)}" if self.gpus else "")


def share_on(config: SlipstreamConfig, nodes: Sequence[RayNode]) -> list[Share]:
    """The share of each worker on the nodes of a cluster, by group. Raises ConfigError as share_out, and when the nodes
    don't hold the workers as the configuration wants them."""
    labels, most = config.cluster.node_labels, config.cluster.workers_per_node
    there = [node for node in nodes if node.has(labels)]
    if labels and not there:
        said = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise ConfigError(f"node_labels {said}: no node of the cluster has them; start one with ray start --labels")
    if most is not None and config.cluster.cpus_per_worker is None:
        cpus = _even_share(min((node.cpus for node in there if node.cpus), default=1.0), most)
        cluster = config.cluster.model_copy(update={"cpus_per_worker": cpus})
        config = config.model_copy(update={"cluster": cluster})
    shares = share_out(config, sum(node.cpus for node in there), sum(node.gpus for node in there))
    if most is None:
        return shares
    return [replace(share, reserved=_reserved(config, share, there, most)) for share in shares]


def _reserved(config: SlipstreamConfig, share: Share, nodes: Sequence[RayNode], most: int) -> float:
    """More than the cores of the largest node divide into one worker more than it may have. Raises ConfigError if the
    nodes hold fewer workers so, or if a plan for whole nodes leaves one out."""
    each = max(share.cpus, math.floor(100 * max(node.cpus for node in nodes) / (most + 1)) / 100 + 0.01)
    room = [min(int(node.cpus / each + 1e-9), int(node.gpus // share.gpus) if share.gpus else most) for node in nodes]
    places, workers = sum(min(count, most) for count in room), config.most_workers
    if places < workers:
        raise ConfigError(
            f"workers_per_node {most}: the {len(nodes)} nodes have room for {places} workers, and there are {workers}; "
            "add nodes, or raise it"
        )
    if config.cluster.handoff_within_node and places - workers >= most:
        raise ConfigError(
            f"handoff_within_node: {workers} workers, {most} on a node, leave nodes over that could take some of them, "
            "so that they might not meet; give the nodes to use a label and name it in node_labels"
        )
    return each


def share_out(config: SlipstreamConfig, cores: float, gpus: float) -> list[Share]:
    """The share of each worker, by group, on a cluster with this many. Raises ConfigError when they don't go round: Ray
    would wait for resources that never come."""
    groups = groups_of(config)
    changing = config.replan.shapes
    cpus, most = _cpus(config, groups, cores), most_ranks(config)
    if _together(config, groups, cpus) > cores:
        asked = [f"{group.most} workers of {each:g} CPUs each" for each, group in zip(cpus, groups, strict=True)]
        raise ConfigError(
            f"{(' or ' if changing else ' and ').join(asked)} do not fit on {cores:g}; "
            "lower --cpus-per-worker or the number of replicas"
        )
    wanted = config.engine.device == "cuda" or (config.engine.device == "auto" and gpus >= 1)
    if wanted and gpus < 1:
        raise ConfigError("--device cuda: there is no GPU here; use --device cpu or auto")
    ranks = [group.config.engine.ranks for group in groups]
    if wanted and gpus < most:
        asked = [
            f"{group.most} workers need {'a GPU' if each == 1 else f'{each} GPUs'} each"
            for each, group in zip(ranks, groups, strict=True)
        ]
        raise ConfigError(
            f"{(' or ' if changing else ', ').join(asked)} and the cluster has {gpus:g}; "
            "use fewer replicas, --colocated, or --device cpu"
        )
    check_method(config.engine.quantization, "cuda" if wanted else "cpu", config.engine.dtype)
    return [Share(each, count if wanted else 0) for each, count in zip(cpus, ranks, strict=True)]


def _together(config: SlipstreamConfig, groups: Sequence[Group], cpus: Sequence[float]) -> float:
    """Cores of all workers there may come to be; where shapes change the devices are for one group or another."""
    if config.replan.shapes:
        return config.most_devices * max(each / group.shape.devices for each, group in zip(cpus, groups, strict=True))
    return sum(each * group.most for each, group in zip(cpus, groups, strict=True))


def _cpus(config: SlipstreamConfig, groups: Sequence[Group], cores: float) -> list[float]:
    """Of a worker of each group: as configured, else an even share for each of its ranks."""
    configured = [group.config.cluster.cpus_per_worker for group in groups]
    each = _even_share(cores, most_ranks(config))
    return [cpus or each * group.config.engine.ranks for cpus, group in zip(configured, groups, strict=True)]


def _even_share(cores: float, count: int) -> float:
    """Whole cores as long as there is one each, so that no two fight for one."""
    share = cores / count
    return float(int(share)) if share >= 1 else max(0.01, int(share * 100) / 100)
