"""From the flags of `slipstream plan replay` to a replay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from cluster.planning import limits_of, measured_elsewhere, topology_of
from core.errors import ConfigError
from placement.arranged import Simulated, simulated
from placement.doubts import doubts
from placement.forecast import maker, season_of
from placement.goodput import Goal
from placement.profile import Profile, read_profile
from placement.replan_settings import ReplanSettings
from placement.replanner import Replanner
from placement.replay import Replayed, replay
from placement.replay_start import start_of
from placement.shaped import Shaped, shaped
from placement.slo import of_all_together, parse_slo
from placement.topology import Topology
from placement.traces import read_trace
from placement.traffic import history
from placement.worker_shape import WorkerShape, parse_shapes


@dataclass(frozen=True, kw_only=True)
class Asked:
    trace: Path
    profiles: tuple[Path, ...]
    shapes: str | None
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
    profiles = [read_profile(path) for path in asked.profiles]
    topology, shapes = topology_of(None, asked.topology_file, None, ()), _shapes(asked)
    settings, workers = _settings(asked, shapes), _workers(asked, shapes, profiles, topology)
    worker = workers if isinstance(workers, Simulated) else workers.of[shapes[0]]
    read = partial(read_trace, cache_tokens=asked.workers * worker.group.kv_tokens)
    trace = read(asked.trace)
    workload = trace.workload.no_longer_than(workers.longest)
    rate = trace.rate if asked.rate is None else asked.rate
    rate *= len(workload) / len(trace.workload)
    start = start_of(asked.start, asked.workers, settings, workers, workload, rate)
    before = [] if asked.warm_start is None else history(read(asked.warm_start), settings.predictive_s)
    forecast = maker(
        asked.forecast, season_of(asked.season, settings.predictive_s, "--season"), [period.rate for period in before]
    )
    replanner = Replanner(settings, workers, start, forecast, before)
    found = replay(workload, rate, workers, replanner, left_out=len(trace.workload) - len(workload))
    most = settings.devices if shapes else max(asked.workers, asked.max_workers or 0)
    warnings = doubts(profiles, topology, workers, most, max(asked.chunk_tokens), workload)
    if asked.topology_file is None:
        warnings += measured_elsewhere(profiles)
    return replace(found, warnings=warnings)


def _shapes(asked: Asked) -> tuple[WorkerShape, ...]:
    if asked.shapes is None:
        return ()
    if asked.pipeline_parallel_size != 1:
        raise ConfigError("--pipeline-parallel-size: --shapes has the PP of each shape; leave it out", param="shapes")
    try:
        return parse_shapes(asked.shapes)
    except ConfigError as error:
        raise ConfigError(f"--shapes: {error.message}", param="shapes") from error


def _settings(asked: Asked, shapes: tuple[WorkerShape, ...]) -> ReplanSettings:
    if asked.max_workers is not None and asked.max_workers < asked.workers:
        raise ConfigError(f"--max-workers {asked.max_workers}: --workers has {asked.workers}", param="max_workers")
    return ReplanSettings.paced(
        asked.interval,
        goal=Goal(of_all_together(parse_slo(asked.slo)), asked.share),
        chunk_tokens=tuple(sorted(asked.chunk_tokens)),
        horizon_s=asked.horizon,
        least_workers=asked.floor,
        most_workers=asked.max_workers or 0,
        shapes=shapes,
        devices=(asked.max_workers or asked.workers) * shapes[0].devices if shapes else 0,
    )


def _workers(
    asked: Asked, shapes: tuple[WorkerShape, ...], profiles: list[Profile], topology: Topology
) -> Simulated | Shaped:
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
    if shapes:
        return shaped(profiles, shapes, topology, limits, parse_slo(asked.slo))
    if len(profiles) > 1:
        raise ConfigError("--profile: workers are of one shape; give one profile, or --shapes too", param="profile")
    return simulated(profiles[0], topology, limits, parse_slo(asked.slo))
