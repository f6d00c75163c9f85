"""Hydra (arXiv:2402.05109): a head for each of the next tokens, told the tokens that were drafted before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.drafters.base import Surroundings
from speculation.drafters.growth import Branches, FollowLevel, Level
from speculation.heads.drafter import branches_of, load_for
from speculation.heads.last_row import LastRowDrafter
from speculation.rounds import DraftRequest


class Hydra(LastRowDrafter):
    name: ClassVar[str] = "hydra"

    def begin(self, requests: Sequence[DraftRequest], windows: NDArray[np.int64], depth: int) -> FollowLevel:  # noqa: ARG002
        entered, depths = self.entered(requests), count()

        def follow(level: Level) -> Branches:
            depth = next(depths)
            told = self.heads.scaled(self.embed(level.windows[:, -depth - 1 :].T))  # [depth + 1, nodes, hidden]
            hidden = self.heads.hidden(depth, entered[torch.from_numpy(level.requests)], told.unbind(0))
            return branches_of(*self.likeliest(self.heads.logits(hidden)))

        return follow


def build(surroundings: Surroundings) -> Hydra:
    return Hydra(surroundings, load_for(surroundings, Hydra.name))
