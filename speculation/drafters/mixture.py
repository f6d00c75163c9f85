"""One law of the next token out of what several contexts say, from the least specific to the most.

What followed a context was seen with some evidence; the rest is left to the contexts before it, as in Witten-Bell
smoothing: with evidence m a context takes the part m / (m + doubt).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.growth import Branches
from speculation.drafters.successors import added_up

NEGLIGIBLE = 1e-3
"""Parts of a chance that are not looked at."""


def part_of_each(masses: NDArray[np.float32], doubts: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, contexts] of the whole law the part of one unit of evidence, by masses [n, contexts] of it, the most specific
    last; doubts [contexts]."""
    parts: NDArray[np.float32] = np.reciprocal(masses + doubts)
    left = doubts * parts
    parts[:, :-1] *= left[:, :0:-1].cumprod(axis=1)[:, ::-1]
    return parts


def mixed(tokens: NDArray[np.int32], weights: NDArray[np.float32], doubts: NDArray[np.float32]) -> Branches:
    """Of n windows and their contexts [n, contexts, WIDTH]."""
    chances = weights * part_of_each(weights.sum(-1), doubts)[..., None]
    windows = np.arange(len(tokens)).repeat(tokens.shape[1] * tokens.shape[2])
    return Branches(*added_up(windows, tokens.reshape(-1), chances.reshape(-1), NEGLIGIBLE))
