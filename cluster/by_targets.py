"""`slipstream serve --slo`: from latency targets to the configuration of the layout that meets them best here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.checks import weight_bytes
from cluster.config.cluster import PREFILL_SHAPE
from cluster.config.loading import load, overlaid, read_tree
from cluster.config.tree import SlipstreamConfig
from cluster.hardware import topology_here
from cluster.planning import Searched, kv_cache_bytes_on, planned, workload_of
from cluster.stored_profiles import Settings, Stored, Way, profile_of, ways
from core.errors import ConfigError
from engine.model_config import ModelConfig
from engine.parallel.split import check_split
from placement.goodput import Goal
from placement.plan_table import summary
from placement.search import Objective
from placement.shapes import USABLE, Limits
from placement.slo import of_all_together, parse_slo
from placement.topology import Topology
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
    most_workers = flags.get("replan_max_workers") if replanning else None
    stored = _profiles(given, _measured(given, drafter, asked), topology, most_workers or 1, say)
    profiles = [one.profile for one in stored]
    limits = _limits(given, drafter, topology)
    objective: Objective = "total" if asked.rate is None else "per-device"
    plan = partial(planned, topology=topology, limits=limits, workload=workload, goal=goal, objective=objective)
    plan = partial(plan, rate=asked.rate, drafter=drafter, weights=given.speculation.weights)
    found = plan(profiles, any_role=replanning)
    if (able := found.settle()) is None:
        raise ConfigError(f"--slo: {found.why_not(found.made.candidates[0])}", param="slo")
    shape = found.shapes[able.decode.name].profile
    if able != found.made.candidates[0]:  # what is foretold is to be what is served
        found = plan([shape])
        found.settle()
    say(summary(found.made.plan))
    for doubt in filter(None, (profile.doubt() for profile in profiles)):
        say(f"warning: {doubt}")
    if drafter is not None and asked.dataset is None:
        say(f"what drafts by {drafter} bring was measured with questions of our own; --dataset takes some as yours are")
    replan = {"replan_slo": asked.slo, "replan_profile": str(stored[profiles.index(shape)].path)}
    return _merged(found, file, (replan if replanning else {}) | dict(flags))


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


def _profiles(
    given: SlipstreamConfig, settings: Settings, topology: Topology, most_workers: int, say: Callable[[str], None]
) -> list[Stored]:
    """One of each way to share the machine that the model can be split in, and so many workers have room in."""
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars
    from engine.weights import fingerprint

    with Bars() as progress:
        folder = resolve(given.model, revision=given.revision, progress=progress, check_config=ModelConfig.from_dict)
    config, engine = ModelConfig.from_folder(folder), given.engine
    weights = weight_bytes(engine, folder)
    able = [way for way in ways(topology) if _fits(weights, config, way, topology)]
    if not able:
        raise ConfigError(f"the model does not fit: {weights / 1e9:.3g} GB of weights; {topology.source}")
    (node,) = topology.nodes
    roomy = [way for way in able if way.tp * way.threads * most_workers <= node.devices]
    if not roomy:
        most = max(node.devices // (way.tp * way.threads) for way in able)
        raise ConfigError(
            f"--replan-max-workers {most_workers}: --slo plans for {most} workers here at the most; lower it",
            param="replan_max_workers",
        )
    identity = fingerprint(folder, config, engine.quantization or "")
    return [profile_of(folder, given.model, identity, way, node.device, settings, say) for way in roomy]


def _fits(weights: int, config: ModelConfig, way: Way, topology: Topology) -> bool:
    """Whether the model can be split so, and all workers that compute at the same time have room for its weights, of so
    many bytes."""
    (node,) = topology.nodes
    try:
        check_split(config, way.tp, 1)
    except ConfigError:
        return False
    devices = way.tp * way.threads
    return weights < USABLE * node.memory_gb * 1e9 * devices


def _limits(given: SlipstreamConfig, drafter: str | None, topology: Topology) -> Limits:
    return Limits(
        max_sequences=given.engine.sequences,
        kv_cache_bytes=kv_cache_bytes_on(topology, given.engine),
        handoff_min_tokens=given.cluster.handoff_min_tokens or 0,
        drafter=drafter,
        only_drafts=bool(given.speculation.drafter),
    )


def _merged(found: Searched, file: Path | None, flags: Mapping[str, Any]) -> SlipstreamConfig:
    """What was said goes before what was planned."""
    tree: dict[str, Any] = dict(found.made.plan.serve or {})
    for name, value in (read_tree(file) if file is not None else {}).items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return overlaid(tree, flags, file)
