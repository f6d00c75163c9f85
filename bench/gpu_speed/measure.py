"""Times steps of a ModelRunner, as serving runs them: from a StepBatch to the tokens on the host.

A decode run is STEPS steps, each with the tokens that the one before drew. Its figure is the median step, and the
result the median over the runs; all kinds of runs are interleaved, after a first round that warms up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch

from bench.engine_speed.roofline import copy_bandwidth, step_bytes
from bench.filled import fill
from bench.gpu_speed.limits import decode_weights, matmul_rate, prefill_operations
from bench.gpu_speed.shapes import shape_config
from bench.gpu_speed.weights import RandomWeights
from core.errors import ConfigError
from core.types import SamplingParams
from engine.cuda.choice import Kernel
from engine.cuda.paged import settle
from engine.device import resolve_device, resolve_dtype
from engine.kv_cache import DTYPES, KVPool
from engine.kv_layout import KVLayout
from engine.linears import Linears
from engine.models.registry import build
from engine.parallel.split import WHOLE
from engine.runner import ModelRunner
from engine.step import SamplingRow, StepBatch

STEPS = 21
BLOCK_SIZE = 16
GOALS = {"decode 1": 0.80, "decode 64": 0.75, "prefill": 0.60}
"""Shares of the roofline to reach: of the copy bandwidth in decoding, of the matmul rate in prefill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    shape: str
    batches: tuple[int, ...]
    context: int
    """Tokens in the cache of each sequence before the first decode step of a run."""
    prefill: int
    """Tokens of the prompt."""
    step_tokens: int
    """Of the prompt in one step, at most."""
    runs: int
    dtype: str
    device: str
    attention: Kernel | Literal["auto"]
    enforce_eager: bool
    temperature: float


