"""What a drafter would have drafted for requests of a step in which others are tried: never verified, but compared with
what the target said, which tells as well whether its first token would have been accepted.

Where a drafter seems to be of no use, a controller has few of its drafts verified, since rows are dear; to look up a
few more tokens is not. So the alarm need not wait for the controller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.drafts import Candidate
from speculation.rounds import Load, Needs
from speculation.tree import ROOT, DraftBatch

TOKENS = 4
"""Of each request: as many as a controller tries."""
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Sounding:
    places: NDArray[np.int64]  # [requests] which of the step's
    drafts: DraftBatch

    def right(self, emitted: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[requests] whether the first token that each emitted [requests] follows its root."""
        firsts = np.flatnonzero(self.drafts.parents == ROOT)
        of = self.drafts.request_of[firsts]
        right = np.zeros(len(emitted), np.bool_)
        right[of[self.drafts.tokens[firsts] == emitted[of]]] = True
        return right


def soundable(needs: Needs, load: Load, asked: NDArray[np.int64], candidates: Sequence[Candidate]) -> NDArray[np.int64]:
    """Requests that speculate, and nobody has `asked` [requests] for in this step: those that may be sounded by a
    drafter with such needs. It must not compute anything; and what a grammar would leave of a draft is not known."""
    if not needs.thread and not needs.taps:
        free = np.array([candidate.sequence.constraint is None for candidate in candidates])
        return np.flatnonzero((asked == 0) & (load.limits > 0) & free)
    return np.empty(0, np.int64)
