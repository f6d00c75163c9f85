"""From the flags of `slipstream plan replay` to a replay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from cluster.planning import limits_of, topology_of
from core.errors import ConfigError
from placement.arranged import Simulated, simulated
from placement.crowding import crowded_cluster
from placement.forecast import maker
from placement.goodput import Goal
from placement.profile import Profile, read_profile
from placement.replan_settings import ReplanSettings
from placement.replanner import Replanner
from placement.replay import Replayed, replay
from placement.replay_start import start_of
from placement.slo import of_all_together, parse_slo
from placement.topology import Topology
from placement.traces import read_trace
from placement.traffic import history


@dataclass(frozen=True, kw_only=True)
class Asked:
    trace: Path
    profile: Path
    slo: str
    share: float
    workers: int
    max_workers: int | None
    start: str | None
    forecast: str
    season: float | None
    warm_start: Path | None
    rate: float | None
    interval: float
    horizon: float
    floor: int
    chunk_tokens: tuple[int, ...]
    pipeline_parallel_size: int
    topology_file: Path | None
    max_num_seqs: int
    kv_cache_memory: str | None
    handoff_min_tokens: int
    overhead_ms: float
    drafter: str | None
    acceptance_length: float | None
    draft_tokens: int | None
    draft_ms: float | None


def replayed(asked: Asked) -> Replayed:
    """Raises ConfigError by the name of the flag."""
    profile, topology = read_profile(asked.profile), topology_of(None, asked.topology_file, None, ())
    settings, workers = _settings(asked), _workers(asked, profile, topology)
    trace = read_trace(asked.trace)
    workload = trace.workload.no_longer_than(workers.longest)
    rate = trace.rate if asked.rate is None else asked.rate
    rate *= len(workload) / len(trace.workload)
    start = start_of(asked.start, asked.workers, settings, workers, workload, rate)
    before = [] if asked.warm_start is None else history(read_trace(asked.warm_start), settings.predictive_s)
    forecast = maker(asked.forecast, _season(asked, settings), [period.rate for period in before])
    replanner = Replanner(settings, workers, start, forecast, before)
    found = replay(workload, rate, workers, replanner, left_out=len(trace.workload) - len(workload))
    crowd = crowded_cluster(profile, topology, workers, max(asked.workers, asked.max_workers or 0))
    return replace(found, warnings=[warning for warning in (profile.doubt(), crowd) if warning])


def _settings(asked: Asked) -> ReplanSettings:
    if asked.max_workers is not None and asked.max_workers < asked.workers:
        raise ConfigError(f"--max-workers {asked.max_workers}: --workers has {asked.workers}", param="max_workers")
    return ReplanSettings.paced(
        asked.interval,
        goal=Goal(of_all_together(parse_slo(asked.slo)), asked.share),
        chunk_tokens=tuple(sorted(asked.chunk_tokens)),
        horizon_s=asked.horizon,
        least_workers=asked.floor,
        most_workers=asked.max_workers or 0,
    )


def _workers(asked: Asked, profile: Profile, topology: Topology) -> Simulated:
    limits = limits_of(
        topology,
        devices=None,
        chunk_tokens=asked.chunk_tokens,
        pipeline_parallel_size=(asked.pipeline_parallel_size,),
        max_num_seqs=asked.max_num_seqs,
        kv_cache_memory=asked.kv_cache_memory,
        handoff_min_tokens=asked.handoff_min_tokens,
        overhead_ms=asked.overhead_ms,
        drafter=asked.drafter,
        acceptance_length=asked.acceptance_length,
        draft_tokens=asked.draft_tokens,
        draft_ms=asked.draft_ms,
        learner_devices=None,
    )
    return simulated(profile, topology, limits, parse_slo(asked.slo))


def _season(asked: Asked, settings: ReplanSettings) -> int:
    """In periods of the forecast."""
    if asked.season is None:
        return 0
    periods = round(asked.season / settings.predictive_s)
    if periods < 2:
        raise ConfigError(
            f"--season {asked.season:g}: it is two periods of the forecast at the least, and one is "
            f"{settings.predictive_s:g} s; lower --interval",
            param="season",
        )
    return periods
