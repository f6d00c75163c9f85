"""A short run at load, against the attention that the class comes with: what a class does besides attending (a state
of its own, say) can't be seen in its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.attention import PagedAttention
from engine.fallback.config import TransformersConfig
from engine.fallback.interface import NAME
from engine.step import StepBatch

if TYPE_CHECKING:
    from engine.models.registry import Model

_ROWS, _BLOCK = 24, 4
_CHUNKS = (9, 1, 7, 1, 1)
"""Rows of the steps; the last one takes what is left."""


def _token_ids(config: TransformersConfig) -> torch.Tensor:
    rows = min(_ROWS, config.max_position_embeddings)
    return torch.arange(3, 3 + 7 * rows, 7) % config.vocab_size


def expected_logits(model: Any, config: TransformersConfig) -> torch.Tensor:
    """[rows, vocab], by the class itself."""
    model.set_attn_implementation("eager")
    ids = _token_ids(config).to(model.device)
    expected: torch.Tensor = model(ids[None], use_cache=False).logits[0].float()
    model.set_attn_implementation(NAME)
    return expected


def tolerance(dtype: torch.dtype) -> float:
    """How much the error may be."""
    return 1e-3 if dtype is torch.float32 else 0.1


def error_of(model: Model, config: TransformersConfig, expected: torch.Tensor) -> float:
    """What `model` computes in several steps over a paged cache: by how much of their norm the logits of a row are off.
    The median of the later rows, which see most: rounding to 16 bits may make a router choose otherwise for some."""
    ids, device = _token_ids(config).numpy(), expected.device
    blocks = -(-len(ids) // _BLOCK)
    dtype = model.embed(torch.zeros(1, dtype=torch.int64, device=device)).dtype
    shape = (config.num_layers, 2, blocks, _BLOCK, config.num_kv_heads, config.head_size)
    cache = torch.zeros(shape, dtype=dtype, device=device)
    got, start = [], 0
    for count in (*_CHUNKS, len(ids)):
        rows = np.arange(start, min(start + count, len(ids)))
        if len(rows):
            attention = PagedAttention(_chain(ids, rows, blocks), cache)
            hidden = model.embed(torch.from_numpy(ids[rows]).to(device))
            hidden, _ = model.run_layers(hidden, torch.from_numpy(rows).to(device), attention)
            got.append(model.logits(hidden).float())
            start = int(rows[-1]) + 1
    errors = (torch.cat(got) - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors[len(errors) // 2 :].median())


def _chain(ids: np.ndarray, rows: np.ndarray, blocks: int) -> StepBatch:
    return StepBatch(
        token_ids=ids[rows],
        positions=rows,
        slots=rows,
        query_starts=np.array([0, len(rows)]),
        context_lens=rows[:1],
        block_tables=(np.arange(blocks),),
        logit_rows=np.empty(0, np.int64),
    )
