"""The topology of a Ray cluster: its nodes as Ray knows them, and links as they are sold or as they were measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, combinations_with_replacement, product

from cluster.hardware import copy_gb_s
from cluster.link_speed import Echo, Speed, measure
from cluster.ray_nodes import RayNode
from core.errors import ConfigError
from placement.devices import device, kind_of
from placement.topology import NETWORK_GB_S, NodeKind, Topology, Wire

_WAIT_S = 60.0
"""For a task to be done: where all GPUs are taken it never begins."""
PAIRS = 3
"""Of nodes, that are measured for two kinds of them at the most."""
_COPY_BYTES = 2**26

Inside = Callable[[RayNode], Speed | None]
Between = Callable[[RayNode, RayNode], Speed]


def kinds_of(nodes: Sequence[RayNode]) -> dict[NodeKind, list[RayNode]]:
    """Nodes alike together. One with GPUs counts for these, another for its cores; one with neither can't serve. Raises
    ConfigError for GPUs whose kind Ray or we don't know."""
    alike: dict[tuple[str, int, float], list[RayNode]] = defaultdict(list)
    for node in nodes:
        if node.gpus >= 1:
            kind = kind_of(node.accelerator or "")
            if not node.accelerator:
                raise ConfigError(
                    f"Ray does not know the GPUs of the node {node.address}: write a topology file instead"
                )
            alike[kind, int(node.gpus), device(kind).memory_gb].append(node)
        elif node.cpus >= 1:
            cores = int(node.cpus)
            alike["cpu", cores, round(node.memory / cores / 1e9, 1)].append(node)
    if not alike:
        raise ConfigError("no node of the Ray cluster has cores or GPUs to serve with")
    return {
        NodeKind(name=f"{kind.lower()}-{number}", device=kind, devices=count, memory_gb=memory, count=len(found)): found
        for number, ((kind, count, memory), found) in enumerate(alike.items())
    }


def topology_of(nodes: Sequence[RayNode], inside: Inside | None = None, between: Between | None = None) -> Topology:
    """Links are as they are sold, unless both say how fast they are. The slowest of some pairs of nodes counts."""
    kinds = kinds_of(nodes)
    links = [_within(kind, found, inside) for kind, found in kinds.items() if kind.devices > 1]
    for one, other in combinations_with_replacement(kinds, 2):
        if pairs := _pairs(kinds, one, other):
            links.append(_between(one, other, pairs, between))
    how = "links as they are sold" if between is None else "measured links"
    return Topology(nodes=tuple(kinds), links=tuple(links), source=f"a Ray cluster, {how}")


def _within(kind: NodeKind, nodes: Sequence[RayNode], inside: Inside | None) -> Wire:
    sold = Wire(within=kind.name, gb_per_s=device(kind.device).link_gb_s, latency_us=10.0)
    measured = [speed for node in nodes[:PAIRS] if inside is not None and (speed := inside(node)) is not None]
    if not measured:
        return sold
    slowest = min(measured, key=lambda speed: speed.gb_per_s)
    return Wire(within=kind.name, gb_per_s=round(slowest.gb_per_s, 3), latency_us=round(slowest.latency_us, 1))


def _between(one: NodeKind, other: NodeKind, pairs: Sequence[tuple[RayNode, RayNode]], between: Between | None) -> Wire:
    ends = one.name, other.name
    if between is None:
        return Wire(between=ends, gb_per_s=NETWORK_GB_S, latency_us=20.0)
    slowest = min((between(*pair) for pair in pairs), key=lambda speed: speed.gb_per_s)
    return Wire(between=ends, gb_per_s=round(slowest.gb_per_s, 3), latency_us=round(slowest.latency_us, 1))


def _pairs(
    kinds: Mapping[NodeKind, Sequence[RayNode]], one: NodeKind, other: NodeKind
) -> list[tuple[RayNode, RayNode]]:
    pairs = combinations(kinds[one], 2) if one is other else product(kinds[one], kinds[other])
    return list(pairs)[:PAIRS]


def inside(node: RayNode) -> Speed | None:
    """By a task on the node: a copy in memory, by which workers on one host hand KV over, or one from a GPU to another.
    None if the node has a single GPU."""
    import ray

    if node.gpus == 1:
        return None
    work = ray.remote(_gpu_copy) if node.gpus >= 1 else ray.remote(_memory_copy)
    speed: Speed = ray.get(
        work.options(num_cpus=0, num_gpus=2 if node.gpus else 0, **_on(node)).remote(), timeout=_WAIT_S
    )
    return speed


def between(one: RayNode, other: RayNode) -> Speed:
    """By TCP, with a task at either end."""
    import ray

    echo = ray.remote(Echo).options(num_cpus=0, max_concurrency=2, **_on(other)).remote(other.address)
    address = ray.get(echo.where.remote(), timeout=_WAIT_S)
    answering = echo.answer.remote()
    speed: Speed = ray.get(ray.remote(measure).options(num_cpus=0, **_on(one)).remote(address), timeout=_WAIT_S)
    ray.get(answering, timeout=_WAIT_S)
    ray.kill(echo)
    return speed


def _on(node: RayNode) -> dict[str, object]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}


def _memory_copy() -> Speed:
    return Speed(copy_gb_s(), 200.0)


def _gpu_copy() -> Speed:
    """From the first GPU that the task has to the second."""
    import time

    import torch

    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(0)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(1)
        seconds.append(time.perf_counter() - started)
    return Speed(_COPY_BYTES / min(seconds) / 1e9, 10.0)
