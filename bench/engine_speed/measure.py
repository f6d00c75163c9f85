"""Drives an engine step by step, as its loop does, and times the steps.

Decode steps run on sequences that join as if their KV had come from a prefill worker. A run is DECODE_STEPS steps
around the context asked for, and its figure is their mean; runs of all batch sizes and of the prefill are interleaved,
so that whatever else the machine does meets them alike, and the median over the runs is the result.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine_speed.roofline import copy_bandwidth, step_bytes, weight_bytes
from bench.engine_speed.shares import shares
from bench.engine_speed.timing import Step, timed_step
from bench.filled import fill
from bench.setting import setting_of
from cluster.config.engine import EngineSection
from core.errors import ConfigError
from core.types import Request, Role, SamplingParams
from engine.block_manager import BlockManager
from engine.kv_layout import DTYPE_BYTES
from engine.model_config import ModelConfig
from engine.quantization.methods import Method
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence

DECODE_STEPS = 21
"""Of a run. An odd number: as many before the context asked for as after it."""
_SPARE_TOKENS = DECODE_STEPS + 1
"""Room to give a sequence beyond its prompt, so that it doesn't end in the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    batches: tuple[int, ...]
    context: int
    """Tokens in the cache before a decode step, on average."""
    prompts: int
    prompt_tokens: int
    runs: int
    threads: int | None
    dtype: str
    device: str
    temperature: float
    quantization: Method | None = None

    def check(self, longest: int) -> None:
        """Raise ConfigError unless a model of `longest` positions can be measured so."""
        if not DECODE_STEPS // 2 < self.context <= longest - _SPARE_TOKENS:
            raise ConfigError(
                f"--context: {self.context} is not between {DECODE_STEPS // 2 + 1} and {longest - _SPARE_TOKENS}, "
                f"which a model of {longest} positions leaves room for; choose one of these"
            )
        if self.prompt_tokens > longest - _SPARE_TOKENS:
            raise ConfigError(
                f"--prefill: prompts of {self.prompt_tokens} tokens are too long for a model of {longest} positions; "
                f"give them at most {longest - _SPARE_TOKENS}"
            )


