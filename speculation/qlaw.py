"""The probabilities that draft tokens were drawn with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InternalError


@dataclass(frozen=True, slots=True)
class QLaw:
    """The laws that the nodes of a DraftBatch were drawn from, one row for all children of a node.

    It must be the very law of the draw: a token drawn in bfloat16 and scored in float32 has another, so those are
    refused. Vocabulary-wide, so it lies where the drafter's model left it, in as few columns as it has support.
    """

    rows: NDArray[np.int64]
    """[nodes] the row that each node was drawn from: of siblings the same."""
    probs: torch.Tensor
    """[laws, columns] float32 or float64, each row a sum of one: of the first draw, also where siblings are drawn
    without replacement."""
    token_ids: torch.Tensor | None = None
    """Which token a column is. None: its own number, so columns are the vocabulary. [columns] int64: a reduced
    vocabulary. [laws, columns] int64: the support of each row, no token twice unless with probability 0."""

    def __post_init__(self) -> None:
        if self.probs.dtype not in (torch.float32, torch.float64):
            raise InternalError(f"a draft's law is {self.probs.dtype}: draw from float32 or float64")

    def of_nodes(self, nodes: NDArray[np.int64]) -> QLaw:
        return QLaw(self.rows[nodes], self.probs, self.token_ids)

    def proposals(self, nodes: NDArray[np.int64], like: torch.Tensor) -> Proposals:
        """What each of `nodes` was drawn from as a first child; dtype and device are those of `like`."""
        rows = torch.from_numpy(self.rows[nodes]).to(self.probs.device)
        probs = self.probs[rows].to(like)
        if self.token_ids is None:
            return Proposals(probs, None)
        ids = self.token_ids.expand(len(nodes), -1) if self.token_ids.ndim == 1 else self.token_ids[rows]
        return Proposals(probs, ids.to(like.device))

    def of(self, nodes: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """[len(nodes)] the probability of each of `tokens` under the law of the node beside it."""
        rows = torch.from_numpy(self.rows[nodes]).to(self.probs.device)
        wanted = torch.from_numpy(tokens).to(self.probs.device)
        if self.token_ids is None:
            return on_host(self.probs[rows, wanted])
        ids = self.token_ids if self.token_ids.ndim == 1 else self.token_ids[rows]
        return on_host(self.probs[rows].where(ids == wanted[:, None], 0.0).sum(-1))


@dataclass(frozen=True, slots=True)
class Proposals:
    """Laws of draws that are being judged. Columns as in QLaw, but every row has its own."""

    probs: torch.Tensor  # [laws, columns]
    ids: torch.Tensor | None  # [laws, columns]

    @staticmethod
    def on(tokens: NDArray[np.int64], like: torch.Tensor) -> Proposals:
        """Point masses."""
        ids = torch.from_numpy(tokens).to(like.device)[:, None]
        return Proposals(torch.ones_like(ids, dtype=like.dtype), ids)

    def __getitem__(self, laws: NDArray[np.bool_]) -> Proposals:
        chosen = torch.from_numpy(laws).to(self.probs.device)
        return Proposals(self.probs[chosen], None if self.ids is None else self.ids[chosen])

    def of(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """[laws] the probability of one token each."""
        return on_host(self.probs.where(self._are(tokens), 0.0).sum(-1))

    def without(self, tokens: NDArray[np.int64]) -> Proposals:
        """The laws of the next draws, when one token each has been drawn and is not to come again."""
        probs = self.probs.where(~self._are(tokens), 0.0)
        total = probs.sum(-1, keepdim=True)
        return Proposals(probs / total.where(total > 0, 1.0), self.ids)

    def at_columns(self, laws: torch.Tensor) -> torch.Tensor:
        """[laws, columns] of `laws` [laws, vocab]."""
        return laws if self.ids is None else laws.gather(1, self.ids)

    def taken_from(self, laws: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        """(laws - amounts)+, where `laws` is [laws, vocab] and `amounts` [laws, columns]."""
        left = laws - amounts if self.ids is None else laws.scatter_add(1, self.ids, -amounts)
        return left.clamp_(min=0)

    def _are(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        wanted = torch.from_numpy(tokens).to(self.probs.device)[:, None]
        ids = torch.arange(self.probs.shape[1], device=wanted.device) if self.ids is None else self.ids
        return ids == wanted


def on_host(values: torch.Tensor) -> NDArray[np.float64]:
    """For decisions, which are made here and in float64 whatever the law is in."""
    return values.double().cpu().numpy()
