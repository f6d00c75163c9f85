"""A drafter of a served cluster that never gives the engine's thread back, on one of its workers.

To be a drafter of the processes of `slipstream serve`, a folder with SITE as its sitecustomize.py goes before others in
their PYTHONPATH.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation import crew
from speculation.rounds import DraftRequest, Needs
from speculation.tree import DraftBatch
from tests.speculation.copier import Copier

SITE = """
from speculation.drafters import registry
kind = registry.DrafterKind("hanging", module="tests.speculation.hanging_once")
registry._BY_NAME[kind.name] = kind
"""
HUNG = "HANGING_ONCE"
"""Names a file: whoever makes it hangs, and writes its process id there."""
LOST = "HANGING_LOST_S"
"""Seconds after which it is lost, in place of crew.LOST_S."""
crew.LOST_S = float(os.environ.get(LOST, crew.LOST_S))


class HangingOnce(Copier):
    name: ClassVar[str] = "hanging"
    needs = Needs(thread=False)
    proposals = 0

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        self.proposals += 1
        if self.proposals == 3:
            try:
                with Path(os.environ[HUNG]).open("x") as file:
                    file.write(str(os.getpid()))
                threading.Event().wait()
            except FileExistsError:
                pass
        return super().propose(requests, budgets, floor)


build = HangingOnce
