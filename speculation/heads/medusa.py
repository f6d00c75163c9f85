"""Medusa (arXiv:2401.10774) and Hydra (arXiv:2402.05109): heads on the last hidden state, one for each depth.

A head is one SiLU layer with a skip, before an output layer that all share: rows of the target's own, frozen. Medusa's
see the hidden state alone; each of Hydra's also the embeddings of the tokens before the one it predicts, scaled to a
root mean square of one as the hidden state is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from engine.layers import RMSNorm
from engine.linear import MakeLinear
from speculation.heads.config import HeadConfig
from speculation.heads.lesson import Lesson


class Heads:
    """Of either kind."""

    def __init__(
        self, config: HeadConfig, tensors: Mapping[str, torch.Tensor], make: MakeLinear, *, native: bool = False
    ) -> None:
        """`lm_head.weight` [draft vocabulary, hidden] is among the tensors. `native`: what `make` makes are our own
        kernels'."""
        self.depth = config.depth
        self._sees_tokens = config.kind == "hydra"
        self._shape = (config.hidden_size,)
        self.enter = RMSNorm(tensors["norm.weight"], config.rms_norm_eps)
        """[rows, hidden] of the layer that is tapped -> what heads read."""
        self._heads = [
            make(tensors[f"heads.{depth}.weight"], tensors[f"heads.{depth}.bias"]) for depth in range(config.depth)
        ]
        output = make(tensors["lm_head.weight"], None)
        self.logits = output.wide if native else output  # type: ignore[attr-defined]
        """[rows, hidden] -> [rows, draft vocabulary]."""

    def scaled(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embeddings, [..., hidden], as Hydra's heads are told them."""
        return torch.rms_norm(embedded, self._shape)

    def hidden(self, depth: int, entered: torch.Tensor, told: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """What the head of this depth, from 0 on, gives to `logits`: [rows, hidden]. Hydra's is told the `scaled`
        embeddings of the last depth + 1 tokens, the oldest first, [rows, hidden] each."""
        inputs = torch.cat((entered, *told), -1) if self._sees_tokens else entered
        return entered + F.silu(self._heads[depth](inputs))

    def rollout(self, lesson: Lesson, embedding: torch.Tensor, depth: int) -> Iterator[torch.Tensor]:
        """As Eagle.rollout; no deeper than there are heads."""
        entered = self.enter(lesson.features[lesson.rows, 0])
        told: list[torch.Tensor] = []
        for step in range(min(depth, self.depth)):
            if self._sees_tokens:
                told.append(self.scaled(embedding[lesson.token(step)]))
            yield self.logits(self.hidden(step, entered, told))
