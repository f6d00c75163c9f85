"""What drafters are made with, and what most of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from speculation.laws import DraftLaw
from speculation.rounds import DraftRequest, Feedback, Needs, Observed


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Of a drafter on a worker."""

    vocab_size: int
    """Of the target; no token it proposes is beyond it."""
    max_budget: int
    """Most draft tokens for a request."""
    max_requests: int
    """Most that have started and not finished."""
    max_memory_bytes: int
    """For all it holds. It forgets what is oldest, or cheapest to do without, rather than exceed it."""
    law: DraftLaw
    """By which it draws: one of its kind's."""
    branches: bool = True
    """False: it may propose chains only."""
    weights: Path | None = None
    """A folder; only for kinds that take weights."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    embedding: torch.Tensor | None = None
    """[vocab, hidden] the target's own, to be shared and not changed."""
    output: torch.Tensor | None = None
    """[vocab, hidden] the target's, from the normed hidden state to logits."""
    num_layers: int = 0
    """Of the target."""
    fingerprint: str = ""
    """Of the target's files (engine.weights.fingerprint); like the tensors, for kinds that share_vocabulary."""
    native: bool = False
    """Whether the target is computed by our own kernels for the CPU, which then are loaded."""
    proposes: bool = True
    """False: it sees prompts of requests that are decoded elsewhere, to `pack` them, and never proposes."""


class BaseDrafter:
    """For a drafter that keeps nothing of a request. Others override what they need; all add `name` and `propose`."""

    name: ClassVar[str]
    needs: Needs = Needs()

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.law = surroundings.law
        self.branches = surroundings.branches
        self.max_budget = surroundings.max_budget
        self.version = ""

    def start(self, request: DraftRequest) -> None:
        pass

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        pass

    def observe(self, feedback: Feedback) -> None:
        pass

    def finish(self, key: int) -> None:
        pass

    def pack(self, key: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        return {}

    def unpack(self, request: DraftRequest, state: dict[str, torch.Tensor]) -> None:
        pass

    @property
    def memory_bytes(self) -> int:
        return 0
