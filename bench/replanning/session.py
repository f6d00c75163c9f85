"""From flags to runs: what the workers begin as, at which rates, and each run after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.replanning.measure import Run, measure
from bench.replanning.report import Report, verdict_of
from bench.replanning.shift import Phase, Shift, best_of, best_split, kinds, most_rate, rates_that_matter
from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.replan_setup import Grounds, grounds_of, replanner_of
from cluster.replanning import Replan
from core.errors import ConfigError
from engine.checkpoints import Progress, resolve
from engine.model_config import ModelConfig
from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.moving import way
from placement.profile import Profile, read_profile
from placement.reachable import AS_STARTED, arrangements
from placement.replan_settings import ReplanSettings
from placement.worker_shape import WorkerShape, parse_shapes


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The flags."""

    model: str
    profile: Path
    slo: str
    share: float
    workers: int
    max_workers: int | None
    shapes: str | None
    further: tuple[Path, ...]
    before: str
    after: str
    rates: tuple[float, float] | None
    before_s: float
    after_s: float
    interval: float
    forecast: str
    repeats: int
    seed: int


def run(asked: Asked, progress: Progress) -> Report:
    """Runs without replanning and with it, in turn. Raises ConfigError."""
    profile = read_profile(asked.profile)
    began_as, grounds, shift = _shift(asked, profile)
    config = _config(asked, profile, began_as)
    folder = resolve(asked.model, progress=progress)
    vocabulary = ModelConfig.from_folder(folder).vocab_size
    targets, runs = config.replan.targets, list[Run]()
    for number in range(2 * asked.repeats):
        replanned = number % 2 == 1
        progress.begin(f"{'replanned' if replanned else 'as it was'}: {shift.seconds:g} s of load")
        replan: Replan | None = (replanner_of(config, grounds), "on") if replanned else None
        measured = measure(
            config,
            folder,
            shift.requests(),
            replan,
            threads=profile.setting.threads,
            vocabulary=vocabulary,
            seed=asked.seed + number // 2,
        )
        runs.append(asyncio.run(measured))
    return Report(
        model=asked.model,
        targets=targets,
        share=asked.share,
        shift_s=asked.before_s,
        workers=asked.workers,
        began_as=str(began_as),
        rates=(shift.before.rate, shift.after.rate),
        verdicts=[verdict_of(one, targets, asked.share, asked.before_s, shift.seconds) for one in runs],
        runs=runs,
    )


def _shift(asked: Asked, profile: Profile) -> tuple[Arrangement, Grounds, Shift]:
    """The arrangement to begin with, and the load."""
    some = _config(asked, profile, Arrangement(1, asked.workers - 1, 0, 0))
    grounds = grounds_of(some, profile.setting.threads)
    assert grounds is not None, "replanning is on"
    replanner = replanner_of(some, grounds)
    predictor, chunk_tokens = replanner.predictor, replanner.arrangement.chunk_tokens
    works = kinds(asked.before, asked.after, asked.seed)
    if (shape := _first_shape(asked)) is None:
        now = best_split(predictor, works[0], asked.workers, chunk_tokens, asked.share)
    else:
        alike = [*arrangements(asked.workers * shape.devices, 1, (chunk_tokens,), (shape,))]
        now = best_of(predictor, alike, works[0], asked.share)
    others = [*_others(replanner.settings, now, predictor)]
    rates = asked.rates or rates_that_matter(
        lambda to, phase: most_rate(predictor, to, works[phase], asked.share), now, others
    )
    before, after = (
        Phase(work, rate, seconds)
        for work, rate, seconds in zip(works, rates, (asked.before_s, asked.after_s), strict=True)
    )
    return now, grounds, Shift(before, after)


def _others(settings: ReplanSettings, now: Arrangement, predictor: Predictor) -> Iterator[Arrangement]:
    """That replanning may come to."""
    least, most = settings.devices_of(now.devices)
    for devices in range(least, most + 1):
        for to in arrangements(devices, 1, (now.chunk_tokens,), settings.shapes or AS_STARTED):
            there = not settings.shapes or way(now.of_shapes, to.of_shapes, settings.devices) is not None
            if there and predictor.why_not(to) is None:
                yield to


def _first_shape(asked: Asked) -> WorkerShape | None:
    return parse_shapes(asked.shapes)[0] if asked.shapes else None


def _config(asked: Asked, profile: Profile, arrangement: Arrangement) -> SlipstreamConfig:
    if asked.workers < 2:
        raise ConfigError("--workers: one worker has no roles to change; give 2 or more", param="workers")
    shape = _first_shape(asked) or WorkerShape(profile.setting.tp, 1)
    optional = {
        "quantization": profile.model.quantization,
        "replan_max_workers": asked.max_workers,
        "replan_shapes": asked.shapes,
        "replan_further_profiles": asked.further or None,
        "colocated": bool(arrangement.both) or None,
    }
    settings: dict[str, Any] = {
        "model": asked.model,
        "device": "cpu" if profile.setting.device == "cpu" else "cuda",
        "dtype": profile.model.dtype,
        "tensor_parallel_size": shape.tp,
        "pipeline_parallel_size": shape.pp,
        "decode_replicas": arrangement.decode + arrangement.both,
        "handoff_min_tokens": 0,
        "max_num_batched_tokens": profile.range.tokens,
        "max_num_seqs": min(32, profile.range.sequences),
        "replan": "on",
        "replan_profile": asked.profile,
        "replan_slo": asked.slo,
        "replan_share": asked.share,
        "replan_interval": asked.interval,
        "replan_forecast": asked.forecast,
    }
    if arrangement.prefill:
        settings["prefill_replicas"] = arrangement.prefill
    return load(None, settings | {name: value for name, value in optional.items() if value is not None})
