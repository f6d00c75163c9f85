"""Layers that the ranks of a stage compute together."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from engine.linear import Linear
from engine.parallel.group import Group


class SummedLinear:
    """A projection of which each rank has a share of the inputs: what they compute is summed."""

    __slots__ = ("_group", "_own")

    def __init__(self, own: Linear, group: Group) -> None:
        """`own` has the bias on one rank only."""
        self._own = own
        self._group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.sum_(self._own(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._group.sum_(self._own(x)).add_(residual)


class GatheredHead:
    """The output layer by rows of the vocabulary; logits come together at tp_rank 0, and zeros elsewhere."""

    __slots__ = ("_group", "_own", "_rows", "_vocab")

    def __init__(self, own: Linear, vocab_size: int, group: Group) -> None:
        self._own = own
        self._vocab = vocab_size
        self._rows = group.split.vocabulary_rows(vocab_size)
        self._group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        own = self._own(x)
        own = F.pad(own, (0, self._rows - own.shape[-1]))  # gathered parts are of one size
        return self._group.gather(own)[:, : self._vocab]


class SharedEmbedding:
    """The embedding by rows of the vocabulary: each rank looks up what it has, and zeros for the rest."""

    __slots__ = ("_group", "_own", "_start", "_stop")

    def __init__(self, own: torch.Tensor, vocab_size: int, group: Group) -> None:
        rows = group.split.vocabulary(vocab_size)
        self._own = own
        self._start, self._stop = rows.start, rows.stop
        self._group = group

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]."""
        mine = (token_ids >= self._start) & (token_ids < self._stop)
        found = F.embedding((token_ids - self._start).where(mine, 0), self._own)
        return self._group.sum_(found.masked_fill_(~mine[:, None], 0.0))