class Bench:
    """One engine without a thread of its own. Each run has a scheduler and a prefix cache of its own."""

    def __init__(self, folder: Path, options: Options) -> None:
        config = ModelConfig.from_folder(folder)
        options.check(config.max_position_embeddings)
        block_size = EngineSection().block_size
        longest = max(options.context, options.prompt_tokens) + _SPARE_TOKENS
        self.runner = ModelRunner.load(
            folder,
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            quantization=options.quantization,
            block_size=block_size,
            num_blocks=max(*options.batches, options.prompts) * -(-longest // block_size),
        )
        fill(self.runner.pool)
        self.runner.warm_up()
        self._options = options
        self._random = random.Random(0)

    def close(self) -> None:
        self.runner.shutdown()
        self.runner.pool.close()

    # --- runs ------------------------------------------------------------------------------------------------------

    def prefill_tokens_per_s(self) -> float:
        """One run: all prompts come at once to a prefill worker with the default token budget."""
        count, length = self._options.prompts, self._options.prompt_tokens
        budget = max(EngineSection().batched_tokens(Role.PREFILL), count)
        scheduler = self._scheduler(count, budget)
        for _ in range(count):
            scheduler.add(self._sequence(length, hold_after_prefill=True))
        seconds = 0.0
        while scheduler.has_work:
            seconds += self._step(scheduler).seconds
        return count * length / seconds

    def decode(self, batch: int) -> list[Step]:
        """One run."""
        return self.ready_to_decode(batch)()

    def ready_to_decode(self, batch: int) -> Callable[[], list[Step]]:
        """What is left to do of a run once its sequences are in the batch."""
        scheduler = self._scheduler(batch, batch)
        for _ in range(batch):
            scheduler.reserve(self._sequence(self._options.context - DECODE_STEPS // 2))
        for sequence in scheduler.schedule().granted:
            scheduler.join(sequence.request_id, [self._token()])
        return lambda: [self._step(scheduler) for _ in range(DECODE_STEPS)]

    def _step(self, scheduler: Scheduler) -> Step:
        return timed_step(self.runner, scheduler)

    # --- what runs are made of -------------------------------------------------------------------------------------

    def _scheduler(self, max_num_seqs: int, max_num_batched_tokens: int) -> Scheduler:
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.runner.config.max_position_embeddings,
        )
        return Scheduler(config, BlockManager(self.runner.pool.num_blocks, self.runner.layout.block_size))

    def _sequence(self, length: int, hold_after_prefill: bool = False) -> Sequence:
        sampling = SamplingParams(
            max_tokens=_SPARE_TOKENS + 1, temperature=self._options.temperature, seed=self._random.getrandbits(32)
        )
        request = Request(
            request_id=f"{self._random.getrandbits(64):x}",
            prompt_token_ids=[self._token() for _ in range(length)],
            sampling=sampling,
            deadline=0.0,
        )
        return Sequence(request, hold_after_prefill=hold_after_prefill)

    def _token(self) -> int:
        return self._random.randrange(self.runner.config.vocab_size)


# --- the result ----------------------------------------------------------------------------------------------------

_OVER_RUNS: dict[str, Callable[[Iterable[float]], float]] = {"": statistics.median, "_min": min, "_max": max}


def measure(folder: Path, options: Options) -> dict[str, Any]:
    """The JSON result, but for the model's name. Raises ConfigError, ModelError."""
    bench = Bench(folder, options)
    try:
        prefill, decode = _runs(bench, options)
        return {
            **_setting(bench.runner, options),
            **{
                f"decode_ms{name}": {batch: pick(step.seconds for step in runs) * 1e3 for batch, runs in decode.items()}
                for name, pick in _OVER_RUNS.items()
            },
            **{f"prefill_tokens_per_s{name}": pick(prefill) for name, pick in _OVER_RUNS.items()},
            "shares": {batch: _shares(bench, batch, runs) for batch, runs in decode.items()},
            **_roofline(folder, bench.runner, options, decode),
        }
    finally:
        bench.close()


def _runs(bench: Bench, options: Options) -> tuple[list[float], dict[int, list[Step]]]:
    """Of each run, the prefill's tokens per second, and the mean step by batch size. The first round warms up."""
    prefill: list[float] = []
    decode: dict[int, list[Step]] = {batch: [] for batch in options.batches}
    for _ in range(1 + options.runs):
        prefill.append(bench.prefill_tokens_per_s())
        for batch, runs in decode.items():
            runs.append(_mean(bench.decode(batch)))
    return prefill[1:], {batch: runs[1:] for batch, runs in decode.items()}


def _mean(steps: list[Step]) -> Step:
    return Step(statistics.fmean(s.seconds for s in steps), statistics.fmean(s.scheduling_s for s in steps))


def _shares(bench: Bench, batch: int, runs: list[Step]) -> dict[str, float]:
    ready = bench.ready_to_decode(batch)

    def run() -> tuple[float, float]:
        steps = ready()
        return sum(step.seconds for step in steps), sum(step.scheduling_s for step in steps)

    plain = statistics.median(step.seconds for step in runs)
    return shares(run, bench.runner.pool.device, plain * DECODE_STEPS)


def _roofline(folder: Path, runner: ModelRunner, options: Options, decode: dict[int, list[Step]]) -> dict[str, Any]:
    bandwidth = copy_bandwidth(runner.pool.device)
    weights = weight_bytes(folder, runner.config, DTYPE_BYTES[runner.layout.dtype], options.quantization is not None)
    moved = {batch: step_bytes(weights, runner.layout.token_bytes, batch, options.context) for batch in decode}
    fractions = {
        batch: moved[batch] / bandwidth / statistics.median(step.seconds for step in runs)
        for batch, runs in decode.items()
    }
    return {"roofline_fraction": fractions, "step_bytes": moved, "bandwidth_gb_s": bandwidth / 1e9}


def _setting(runner: ModelRunner, options: Options) -> dict[str, Any]:
    return {
        **setting_of(runner),
        "quantization": options.quantization,
        "context": options.context,
        "prefill": f"{options.prompts}x{options.prompt_tokens}",
        "temperature": options.temperature,
        "runs": options.runs,
    }