class Bench:
    """A runner of one of the shapes."""

    def __init__(self, options: Options) -> None:
        """Raises ConfigError for a machine that lacks what is asked for, and lengths that are not the model's."""
        self.config = config = shape_config(options.shape)
        _check_lengths(options, config.max_position_embeddings)
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        self.settled = settle(
            options.attention,
            config,
            WHOLE,
            DTYPES[dtype],
            device,
            graph_rows=max(options.batches),
            enforce_eager=options.enforce_eager,
        )
        weights = RandomWeights(device=device, dtype=DTYPES[dtype])
        with torch.inference_mode():
            model = build(config, weights, Linears(weights, kv_heads=config.num_kv_heads))
        self.sizes = weights.sizes
        self._each = -(-(options.context + STEPS) // BLOCK_SIZE)
        layout = KVLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            dtype=dtype,
            block_size=BLOCK_SIZE,
            fingerprint=options.shape,
        )
        blocks = max(max(options.batches) * self._each, -(-options.prefill // BLOCK_SIZE))
        self.runner = ModelRunner(config, model, KVPool(layout, blocks, device), cuda=self.settled)
        self.runner.warm_up()
        fill(self.runner.pool)
        self._options = options
        self._blocks = np.random.default_rng(0).permutation(blocks)

    def close(self) -> None:
        self.runner.shutdown()
        self.runner.pool.close()

    def decode_s(self, batch: int) -> float:
        """The median step of a run."""
        tables = tuple(self._blocks[: batch * self._each].reshape(batch, -1))
        tokens, seconds = np.arange(batch, dtype=np.int64) % self.config.vocab_size, []
        for step in range(STEPS):
            contexts = np.full(batch, self._options.context + step)
            started = time.perf_counter()
            output = self.runner.submit(self._batch(tokens, contexts, tables, 1, step)).result()
            seconds.append(time.perf_counter() - started)
            tokens = output.token_ids
        return statistics.median(seconds)

    def prefill_s(self) -> float:
        """All of the prompt, to its first token."""
        length, most = self._options.prefill, self._options.step_tokens
        tokens = np.random.default_rng(1).integers(0, self.config.vocab_size, length)
        started = time.perf_counter()
        for start in range(0, length, most):
            part = tokens[start : start + most]
            self.runner.submit(self._batch(part, np.array([start]), (self._blocks,), len(part), 0)).result()
        return time.perf_counter() - started

    def _batch(
        self, tokens: np.ndarray, contexts: np.ndarray, tables: Sequence[np.ndarray], rows: int, position: int
    ) -> StepBatch:
        """`rows` of each sequence, of which the last draws."""
        positions = (contexts[:, None] + np.arange(rows)).ravel()
        blocks = np.stack([table[: -(-(self._longest(contexts, rows)) // BLOCK_SIZE)] for table in tables])
        of = np.repeat(np.arange(len(contexts)), rows)
        params = SamplingParams(max_tokens=1, temperature=self._options.temperature)
        ends = np.arange(len(contexts) + 1) * rows
        return StepBatch(
            token_ids=tokens,
            positions=positions,
            slots=blocks[of, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_starts=ends,
            context_lens=contexts,
            block_tables=tuple(blocks),
            logit_rows=ends[1:] - 1,
            sampling=(SamplingRow(params, position),) * len(contexts),
        )

    @staticmethod
    def _longest(contexts: np.ndarray, rows: int) -> int:
        return int(contexts.max()) + rows


def _check_lengths(options: Options, longest: int) -> None:
    for name, value, most in (
        ("--context", options.context, longest - STEPS),
        ("--prefill", options.prefill, longest),
    ):
        if value > most:
            raise ConfigError(f"{name}: {value} is above {most}, which is what {options.shape} leaves room for")


def measure(options: Options) -> dict[str, Any]:
    """The JSON result. Raises ConfigError."""
    bench = Bench(options)
    try:
        prefill: list[float] = []
        decode: dict[int, list[float]] = {batch: [] for batch in options.batches}
        for _ in range(1 + options.runs):
            prefill.append(bench.prefill_s())
            for batch, runs in decode.items():
                runs.append(bench.decode_s(batch))
        return {
            **_setting(bench, options),
            **_result(bench, options, prefill[1:], {batch: runs[1:] for batch, runs in decode.items()}),
        }
    finally:
        bench.close()


def _result(bench: Bench, options: Options, prefill: list[float], decode: dict[int, list[float]]) -> dict[str, Any]:
    device, layout, config = bench.runner.pool.device, bench.runner.layout, bench.config
    dtype = DTYPES[layout.dtype]
    bandwidth, rate = copy_bandwidth(device), matmul_rate(device, dtype)
    weights = decode_weights(bench.sizes, config) * dtype.itemsize
    step_s = {batch: statistics.median(runs) for batch, runs in decode.items()}
    middle = options.context + STEPS // 2
    moved = {batch: step_bytes(weights, layout.token_bytes, batch, middle) for batch in decode}
    prefill_s, operations = statistics.median(prefill), prefill_operations(bench.sizes, config, options.prefill)
    fractions = {f"decode {batch}": moved[batch] / bandwidth / step_s[batch] for batch in decode}
    fractions["prefill"] = operations / rate / prefill_s
    return {
        "bandwidth_gb_s": bandwidth / 1e9,
        "matmul_tflop_s": rate / 1e12,
        "decode_ms": {batch: seconds * 1e3 for batch, seconds in step_s.items()},
        "decode_ms_runs": {batch: [seconds * 1e3 for seconds in runs] for batch, runs in decode.items()},
        "decode_bytes": moved,
        "prefill_ms": prefill_s * 1e3,
        "prefill_ms_runs": [seconds * 1e3 for seconds in prefill],
        "prefill_tokens_per_s": options.prefill / prefill_s,
        "prefill_tflop": operations / 1e12,
        "roofline_fraction": fractions,
        "goals": {
            name: {"goal": goal, "met": fractions[name] >= goal} for name, goal in GOALS.items() if name in fractions
        },
    }


def _setting(bench: Bench, options: Options) -> dict[str, Any]:
    device = bench.runner.pool.device
    return {
        "shape": options.shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": bench.runner.layout.dtype,
        "attention": bench.settled.kernel,
        "captured": bench.settled.graph_rows > 0,
        "context": options.context,
        "prefill": options.prefill,
        "step_tokens": options.step_tokens,
        "temperature": options.temperature,
        "runs": options.runs,
        "versions": {name: _version(name) for name in ("torch", "triton", "flashinfer-python")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
