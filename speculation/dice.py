"""Random numbers of speculation, keyed by (seed, position) as the engine's sampler keys its own, so that they depend on
nothing else in the batch and a request that moves goes on as it would have.

Each use has a stream of its own, and no number of a stream is used twice:
- ACCEPT: whether the try-th child at a position is accepted. A position is decided on in one round only, for a round
  emits a token for every position at which it judged one.
- DRAW: the token that ends a round, at its position: from the residual, or from p after the last accepted node.
- DRAFT: a drafter's. A rejected draft leaves its positions to be drafted again, so these are keyed by the root's
  position, which never comes twice, and counted through the whole tree.
The sampler's own numbers are the target's: what a drafter draws with them is a POINT_MASS. (Under sampled verify that
is a good idea, for the target will then draw by the same clocks.)
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from engine.sampler import num_uniforms, race, uniforms


class Stream(IntEnum):
    """What is added to a seed: the first digits of pi's fraction in hexadecimal, 64 bits each."""

    ACCEPT = 0x243F6A8885A308D3
    DRAW = 0x13198A2E03707344
    DRAFT = 0xA4093822299F31D0


def draft_uniforms(seeds: Sequence[int], positions: Sequence[int], count: int) -> NDArray[np.float64]:
    """[requests, count] numbers in (0, 1) for what requests whose next token has these positions are proposed."""
    return uniforms([seed + Stream.DRAFT for seed in seeds], positions, count)


class KeyedDice:
    """Implements protocols.Dice. `positions` [requests]: the index in the output of the next token of each."""

    def __init__(self, seeds: Sequence[int], positions: Sequence[int] | NDArray[np.int64]) -> None:
        self._seeds = list(seeds)
        self._positions = np.asarray(positions, np.int64)

    def accept(
        self,
        requests: NDArray[np.int64],
        depths: NDArray[np.int64],
        tries: NDArray[np.int64],
        chances: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        u = self._uniforms(Stream.ACCEPT, requests, depths, int(tries.max(initial=0)) + 1)
        accepted: NDArray[np.bool_] = u[np.arange(len(tries)), tries] < chances
        return accepted

    def draw(self, requests: NDArray[np.int64], depths: NDArray[np.int64], laws: torch.Tensor) -> NDArray[np.int64]:
        u = self._uniforms(Stream.DRAW, requests, depths, num_uniforms(laws.shape[1]))
        return race(laws, torch.from_numpy(-np.log1p(-u)).to(laws.device)).cpu().numpy()

    def select(self, requests: NDArray[np.int64]) -> KeyedDice:
        return KeyedDice([self._seeds[request] for request in requests], self._positions[requests])

    def _uniforms(
        self, stream: Stream, requests: NDArray[np.int64], depths: NDArray[np.int64], count: int
    ) -> NDArray[np.float64]:
        seeds = [self._seeds[request] + stream for request in requests]
        return uniforms(seeds, (self._positions[requests] + depths - 1).tolist(), count)
