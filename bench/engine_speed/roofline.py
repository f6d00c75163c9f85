"""What a decode step could cost at the least: the bytes it must read over the bandwidth that a copy reaches here."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from safetensors import safe_open

from engine.model_config import ModelConfig
from engine.quantization.methods import is_quantized
from engine.weights import weight_files

COPY_BYTES = 2**29
"""Of the tensor that is copied: larger than the caches of any machine we know."""
COPIES = 10


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of the fastest of COPIES copies by as many threads as PyTorch has.

    What a CPU reads before it overwrites a cache line is not counted, as in STREAM (McCalpin, 1995). Reading alone can
    be faster than a copy, so a step may come out above its roofline.
    """
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)  # written once, so that no copy has to wait for memory to be mapped
    return 2 * COPY_BYTES / min(_copy_seconds(source, target) for _ in range(COPIES))


def _copy_seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    if source.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started


def weight_bytes(folder: Path, config: ModelConfig, item_bytes: int, quantized: bool = False) -> int:
    """Bytes of weights that a decode step reads: all but the input embeddings, of which it reads a row per sequence.
    Embeddings that are the output layer too are read once. Every expert of a mixture is counted.
    `quantized`: projections have a byte for each weight."""
    skipped = "lm_head.weight" if config.tie_word_embeddings else "model.embed_tokens.weight"
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                if name != skipped:
                    total += math.prod(shape) * (1 if quantized and is_quantized(name, shape) else item_bytes)
    return total


def step_bytes(weights: int, kv_token_bytes: int, batch: int, context: int) -> int:
    """weights + batch * context * KV of a token. What a step writes, and its activations, are not counted."""
    return weights + batch * context * kv_token_bytes
