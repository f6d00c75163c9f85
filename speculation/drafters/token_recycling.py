"""Token Recycling (arXiv:2408.08696): what the target found likely after a token is what is drafted after that token.

The paper keeps an adjacency matrix, [vocab, 8] of tokens, each row as it was computed last, and fills a fixed tree from
it. Here a row also has the probabilities, so that the tree is grown by them to the budget, and is an average over the
last few times, which is right more often. Rows belong to scopes: all their matrices share one bounded cache. What
followed a token in a prompt counts like what the target was sure of.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import SHARED, Contexts
from speculation.drafters.recycling import RecyclingDrafter


class TokenRecycling(RecyclingDrafter):
    name: ClassVar[str] = "token_recycling"
    contexts = of_text = Contexts((1,), (SHARED,))
    doubts = np.array([0.25], np.float32)
    fading = 0.5


def build(surroundings: Surroundings) -> TokenRecycling:
    return TokenRecycling(surroundings)
