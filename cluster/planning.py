"""From the flags of `slipstream plan` to a plan, and to what of it `slipstream serve` can run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config.engine import EngineSection
from cluster.config.loading import load
from cluster.machine import cpu_name, usable_cores, versions
from cluster.planned import config_of, on_devices_alike, why_not
from cluster.planned_shapes import Stored, replan_section
from core.errors import ConfigError
from engine.kv_layout import DEFAULT_KV_CACHE_BYTES
from placement.candidates import Candidate, Objective, Space
from placement.goodput import Goal
from placement.latency import Speculation
from placement.layout import Role
from placement.plan import Made, make_plan
from placement.profile import Profile, read_profile
from placement.shapes import Limits, Shape, most_kv_tokens, shapes, space_of
from placement.slo import parse_slo
from placement.topology import Topology, read_topology
from placement.traces import read_trace
from placement.workload import Workload

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
"""That are tried where nobody says which."""
_DRAFT_TOKENS = 4


@dataclass(frozen=True)
class Searched:
    """A plan, and what it was made of. `shapes`: by name."""

    made: Made
    space: Callable[[frozenset[Role]], Space]
    shapes: dict[str, Shape]
    topology: Topology
    limits: Limits
    drafter: str | None
    workload: Workload
    goal: Goal
    any_role: bool = False
    """Workers are to be on devices alike, so that these can take any role."""
    weights: Mapping[str, str] | None = None
    """Of drafters that take some: folders by name."""
    stored: Sequence[Stored] = ()
    """Profiles of the shapes, and of those that workers may come to have."""
    slo: str = ""
    """The goal, as it was written."""

    def settle(self) -> Candidate | None:
        """Give the plan the configuration of the best of its layouts that can be served. Returns that layout; None if
        there is none."""
        plan, chosen = self.made.plan, self.made.candidates[0]
        able = next((one for one in self.made.candidates if self.why_not(one) is None), None)
        if able is not None:
            plan.serve = config_of(able, self.shapes, self.limits, self.topology, self.drafter, self.weights)
            plan.replan = self._replan(able)
        if able is not chosen:
            instead = "" if able is None else f"; serve gets {able.name}"
            plan.warnings.append(f"{self.why_not(chosen)}{instead}")
        return able

    def why_not(self, candidate: Candidate) -> str | None:
        """Why a layout can't be served; None if it can."""
        if self.any_role and not self._alike(candidate):
            return f"replanning changes roles, and the workers of {candidate.name} have unlike devices"
        return why_not(candidate, self.shapes, self.topology)

    def _alike(self, candidate: Candidate) -> bool:
        prefill = candidate.prefill or candidate.decode
        return on_devices_alike(self.shapes[prefill.name], self.shapes[candidate.decode.name])

    def _replan(self, able: Candidate) -> dict[str, Any] | None:
        """None where it can't change roles of workers, or would not know their profile."""
        if not self._alike(able):
            return None
        found = replan_section(able, self.shapes, self.stored, self.limits, self.topology)
        return {"slo": self.slo, "share": self.goal.share} | found if found else None


def searched(
    model: str,
    slo: str,
    share: float | None,
    profiles: tuple[Path, ...],
    kind: str | None,
    topology_file: Path | None,
    devices: int | None,
    rate: float | None,
    objective: Any,
    trace: Path | None,
    lengths: str | None,
    burstiness: float | None,
    drafter: str | None,
    ray_address: str | None = None,
    **given: Any,
) -> Searched:
    """By the flags of `slipstream plan`. Raises ConfigError."""
    goal = _goal(slo, share)
    topology = topology_of(kind, topology_file, devices, profiles, ray_address)
    limits = limits_of(topology, devices=devices, drafter=drafter, **given)
    known = _profiles(model, profiles, topology)
    workload = workload_of(trace, lengths, burstiness, cache_tokens_on(topology, known, limits))
    found = planned(known, topology, limits, workload, goal, objective, rate, drafter, slo=slo)
    if kind is None and topology_file is None and ray_address is None:
        found.made.plan.warnings += measured_elsewhere(one.profile for one in known)
    return found


