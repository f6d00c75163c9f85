"""From the configuration to a replanner of the cluster that it describes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from cluster.config.tree import SlipstreamConfig
from cluster.planning import measured_elsewhere
from cluster.ray_nodes import nodes_of
from cluster.ray_topology import topology_of
from core.errors import ConfigError
from core.types import Role
from placement.arranged import Simulated, simulated
from placement.arrangement import Arrangement
from placement.doubts import doubts
from placement.forecast import maker, season_of
from placement.goodput import Goal
from placement.moving import way
from placement.profile import Profile, read_profile
from placement.reachable import AS_STARTED, arrangements
from placement.replanner import Replanner, ReplanSettings
from placement.shaped import Shaped, shaped
from placement.shapes import Limits
from placement.topology import Topology
from placement.traces import read_trace
from placement.traffic import Period, history

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Grounds(Struct, frozen=True):
    """What replanning reckons with: read where the cluster is started, used where it is controlled."""

    profile: Profile
    topology: Topology
    before: tuple[Period, ...]
    """What has come earlier."""
    further: tuple[Profile, ...] = ()
    """Of workers of each other TP that shapes may have."""


def grounds_of(config: SlipstreamConfig, threads: int) -> Grounds | None:
    """None if nothing is to be replanned. `threads`: of a worker's processes. Raises ConfigError for a profile that is
    not of such a worker, and for whatever `replanner_of` refuses."""
    if config.replan.mode == "off" or config.replan.profile is None:
        return None
    (profile, *rest), earlier = read_files(config)
    further = tuple(rest)
    for path, one in zip((config.replan.profile, *config.replan.further_profiles), (profile, *further), strict=True):
        _check(config, path, one, threads)
    grounds = Grounds(profile, _topology(config), tuple(earlier), further)
    workers = predictor_of(config, grounds)
    if stuck := _stuck(_replanner(config, grounds, workers)):
        logger.warning("replan: %s", stuck)
    for warning in _doubts(config, grounds, workers):
        logger.warning("replan.profile: %s", warning)
    return grounds


def _topology(config: SlipstreamConfig) -> Topology:
    """Of the nodes of the Ray cluster that was joined, or of this machine; of their cores for workers on these."""
    on_cpu = config.engine.device == "cpu"
    if config.cluster.ray_address is None:
        from cluster.hardware import topology_here

        return topology_here(on_cpu=on_cpu)
    import ray

    nodes = nodes_of(ray.nodes())
    return topology_of([replace(node, gpus=0.0) for node in nodes] if on_cpu else nodes)


def read_files(config: SlipstreamConfig) -> tuple[list[Profile], list[Period]]:
    """What the files of replanning say: profiles, that of the workers as configured first, and what has come earlier.
    Raises ConfigError by the setting that names the file."""
    replan = config.replan
    files = [("profile", replan.profile), *(("further_profiles", path) for path in replan.further_profiles)]
    profiles = [_of(setting, read_profile, path) for setting, path in files if path is not None]
    if replan.warm_start is None:
        return profiles, []
    period_s = settings_of(config).predictive_s
    return profiles, _of("warm_start", lambda path: history(read_trace(path), period_s), replan.warm_start)


def _of(setting: str, read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except ConfigError as error:
        raise ConfigError(f"replan.{setting}: {error.message}", param=f"replan_{setting}") from error


def _doubts(config: SlipstreamConfig, grounds: Grounds, workers: Simulated | Shaped) -> list[str]:
    """Workers that are started on other machines of a Ray cluster may be as they were profiled."""
    profiles = (grounds.profile, *grounds.further)
    most = config.most_workers if isinstance(workers, Simulated) else config.most_devices
    found = doubts(profiles, grounds.topology, workers, most, max(settings_of(config).chunk_tokens))
    if config.cluster.ray_address is None:
        found += measured_elsewhere(profiles)
    return found


def predictor_of(config: SlipstreamConfig, grounds: Grounds) -> Simulated | Shaped:
    """A cluster of Ray's may have more nodes, which are taken to be like this one. Raises ConfigError for workers that
    can't be simulated as they are configured, and for a shape that no profile is of."""
    engine, settings = config.engine, settings_of(config)
    limits = Limits(
        stages=(engine.pipeline_parallel_size,),
        chunk_tokens=settings.chunk_tokens,
        max_sequences=engine.sequences,
        kv_cache_bytes=engine.kv_cache_bytes,
        handoff_min_tokens=config.cluster.handoff_min_tokens or 0,
        drafter=config.speculation.together,
    )
    further_nodes, targets = config.cluster.ray_address is not None, config.replan.targets
    if shapes := config.replan.worker_shapes:
        profiles = (grounds.profile, *grounds.further)
        try:
            return shaped(profiles, shapes, grounds.topology, limits, targets, further_nodes=further_nodes)
        except ConfigError as error:
            raise ConfigError(f"replan.shapes: {error.message}", param="replan_shapes") from error
    return simulated(grounds.profile, grounds.topology, limits, targets, further_nodes=further_nodes)


