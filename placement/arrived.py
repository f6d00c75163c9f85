"""Requests in the order in which they came, whether they have ended or are still under way.

Of one under way the prompt is known, and that its output will have more tokens than it has by now: it is censored. To
look only at what has ended would miss the long outputs, as of those that came lately only the short have ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.arrivals import fixed_gaps
from placement.workload import Times, Workload

Row = tuple[float, int, int, int, bool]
"""When it came, prompt, cached and output tokens, and whether it has ended."""


@dataclass(frozen=True, eq=False)
class Arrived:
    """`outputs` of those that have not `ended` are the tokens they have by now. What is `cached` of a prompt is known
    with its first token."""

    came_s: Times  # [requests]
    prompts: NDArray[np.int64]  # [requests]
    cached: NDArray[np.int64]  # [requests]
    outputs: NDArray[np.int64]  # [requests]
    ended: NDArray[np.bool_]  # [requests]

    @staticmethod
    def of(rows: Iterable[Row]) -> Arrived:
        """In any order."""
        table = np.array(sorted(rows), np.float64).reshape(-1, 5)
        prompts, cached, outputs = table[:, 1:4].astype(np.int64).T
        return Arrived(table[:, 0], prompts, cached, outputs, table[:, 4] > 0)

    def __len__(self) -> int:
        return len(self.came_s)

    def __getitem__(self, rows: slice) -> Arrived:
        lengths = self.prompts[rows], self.cached[rows], self.outputs[rows]
        return Arrived(self.came_s[rows], *lengths, self.ended[rows])

    def followed_by(self, later: Arrived) -> Arrived:
        return Arrived(
            came_s=np.concatenate([self.came_s, later.came_s]),
            prompts=np.concatenate([self.prompts, later.prompts]),
            cached=np.concatenate([self.cached, later.cached]),
            outputs=np.concatenate([self.outputs, later.outputs]),
            ended=np.concatenate([self.ended, later.ended]),
        )

    def completed(self, earlier: Arrived, rng: np.random.Generator) -> Workload:
        """Evenly spaced, with an output for each. Who is under way gets that of one of those who had more tokens than
        it has by now, as these end up: so outputs follow the product-limit estimate (Efron, 1967: what is censored is
        redistributed to the right). If nobody had, one of those who came `earlier` and had more is taken; if there is
        none, as much again is to come: seen at any moment, what is left of a thing that lasts is as long as what is
        past (Cox, Renewal Theory, 1962). Of the prompt of somebody without a token as large a part is cached."""
        outputs, cached = self.outputs.copy(), self.cached.copy()
        order, before = np.argsort(self.outputs), np.flatnonzero(earlier.ended)
        before = before[np.argsort(earlier.outputs[before])]
        for row in order[~self.ended[order]][::-1].tolist():
            so_far = self.outputs[row]
            longer = order[np.searchsorted(self.outputs[order], so_far, side="right") :]
            of, known = self, outputs
            if not len(longer):
                longer = before[np.searchsorted(earlier.outputs[before], so_far, side="right") :]
                of, known = earlier, earlier.outputs
            if not len(longer):
                outputs[row] = max(1, 2 * so_far)
                continue
            like = rng.choice(longer)
            outputs[row] = known[like]
            if not so_far:
                cached[row] = (cached if of is self else of.cached)[like] * self.prompts[row] // of.prompts[like]
        prompts = self.prompts.astype(np.int32)
        return Workload(prompts, outputs.astype(np.int32), fixed_gaps(len(self)), cached.astype(np.int32))
