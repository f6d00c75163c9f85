"""What differs between kinds of heads, beside how they draft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from engine.linear import MakeLinear
from speculation.heads import eagle, medusa
from speculation.heads.config import HeadConfig
from speculation.heads.lesson import Lesson


class Head(Protocol):
    def rollout(self, lesson: Lesson, embedding: torch.Tensor, depth: int) -> Iterator[torch.Tensor]:
        """Logits [rows, draft vocabulary] of each depth, of at most `depth`. `embedding` is the target's."""
        ...


def make_head(
    config: HeadConfig, tensors: Mapping[str, torch.Tensor], make: MakeLinear, *, native: bool = False
) -> Head:
    return (eagle.Eagle if config.kind == "eagle3" else medusa.Heads)(config, tensors, make, native=native)