def _goal(slo: str, share: float | None) -> Goal:
    targets = parse_slo(slo)
    if share is not None and len(targets.shares) == len(targets.metrics):
        raise ConfigError(
            "--share: each target of --slo has a percentile of its own, which says how many requests are to meet it; "
            "leave --share out, or one of the percentiles",
            param="share",
        )
    return Goal(targets) if share is None else Goal(targets, share)


def planned(
    known: Sequence[Stored],
    topology: Topology,
    limits: Limits,
    workload: Workload,
    goal: Goal,
    objective: Objective,
    rate: float | None,
    drafter: str | None = None,
    *,
    any_role: bool = False,
    weights: Mapping[str, str] | None = None,
    slo: str = "",
    only: Callable[[Shape], bool] = lambda _: True,
) -> Searched:
    """With shapes of workers as they were profiled; to begin with `only` some. Raises ConfigError."""
    ways = [shape for shape in shapes([one.profile for one in known], limits) if only(shape)]
    space = partial(space_of, topology, ways, limits)
    made = make_plan(space, ways, topology, workload, goal, objective, rate)
    by_name = {shape.name: shape for shape in ways}
    return Searched(made, space, by_name, topology, limits, drafter, workload, goal, any_role, weights, known, slo)


def measured_elsewhere(profiles: Iterable[Profile]) -> list[str]:
    """How this machine and its software differ from those of the profiles, a sentence each."""
    return [warning for profile in profiles for warning in _elsewhere(profile)]


def _elsewhere(profile: Profile) -> list[str]:
    if profile.source != "measured":
        return []
    here = versions()
    if profile.setting.device == "cpu":
        here |= {"device": cpu_name(), "cores": str(usable_cores())}
    known = profile.setting.versions | profile.setting.hardware
    return [
        f"profiled with {name} {known[name]}, and here it is {value}: profile again"
        for name, value in here.items()
        if name in known and str(known[name]) != value
    ]


def cache_tokens_on(topology: Topology, known: Sequence[Stored], limits: Limits) -> int:
    """That a cache of prefixes has on all of these devices. Raises ConfigError."""
    return most_kv_tokens(topology, shapes([one.profile for one in known], limits), limits)


def workload_of(
    trace: Path | None, lengths: str | None, burstiness: float | None = None, cache_tokens: float = math.inf
) -> Workload:
    """Of --trace, whose prompts hit a cache of so many tokens, or of --lengths, which --burstiness is for. Raises
    ConfigError unless it is one of them."""
    if (trace is None) == (lengths is None):
        raise ConfigError("give a --trace, or --lengths such as prompt=512,output=128", param="trace")
    if trace is not None:
        if burstiness is not None:
            raise ConfigError("--burstiness is for --lengths: a trace has a rhythm", param="burstiness")
        return read_trace(trace, cache_tokens=cache_tokens).workload
    from placement.lengths import parse_lengths

    return parse_lengths(lengths or "", burstiness=burstiness or 1.0)


def topology_of(
    kind: str | None,
    file: Path | None,
    devices: int | None,
    profiles: tuple[Path, ...],
    ray_address: str | None = None,
) -> Topology:
    """Of --device, --topology, --ray-address, or this machine. Raises ConfigError."""
    if ray_address is not None:
        if kind is not None or file is not None:
            raise ConfigError("--ray-address says what the topology is: give it, or the other", param="ray_address")
        from cluster.cli_topology import of_cluster

        return of_cluster(ray_address, measure=False)
    if kind is not None:
        if file is not None or profiles:
            raise ConfigError("--device stands for a profile and a topology: give it, or them", param="device")
        if devices is None:
            raise ConfigError("--device: give --devices too, how many there are", param="devices")
        from placement.topology import of_device

        return of_device(kind, devices)
    if file is not None:
        return read_topology(file)
    from cluster.hardware import topology_here

    return topology_here()


