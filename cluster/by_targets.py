"""`slipstream serve --slo`: from latency targets to the configuration of the layout that meets them best here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.checks import weight_bytes
from cluster.config.cluster import PREFILL_SHAPE
from cluster.config.loading import load, read_tree, said_of_plan
from cluster.config.tree import SlipstreamConfig
from cluster.hardware import topology_here
from cluster.planned import on_devices_alike
from cluster.planned_shapes import Stored, worker_shape
from cluster.planning import TENSOR_PARALLEL_SIZES, Searched, cache_tokens_on, kv_cache_bytes_on, planned, workload_of
from cluster.stored_profiles import Settings, Way, profile_of, ways
from core.errors import ConfigError
from engine.model_config import ModelConfig
from engine.parallel.split import check_split
from placement.candidates import Objective
from placement.goodput import Goal
from placement.plan_table import summary
from placement.shapes import USABLE, Limits, Shape
from placement.slo import of_all_together, parse_slo
from placement.topology import Topology
from placement.worker_shape import WorkerShape, parse_shapes
from placement.workload import Workload

LENGTHS = "prompt=512,output=128,cv=1"
"""Of requests about which nothing is said."""
_DECIDED = {
    "engine": ("tensor_parallel_size", "pipeline_parallel_size", "max_num_batched_tokens"),
    "cluster": ("prefill_replicas", "decode_replicas", "colocated", "cpus_per_worker", *PREFILL_SHAPE, "ray_address"),
}
_REPLAN = "replan"
_PROFILED = ("dtype", "device", "quantization", "kv_cache_memory")
"""Settings of the engine that steps depend on."""
_DRAFTED = {
    "budget": "draft_tokens",
    "rule": "speculation_rule",
    "controller": "speculation_controller",
    "memory": "speculation_memory",
}
"""Settings of speculation that drafts depend on, and how `slipstream profile` has them."""
_TRAINING_FREE = "hybrid"
"""Who may draft for a model about whose drafts nothing is said."""


@dataclass(frozen=True)
class Asked:
    """What `slipstream serve` was told besides its settings. `rate`: requests/s."""

    slo: str
    trace: Path | None = None
    lengths: str | None = None
    rate: float | None = None
    dataset: Path | None = None


def config_for(
    asked: Asked, file: Path | None, flags: Mapping[str, Any], say: Callable[[str], None]
) -> SlipstreamConfig:
    """The settings of the file and the flags, with the rest as planned; `say` is told how that came. Raises ConfigError
    for settings that the targets decide, and for targets that can't be met: then it says what is reachable."""
    goal = Goal(parse_slo(asked.slo))
    given = load(file, {name: value for name, value in flags.items() if not name.startswith(_REPLAN)})
    _check_undecided(given)
    workload = _workload(asked, say)
    topology = topology_here(on_cpu=given.engine.device == "cpu")
    drafter = _drafter(given, asked)
    replanning = flags.get(_REPLAN, "off") != "off"
    if replanning:
        of_all_together(goal.targets)
    named = parse_shapes(flags["replan_shapes"]) if replanning and "replan_shapes" in flags else ()
    room = _Room(topology.nodes[0].devices, (replanning and flags.get("replan_max_workers")) or 1, named)
    folder = _folder(given)
    model = ModelConfig.from_folder(folder)
    stored = _profiles(given, folder, model, _measured(given, drafter, asked), topology, room, replanning, say)
    limits = _limits(given, drafter, topology, room, model)
    if asked.trace is not None:  # it was read above, so that nothing is measured for a bad one
        workload = workload_of(asked.trace, None, cache_tokens=cache_tokens_on(topology, stored, limits))
    objective: Objective = "total" if asked.rate is None else "per-device"
    plan = partial(planned, stored, topology, limits, workload, goal, objective, asked.rate, drafter)
    plan = partial(plan, any_role=replanning, weights=given.speculation.weights, slo=asked.slo)
    found = plan(only=room.has)
    if (able := found.settle()) is None:
        raise ConfigError(f"--slo: {found.why_not(found.made.candidates[0])}", param="slo")
    if able != found.made.candidates[0]:  # what is foretold is to be what is served
        own = found.shapes[able.decode.name]
        found = plan(only=lambda shape: room.has(shape) and on_devices_alike(shape, own))
        found.settle()
    say(summary(found.made.plan))
    for doubt in filter(None, (one.profile.doubt() for one in stored)):
        say(f"warning: {doubt}")
    if drafter is not None and asked.dataset is None:
        say(f"what drafts by {drafter} bring was measured with questions of our own; --dataset takes some as yours are")
    return _merged(found, file, flags, replanning, say)


@dataclass(frozen=True)
class _Room:
    """For `most_workers` on a machine of so many `devices`, of the shapes that are `named`, or of any."""

    devices: int
    most_workers: int
    named: tuple[WorkerShape, ...]

    def has(self, shape: Shape) -> bool:
        """To begin with such workers."""
        taken = shape.profile.setting.devices * shape.stages * self.most_workers
        return taken <= self.devices and (not self.named or worker_shape(shape) in self.named)

    def worth(self, way: Way, threads: set[int]) -> bool:
        """To measure such a one, where workers of so many threads may be what it begins with."""
        return way.threads in threads and (not self.named or way.tp in {shape.tp for shape in self.named})


def _workload(asked: Asked, say: Callable[[str], None]) -> Workload:
    if asked.trace is None and asked.lengths is None:
        say(f"no --trace and no --lengths: planning for requests with {LENGTHS}")
        return workload_of(None, LENGTHS)
    return workload_of(asked.trace, asked.lengths)


