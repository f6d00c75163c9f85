"""Medusa (arXiv:2401.10774): a head for each of the next tokens, all computed at once from the last hidden state. No
head knows what the ones before it said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.drafters.base import Surroundings
from speculation.drafters.growth import Branches, FollowLevel, Level
from speculation.heads.drafter import branches_of, load_for
from speculation.heads.last_row import LastRowDrafter
from speculation.rounds import DraftRequest


class Medusa(LastRowDrafter):
    name: ClassVar[str] = "medusa"

    def begin(self, requests: Sequence[DraftRequest], windows: NDArray[np.int64], depth: int) -> FollowLevel:  # noqa: ARG002
        entered, count = self.entered(requests), len(requests)
        hidden = torch.cat([self.heads.hidden(each, entered) for each in range(depth)])
        tokens, chances = self.likeliest(self.heads.logits(hidden))
        starts = iter(range(0, depth * count, count))

        def follow(level: Level) -> Branches:
            rows = next(starts) + level.requests
            return branches_of(tokens[rows], chances[rows])

        return follow


def build(surroundings: Surroundings) -> Medusa:
    return Medusa(surroundings, load_for(surroundings, Medusa.name))