def limits_of(
    topology: Topology,
    *,
    devices: int | None,
    chunk_tokens: tuple[int, ...],
    pipeline_parallel_size: tuple[int, ...],
    max_num_seqs: int,
    kv_cache_memory: str | None,
    handoff_min_tokens: int,
    overhead_ms: float,
    drafter: str | None,
    acceptance_length: float | None,
    draft_tokens: int | None,
    draft_ms: float | None,
    learner_devices: str | None,
) -> Limits:
    """Of the flags of these names. Raises ConfigError."""
    if drafter is None and acceptance_length is not None:
        raise ConfigError("--acceptance-length: it is of a drafter; give --speculation too", param="speculation")
    for name, value in {"draft-tokens": draft_tokens, "draft-ms": draft_ms}.items():
        if value is not None and acceptance_length is None:
            raise ConfigError(f"--{name} has no meaning without --acceptance-length; leave it out", param=name)
    settings = {"kv_cache_memory": kv_cache_memory, "speculation": drafter}
    engine = load(None, {name: value for name, value in settings.items() if value}).engine
    speculation = None
    if acceptance_length is not None:
        speculation = Speculation(acceptance_length, 1 + (draft_tokens or _DRAFT_TOKENS), draft_ms or 0.0)
    return Limits(
        stages=pipeline_parallel_size,
        chunk_tokens=chunk_tokens,
        max_sequences=max_num_seqs,
        kv_cache_bytes=kv_cache_bytes_on(topology, engine),
        handoff_min_tokens=handoff_min_tokens,
        overhead_ms=overhead_ms,
        speculation=speculation,
        drafter=drafter,
        learner_devices={} if learner_devices is None else _kept_free(learner_devices, topology.pools),
        devices=devices,
    )


def _kept_free(asked: str, pools: Mapping[str, int]) -> dict[str, int]:
    """For the learner: "2" devices of the first pool that has as many and one to serve with, or "L4=2". Raises
    ConfigError if there is none."""
    kind, _, count = asked.rpartition("=")
    there = " and ".join(f"{size} {pool}" for pool, size in pools.items())
    if not (count.isascii() and count.isdecimal()) or kind not in ("", *pools):
        raise ConfigError(
            f"--learner-devices: {asked!r} is no number of devices, nor KIND=NUMBER of {there}", param="learner_devices"
        )
    able = [pool for pool, size in pools.items() if size > int(count) and kind in ("", pool)]
    if not able:
        raise ConfigError(
            f"--learner-devices {asked}: the topology has {there}, and one of a kind is to serve",
            param="learner_devices",
        )
    return {able[0]: int(count)}


def kv_cache_bytes_on(topology: Topology, engine: EngineSection) -> int | None:
    """Of a worker; None where it finds out on its GPU."""
    if engine.kv_cache_bytes is None and "cpu" in topology.pools:
        return DEFAULT_KV_CACHE_BYTES
    return engine.kv_cache_bytes


def _profiles(model: str, files: tuple[Path, ...], topology: Topology) -> list[Stored]:
    """Those of the files, and rooflines for the devices of the topology that have none."""
    stored = [Stored(read_profile(path), path.absolute()) for path in files]
    measured = [one.profile for one in stored]
    for profile in measured:
        if profile.model.name != model:
            raise ConfigError(f"--profile: it is of {profile.model.name}, not of {model}", param="profile")
        for name in ("fingerprint", "dtype", "quantization"):
            ours, theirs = getattr(measured[0].model, name), getattr(profile.model, name)
            if ours != theirs:
                raise ConfigError(f"--profile: two differ in {name}: {ours} and {theirs}", param="profile")
    missing = [kind for kind in topology.pools if kind not in {profile.setting.device for profile in measured}]
    return stored + [Stored(found, None) for kind in missing for found in _rooflines(model, kind, topology)]


def _rooflines(model: str, kind: str, topology: Topology) -> list[Profile]:
    """One for each way to split the model over devices of a node."""
    from cluster.model_size import roofline_of

    inside = topology.inside(kind)
    link = inside.gb_per_s if inside else None
    found = [roofline_of(model, kind, 1, link)]
    for tp in TENSOR_PARALLEL_SIZES[1:]:
        if tp > topology.most_in_a_node(kind):
            break
        try:
            found.append(roofline_of(model, kind, tp, link))
        except ConfigError:
            continue  # heads that can't be shared out over so many
    return found
