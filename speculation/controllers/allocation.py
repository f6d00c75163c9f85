"""Draft tokens shared out over the requests of a step so that it emits the most tokens per second."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from speculation.acceptance import Prospects
from speculation.controllers.step_time import Speculation, StepTime
from speculation.rounds import Load


def allocate(
    load: Load, drafters: NDArray[np.int64], prospects: Prospects, room: NDArray[np.int64], time: StepTime
) -> tuple[NDArray[np.int64], float]:
    """[requests] at most room[r] for each, and by how much that beats a plain step: 1 if nothing does. `drafters`
    [requests] are the numbers of who drafts.

    goodput(n) = (B + sum of the n largest gains) / T(n), at the best n. As gains never rise with rank, the ranks of a
    request are taken in order."""
    ranks, requests = int(room.max(initial=0)), len(room)
    open_ranks = np.arange(ranks)[:, None] < room
    gains = np.where(open_ranks, prospects.gains.T[:ranks], -1.0).ravel()
    order = np.argsort(-gains, kind="stable")[: min(open_ranks.sum(), time.horizon)]
    if not len(order):
        return np.zeros(requests, np.int64), 1.0
    whose = order % requests
    by_drafter = drafters[whose][:, None] == np.arange(time.num_drafters)
    fills = prospects.fills.T[:ranks].ravel()[order]
    tokens = np.cumsum(fills[:, None] * by_drafter, 0)
    sequences = np.cumsum((order < requests)[:, None] * by_drafter, 0)
    plain = time.plain(load)
    seconds = plain + time.added(load, Speculation(tokens, sequences))
    speedups = (1 + np.cumsum(gains[order]) / requests) * plain / seconds
    best = int(speedups.argmax())
    if speedups[best] <= 1.0:
        return np.zeros(requests, np.int64), 1.0
    return np.bincount(whose[: best + 1], minlength=requests), float(speedups[best])
