"""From the configuration to a replanner of the cluster that it describes."""

from __future__ import annotations

import logging

from msgspec import Struct

from cluster.config import SlipstreamConfig
from core.errors import ConfigError
from core.types import Role
from placement.arranged import simulated
from placement.arrangement import Arrangement
from placement.forecast import maker
from placement.goodput import Goal
from placement.profile import Profile, read_profile
from placement.replanner import Replanner, ReplanSettings
from placement.shapes import Limits
from placement.topology import Topology
from placement.traces import read_trace
from placement.traffic import Period, history

logger = logging.getLogger(__name__)


class Grounds(Struct, frozen=True):
    """What replanning reckons with: read where the cluster is started, used where it is controlled."""

    profile: Profile
    topology: Topology
    before: tuple[Period, ...]
    """What has come earlier."""


def grounds_of(config: SlipstreamConfig, threads: int) -> Grounds | None:
    """None if nothing is to be replanned. `threads`: of a worker's processes. Raises ConfigError for a profile that is
    not of such a worker, and for whatever `replanner_of` refuses."""
    if config.replan.mode == "off" or config.replan.profile is None:
        return None
    from cluster.hardware import topology_here

    profile = read_profile(config.replan.profile)
    _check(config, profile, threads)
    warm_start = config.replan.warm_start
    earlier = [] if warm_start is None else history(read_trace(warm_start), settings_of(config).predictive_s)
    grounds = Grounds(profile, topology_here(), tuple(earlier))
    devices, there = config.most_workers * config.engine.ranks * threads, sum(grounds.topology.pools.values())
    if profile.setting.device == "cpu" and devices > there and config.cluster.ray_address is None:
        logger.warning("%d workers share %d cores: what is predicted takes %d", config.most_workers, there, devices)
    replanner_of(config, grounds)
    return grounds


def replanner_of(config: SlipstreamConfig, grounds: Grounds) -> Replanner:
    """Drafts are left out: how many are accepted is not known before. Raises ConfigError for workers that can't be
    simulated as they are configured."""
    engine, settings = config.engine, settings_of(config)
    limits = Limits(
        stages=(engine.pipeline_parallel_size,),
        chunk_tokens=settings.chunk_tokens,
        max_sequences=engine.sequences,
        kv_cache_bytes=engine.kv_cache_bytes,
        handoff_min_tokens=config.cluster.handoff_min_tokens or 0,
    )
    predictor = simulated(grounds.profile, grounds.topology, limits, config.replan.targets)
    forecast = maker(config.replan.forecast, warm=[period.rate for period in grounds.before])
    return Replanner(settings, predictor, arrangement_as_configured(config), forecast, grounds.before)


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
    )


def arrangement_as_configured(config: SlipstreamConfig) -> Arrangement:
    """Steps are those of the workers that compute prompts."""
    roles = config.cluster.roles
    prompts = Role.PREFILL if Role.PREFILL in roles else Role.BOTH
    counts = {role.value: roles.get(role, 0) for role in Role}
    return Arrangement(**counts, chunk_tokens=config.engine.batched_tokens(prompts))


def _check(config: SlipstreamConfig, profile: Profile, threads: int) -> None:
    setting, engine = profile.setting, config.engine
    pairs: dict[str, tuple[object, object]] = {
        "model": (profile.model.name, config.model),
        "tensor_parallel_size": (setting.tp, engine.tensor_parallel_size),
        "quantization": (profile.model.quantization, engine.quantization),
    }
    if setting.device == "cpu":
        pairs["threads"] = (setting.threads, threads)
    for name, (of_profile, here) in pairs.items():
        if of_profile != here:
            raise ConfigError(
                f"replan.profile: {config.replan.profile} has {name} {of_profile}, and the workers have {here}; "
                "profile such a worker",
                param="replan_profile",
            )
    on_cpu = setting.device == "cpu"
    if on_cpu != (engine.device == "cpu"):
        raise ConfigError(
            f"replan.profile: it is of {setting.device}, and the workers compute on {engine.device}",
            param="replan_profile",
        )
    for size in config.replan.chunk_tokens:
        if not on_cpu and size > engine.batched_tokens(Role.PREFILL):
            raise ConfigError(
                f"replan.chunk_tokens: steps of {size} tokens are more than the {engine.batched_tokens(Role.PREFILL)} "
                "that a GPU's memory is left free for; raise max_num_batched_tokens",
                param="replan_chunk_tokens",
            )