def replanner_of(config: SlipstreamConfig, grounds: Grounds) -> Replanner:
    """Raises ConfigError for workers that can't be simulated as they are configured."""
    return _replanner(config, grounds, predictor_of(config, grounds))


def settings_of(config: SlipstreamConfig) -> ReplanSettings:
    """Steps may stay as they are configured, too."""
    replan = config.replan
    return ReplanSettings.paced(
        replan.interval,
        goal=Goal(replan.targets, replan.share),
        chunk_tokens=tuple(sorted({*replan.chunk_tokens, arrangement_as_configured(config).chunk_tokens})),
        horizon_s=replan.horizon,
        least_workers=replan.floor,
        most_workers=replan.max_workers or 0,
        shapes=replan.worker_shapes,
        devices=config.most_devices if replan.shapes else 0,
        ending_s=config.gateway.drain_timeout_s,
    )


def arrangement_as_configured(config: SlipstreamConfig) -> Arrangement:
    """Steps are those of the workers that compute prompts."""
    roles = config.cluster.roles
    prompts = Role.PREFILL if Role.PREFILL in roles else Role.BOTH
    prefill, decode, both = (roles.get(role, 0) for role in (Role.PREFILL, Role.DECODE, Role.BOTH))
    chunk_tokens = config.engine.batched_tokens(prompts)
    if not config.replan.shapes:
        return Arrangement(prefill, decode, both, chunk_tokens)
    decode_shape = config.shape_of(Role.BOTH)
    prefill_shape = config.shape_of(Role.PREFILL) if prefill else decode_shape
    return Arrangement(prefill, decode, both, chunk_tokens, prefill_shape, decode_shape)


def _replanner(config: SlipstreamConfig, grounds: Grounds, workers: Simulated | Shaped) -> Replanner:
    replan, settings = config.replan, settings_of(config)
    season = season_of(replan.season, settings.predictive_s, "replan.season")
    forecast = maker(replan.forecast, season, [period.rate for period in grounds.before])
    return Replanner(settings, workers, arrangement_as_configured(config), forecast, grounds.before)


def _stuck(replanner: Replanner) -> str | None:
    """Why replanning can change nothing; None if it can."""
    settings, now = replanner.settings, replanner.arrangement
    most, shapes = settings.devices_of(now.devices)[1], settings.shapes or AS_STARTED
    numbers = range(1, most + 1) if settings.most_workers else (most,)
    reachable = (
        to for count in numbers for to in arrangements(count, settings.least_workers, settings.chunk_tokens, shapes)
    )
    possible = (to for to in reachable if to != now and replanner.predictor.why_not(to) is None)
    if any(not settings.shapes or way(now.of_shapes, to.of_shapes, settings.devices) is not None for to in possible):
        return None
    return (
        f"nothing can be changed while there is no other way to use {now.workers} worker{'s' * (now.workers > 1)}: "
        "allow more with --replan-max-workers, or other steps with --replan-chunk-tokens"
    )


def _check(config: SlipstreamConfig, path: Path, profile: Profile, threads: int) -> None:
    setting, engine = profile.setting, config.engine
    pairs: dict[str, tuple[object, object]] = {
        "model": (profile.model.name, config.model),
        "quantization": (profile.model.quantization, engine.quantization),
    }
    if not config.replan.shapes:
        pairs["tensor_parallel_size"] = setting.tp, engine.tensor_parallel_size
    if setting.device == "cpu":
        pairs["threads"] = (setting.threads, threads)
    for name, (of_profile, here) in pairs.items():
        if of_profile != here:
            raise ConfigError(
                f"replan.profile: {path} has {name} {of_profile}, and the workers have {here}; profile such a worker",
                param="replan_profile",
            )
    on_cpu = setting.device == "cpu"
    if on_cpu != (engine.device == "cpu"):
        raise ConfigError(
            f"replan.profile: it is of {setting.device}, and the workers compute on {engine.device}",
            param="replan_profile",
        )
    drafter = config.speculation.together
    if drafter is not None and drafter not in {known.drafter for known in profile.drafting}:
        raise ConfigError(
            f"replan.profile: {path} knows nothing of drafts by {drafter}, and the workers have them; "
            f"profile with --speculation {drafter}",
            param="replan_profile",
        )
    for size in config.replan.chunk_tokens:
        if not on_cpu and size > engine.batched_tokens(Role.PREFILL):
            raise ConfigError(
                f"replan.chunk_tokens: steps of {size} tokens are more than the {engine.batched_tokens(Role.PREFILL)} "
                "that a GPU's memory is left free for; raise max_num_batched_tokens",
                param="replan_chunk_tokens",
            )
