"""A draft model over texts that its own folder, or another, would write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speculation.drafters.base import Surroundings
from speculation.drafters.draft_model import DraftModel, build
from speculation.laws import DraftLaw
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch
from tests.engine.driver import TINY

VOCAB = TINY["vocab_size"]
BUDGET = 6


def made(folder: Path, **given: Any) -> DraftModel:
    surroundings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_budget": 24,
        "max_requests": 8,
        "max_memory_bytes": 4 << 20,
        "law": DraftLaw.POINT_MASS,
        "weights": folder,
    }
    return build(Surroundings(**(surroundings | given)))


def request(key: int, text: Sequence[int], *, seed: int = 0, temperature: float = 0.0, **given: Any) -> DraftRequest:
    return DraftRequest(key, list(text), len(text), seed, temperature, **given)


def propose(drafter: DraftModel, requests: Sequence[DraftRequest], budget: int = BUDGET) -> DraftBatch:
    drafts = drafter.propose(requests, np.full(len(requests), budget), 0.0)
    drafts.validate(VOCAB)
    return drafts


def path_tokens(drafts: DraftBatch, index: int = 0) -> Iterator[list[int]]:
    """Of each node of a request, the tokens from below the root down to it."""
    for path in drafts.paths[drafts.offsets[index] : drafts.offsets[index + 1]]:
        yield drafts.tokens[path[path >= 0]].tolist()


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)