def _check_undecided(given: SlipstreamConfig) -> None:
    for section, names in _DECIDED.items():
        for name in names:
            if name in getattr(given, section).model_fields_set:
                raise ConfigError(
                    f"--slo decides {name} by itself: leave one of them out; to plan for a cluster, or with layouts of "
                    "your own, use slipstream plan",
                    param=name,
                )


def _drafter(given: SlipstreamConfig, asked: Asked) -> str | None:
    """Those that are named, or the one that needs no weights; None where none is to draft."""
    if given.speculation.drafter:
        return given.speculation.together
    if "drafter" not in given.speculation.model_fields_set:
        return _TRAINING_FREE
    if asked.dataset is not None:
        raise ConfigError(
            "--dataset: questions are for drafts, and there are to be none; leave it out", param="dataset"
        )
    return None


def _measured(given: SlipstreamConfig, drafter: str | None, asked: Asked) -> Settings:
    """What profiles depend on, as the flags of `slipstream profile` have it."""
    engine, speculation = given.engine, given.speculation
    found: dict[str, tuple[str, ...]] = {
        name: (str(getattr(engine, name)),) for name in _PROFILED if name in engine.model_fields_set
    }
    if drafter is None:
        return found
    found["speculation"] = (drafter,)
    for name in speculation.model_fields_set & _DRAFTED.keys():
        found[_DRAFTED[name]] = (str(getattr(speculation, name)),)
    if speculation.weights:
        found["speculation_weights"] = tuple(f"{name}={folder}" for name, folder in speculation.weights.items())
    if asked.dataset is not None:
        found["dataset"] = (str(asked.dataset.absolute()),)
    return found


def _folder(given: SlipstreamConfig) -> Path:
    """Of the model, which is fetched."""
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars

    with Bars() as progress:
        return resolve(given.model, revision=given.revision, progress=progress, check_config=ModelConfig.from_dict)


def _profiles(
    given: SlipstreamConfig,
    folder: Path,
    config: ModelConfig,
    settings: Settings,
    topology: Topology,
    room: _Room,
    replanning: bool,
    say: Callable[[str], None],
) -> list[Stored]:
    """One of each way to share the machine that the model can be split in, and that workers may begin with, or with
    `replanning` come to have."""
    from engine.weights import fingerprint

    engine, weights = given.engine, weight_bytes(given.engine, folder)
    (node,) = topology.nodes
    able = [way for way in ways(topology, replanning=replanning) if _fits(weights, config, way, topology)]
    if not able:
        room_gb = USABLE * node.memory_gb * node.devices
        raise ConfigError(
            f"the model does not fit: {weights / 1e9:.3g} GB of weights, and there is room for {room_gb:.3g} GB on "
            f"{topology.source}, if it can be split among all of that; quantize it (--quantization), or take a smaller "
            "one",
            param="model",
        )
    threads = {way.threads for way in able if way.tp * way.threads * room.most_workers <= node.devices}
    if not threads:
        most = max(node.devices // (way.tp * way.threads) for way in able)
        raise ConfigError(
            f"--replan-max-workers {room.most_workers}: --slo plans for {most} workers here at the most; lower it",
            param="replan_max_workers",
        )
    worth = [way for way in able if room.worth(way, threads)]
    if not worth:
        known = ", ".join(str(tp) for tp in sorted({way.tp for way in able}))
        raise ConfigError(
            f"--replan-shapes: --slo tries TP {known} here, and none of these is named; name one", param="replan_shapes"
        )
    identity = fingerprint(folder, config, engine.quantization or "")
    return [profile_of(folder, given.model, identity, way, node.device, settings, say) for way in worth]


def _fits(weights: int, config: ModelConfig, way: Way, topology: Topology) -> bool:
    """Whether the model can be split so, and all workers that compute at the same time have room for its weights, of so
    many bytes."""
    (node,) = topology.nodes
    devices = way.tp * way.threads
    return _splits(config, way.tp, 1) and weights < USABLE * node.memory_gb * 1e9 * devices


def _splits(config: ModelConfig, tp: int, pp: int) -> bool:
    try:
        check_split(config, tp, pp)
    except ConfigError:
        return False
    return True


def _limits(
    given: SlipstreamConfig, drafter: str | None, topology: Topology, room: _Room, config: ModelConfig
) -> Limits:
    return Limits(
        stages=tuple(sorted({shape.pp for shape in room.named})) or _stages(topology, config),
        max_sequences=given.engine.sequences,
        kv_cache_bytes=kv_cache_bytes_on(topology, given.engine),
        handoff_min_tokens=given.cluster.handoff_min_tokens or 0,
        drafter=drafter,
        only_drafts=bool(given.speculation.drafter),
    )


def _stages(topology: Topology, config: ModelConfig) -> tuple[int, ...]:
    """To try where nobody says which. On a CPU all memory is one, and a pipeline brings no more room for KV."""
    (node,) = topology.nodes
    most = 1 if node.device == "cpu" else node.devices
    return tuple(size for size in TENSOR_PARALLEL_SIZES if size <= most and _splits(config, 1, size))


def _merged(
    found: Searched, file: Path | None, flags: Mapping[str, Any], replanning: bool, say: Callable[[str], None]
) -> SlipstreamConfig:
    """What was said goes before what was planned."""
    tree: dict[str, Any] = dict(found.made.plan.serve or {})
    if replanning:
        tree["replan"] = dict(found.made.plan.replan or {})
    for name, value in (read_tree(file) if file is not None else {}).items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    config = said_of_plan(tree, flags, file, say)
    if len(config.replan.shapes) > 1:
        say(f"workers may change to {', '.join(config.replan.shapes)} (TP x PP); --replan-shapes limits them")
    return config
