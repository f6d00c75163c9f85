"""Measures the steps of a grid. They are interleaved, so that whatever else the machine does meets all alike, and the
median over the runs counts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench.engine_speed.roofline import weight_bytes
from bench.filled import fill
from bench.profiling.drafting import BATCHES, WHOLE, Effort, measure_drafting
from bench.profiling.neighbours import Neighbours, Work, neighbours
from bench.profiling.steps import Stepper
from bench.setting import setting_of
from cluster.config.engine import EngineSection
from cluster.machine import cpu_name, usable_cores
from cluster.worker import load_runner
from core.errors import ConfigError
from engine.checkpoints import Progress
from engine.kv_cache import KVPool
from engine.kv_layout import DTYPE_BYTES
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from placement.devices import kind_of
from placement.fit import Point
from placement.grid import FULL, QUICK, QUICK_DRAFTING_S, Grid, Shape
from placement.profile import Drafting, ModelFacts, Profile, Setting
from speculation.settings import Settings

RUNS = 3
"""After one that warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    model: str
    folder: Path
    engine: EngineSection
    threads: int
    """Of each rank."""
    quick: bool
    beside: int = 0
    """Workers beside which the steps are measured a second time."""

    speculation: Settings | None = None
    """Drafts that are measured too."""
    dataset: Path | None = None
    """Questions that it drafts answers to; None: some of our own."""

    @property
    def grid(self) -> Grid:
        return QUICK if self.quick else FULL

    @property
    def rounds(self) -> int:
        """Of servers whose workers compute beside each other."""
        return 10 if self.quick else 16


def measure(options: Options, progress: Progress) -> Profile:
    """Raises ConfigError, ModelError."""
    progress.begin(f"loading {options.model}")
    runner = load_runner(options.folder, options.engine, options.threads, options.speculation)
    try:
        if options.beside and runner.pool.device.type != "cpu":
            raise ConfigError("--beside: workers on GPUs have one each; leave it out, or use --device cpu")
        if isinstance(runner.pool, KVPool):
            fill(runner.pool)
        alone, beside_prompts, beside_decodes = _points(options, runner, progress)
        return Profile(
            source="measured",
            model=_facts(options, runner),
            setting=_setting(options, runner),
            points=alone,
            beside_prompts=beside_prompts,
            beside_decodes=beside_decodes,
            drafting=_drafting(options, runner, alone, progress),
        )
    finally:
        runner.shutdown()
        runner.pool.close()


def _drafting(
    options: Options, runner: ModelRunner | GroupRunner, alone: Sequence[Point], progress: Progress
) -> tuple[Drafting, ...]:
    if options.speculation is None:
        return ()
    effort = WHOLE
    if options.quick:
        step_ms = max(point.ms for point in alone if not point.tokens and 0 < point.rows <= max(BATCHES))
        effort = Effort.within(QUICK_DRAFTING_S, step_ms / 1e3)
    return (measure_drafting(runner, options.folder, options.speculation, options.dataset, progress, effort),)


def _points(options: Options, runner: ModelRunner | GroupRunner, progress: Progress) -> list[tuple[Point, ...]]:
    """Alone, and beside others that compute prompts, and such that decode, if there are any."""
    block = runner.layout.block_size
    spare = Stepper.spare_tokens(max(options.grid.shapes(), key=Stepper.spare_tokens)) + block  # of a part of a block
    longest, room = runner.config.max_position_embeddings, runner.pool.num_blocks * block
    shapes = options.grid.fitting(longest, room, spare)
    engine = options.engine.model_dump(exclude_unset=True)

    kinds = [[shape for shape in shapes if bool(shape.prompts) is kind] for kind in (True, False)]
    works = [Work(str(options.folder), engine, options.threads, kind) for kind in kinds] if options.beside else []
    with neighbours(options.beside, works) as beside:
        seconds = _seconds(Stepper(runner), shapes, [None, *beside], progress)
    return [_medians(shapes, found) for found in seconds] + [()] * (3 - len(seconds))


def _medians(shapes: list[Shape], seconds: list[list[float]]) -> tuple[Point, ...]:
    return tuple(
        Point.of(shape.prompts, shape.sequences, shape.context, shape.rows, statistics.median(found) * 1e3)
        for shape, found in zip(shapes, seconds, strict=True)
    )


def _seconds(
    stepper: Stepper, shapes: list[Shape], turns: Sequence[Neighbours | None], progress: Progress
) -> list[list[list[float]]]:
    """Of each step of every shape beside each of `turns`, one right after the other: a machine is not as fast at all
    times, and what a step takes beside others is compared with what it takes alone."""
    progress.begin("measuring steps", len(shapes) * (1 + RUNS) * len(turns))
    seconds: list[list[list[float]]] = [[[] for _ in shapes] for _ in turns]
    loads = product(range(1 + RUNS), enumerate(shapes), enumerate(turns))
    for done, (run, (number, shape), (turn, others)) in enumerate(loads, 1):
        with nullcontext() if others is None else others.computing():
            found = stepper.seconds(shape)
        seconds[turn][number] += found if run else []
        progress.update(done)
    return seconds


def _facts(options: Options, runner: ModelRunner | GroupRunner) -> ModelFacts:
    config, layout, quantization = runner.config, runner.layout, options.engine.quantization
    head = (
        config.vocab_size * config.hidden_size * DTYPE_BYTES[layout.dtype]
    )  # input embeddings, in memory all the same
    read = weight_bytes(options.folder, config, DTYPE_BYTES[layout.dtype], quantization is not None)
    return ModelFacts(
        name=options.model,
        fingerprint=layout.fingerprint,
        dtype=layout.dtype,
        quantization=quantization,
        weight_bytes=read + (0 if config.tie_word_embeddings else head),
        kv_token_bytes=layout.token_bytes,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        max_tokens=config.max_position_embeddings,
    )


def _setting(options: Options, runner: ModelRunner | GroupRunner) -> Setting:
    found = setting_of(runner)
    on_cpu = runner.pool.device.type == "cpu"
    return Setting(
        device="cpu" if on_cpu else kind_of(found["device"]),
        tp=options.engine.tensor_parallel_size,
        threads=options.threads if on_cpu else 1,
        beside=options.beside,
        hardware={"device": cpu_name() if on_cpu else found["device"], "cores": usable_cores()},
        versions=found["versions"],
    )
