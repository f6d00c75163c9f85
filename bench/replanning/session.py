"""From flags to runs: what the workers begin as, at which rates, and each run after the other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.replanning.measure import Run, measure
from bench.replanning.report import Report, verdict_of
from bench.replanning.shift import Phase, Shift, best_split, kinds, most_rate, rates_that_matter
from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.replan_setup import Grounds, grounds_of, replanner_of
from cluster.replanning import Replan
from core.errors import ConfigError
from engine.checkpoints import Progress, resolve
from engine.model_config import ModelConfig
from placement.arrangement import Arrangement
from placement.profile import Profile, read_profile
from placement.reachable import arrangements


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The flags."""

    model: str
    profile: Path
    slo: str
    share: float
    workers: int
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
    now = best_split(predictor, works[0], asked.workers, chunk_tokens, asked.share)
    others = [to for to in arrangements(asked.workers, 1, (chunk_tokens,)) if predictor.why_not(to) is None]
    rates = asked.rates or rates_that_matter(
        lambda to, phase: most_rate(predictor, to, works[phase], asked.share), now, others
    )
    before, after = (
        Phase(work, rate, seconds)
        for work, rate, seconds in zip(works, rates, (asked.before_s, asked.after_s), strict=True)
    )
    return now, grounds, Shift(before, after)


def _config(asked: Asked, profile: Profile, arrangement: Arrangement) -> SlipstreamConfig:
    if asked.workers < 2:
        raise ConfigError("--workers: one worker has no roles to change; give 2 or more", param="workers")
    settings: dict[str, Any] = {
        "model": asked.model,
        "device": "cpu" if profile.setting.device == "cpu" else "cuda",
        "dtype": profile.model.dtype,
        "tensor_parallel_size": profile.setting.tp,
        "prefill_replicas": arrangement.prefill,
        "decode_replicas": arrangement.decode,
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
    if profile.model.quantization is not None:
        settings["quantization"] = profile.model.quantization
    return load(None, settings)
