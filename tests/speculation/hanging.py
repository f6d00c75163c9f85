"""A drafter on the engine's thread of which one never comes back, until it is told to."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.registry import DrafterKind
from speculation.rounds import DraftRequest, Needs
from speculation.tree import DraftBatch
from tests.speculation.copier import Copier

WAIT_S = 60.0


class Hanging(Copier):
    """The first of all that proposes a third time."""

    name: ClassVar[str] = "hanging"
    needs = Needs(thread=False)
    hangs, wake = threading.Event(), threading.Event()
    proposals = 0

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        self.proposals += 1
        if self.proposals == 3 and not self.hangs.is_set():
            self.hangs.set()
            self.wake.wait(WAIT_S)
        return super().propose(requests, budgets, floor)


build = Hanging
HANGING = DrafterKind("hanging", module="tests.speculation.hanging")
