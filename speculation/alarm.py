"""Acceptance that no working drafter has: so low that it might as well not draft, or so high that what it drafts is
perhaps not being verified.

A controller has few drafts of a useless drafter verified, a dozen in a thousand steps, so it is not waited for a share:
it is enough that none of so many is accepted that one that works would not come to that once in 1 / CHANCE times. While
that is in doubt, drafts that are not verified tell as well (sounding.py).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

LOW, LOW_DRAFTS = 0.01, 512
HIGH, HIGH_DRAFTS = 0.999, 2048
FLOOR, KEPT = 0.05, 0.25
"""Of the drafts of one that works so many are accepted at least, and of its record so much, whatever the texts."""
BELIEVED, REMEMBERED = 64, 4096
"""Drafts that make a record, and after which what was before counts half."""
CHANCE = 1e-6
DOUBT = 8
"""Drafts in a row of which none is accepted, after which more is to be known."""
OF_ONE = 16
"""Drafts of one request that count, where none is accepted in a row: its text may be an odd one."""


class Alarm(StrEnum):
    NONE = ""
    LOW = "low"
    HIGH = "high"


@dataclass(slots=True)
class Record:
    """Of a drafter, in all its versions: a new one is to do about as well."""

    drafts: int = 0
    accepted: int = 0

    def add(self, accepted: NDArray[np.bool_]) -> None:
        self.drafts += len(accepted)
        self.accepted += int(accepted.sum())
        if self.drafts >= REMEMBERED:
            self.drafts, self.accepted = self.drafts // 2, self.accepted // 2

    @property
    def most_misses(self) -> int:
        """Drafts of which none is accepted, in a row, that are no coincidence."""
        known = self.accepted / self.drafts if self.drafts >= BELIEVED else 0.0
        return math.ceil(math.log(CHANCE) / math.log1p(-max(FLOOR, KEPT * known)))


class Watch:
    """Over the drafts of one drafter in one version, of which those with a first token accepted are counted. Low is
    judged by LOW_DRAFTS of them at a time and by those since one was accepted, high by HIGH_DRAFTS of those whose
    requests draw freely."""

    def __init__(self, name: str, record: Record | None = None) -> None:
        self._name = name
        self._record = record or Record()
        self._low = False
        self._high = False
        self._all = _Window(LOW_DRAFTS)
        self._free = _Window(HIGH_DRAFTS)
        self._missed = Counter[int]()  # by request, since a draft was accepted
        self._misses = self._most_misses = 0

    @property
    def alarm(self) -> Alarm:
        return Alarm.LOW if self._low else Alarm.HIGH if self._high else Alarm.NONE

    @property
    def doubts(self) -> bool:
        return self._low or self._misses >= DOUBT

    def count(self, accepted: NDArray[np.bool_], free: NDArray[np.bool_], requests: Sequence[int]) -> None:
        """Some drafts [drafts]: whether any of it was accepted, and whether its request draws freely; and which request
        it was for."""
        before = self.alarm
        if (rate := self._all.add(accepted)) is not None:
            self._low = rate < LOW
        if (rate := self._free.add(accepted[free])) is not None:
            self._high = rate >= HIGH
        if accepted.any():
            self._missed.clear()
            self._misses = 0
        elif not self._low:
            self._miss(requests)
        if not self._low:
            self._record.add(accepted)
        if self.alarm is not before:
            self._say()

    def _miss(self, requests: Sequence[int]) -> None:
        if not self._missed:
            self._most_misses = self._record.most_misses
        for request in requests:
            self._misses += self._missed[request] < OF_ONE
            self._missed[request] += 1
        if self._misses >= self._most_misses:
            self._low = True
            self._all = _Window(LOW_DRAFTS)  # those before may have been better, and say nothing of what follows

    def _say(self) -> None:
        match self.alarm:
            case Alarm.LOW:
                logger.warning("%s: hardly any of its drafts is accepted; is it the right one?", self._name)
            case Alarm.HIGH:
                logger.warning("%s: %g of its drafts or more are accepted; are they verified?", self._name, HIGH)
            case Alarm.NONE:
                logger.info("%s: its acceptance is plausible again", self._name)


class _Window:
    def __init__(self, size: int) -> None:
        self._size = size
        self._drafts = self._accepted = 0

    def add(self, accepted: NDArray[np.bool_]) -> float | None:
        """The share that was accepted once there are enough, and then the count begins anew."""
        self._drafts += len(accepted)
        self._accepted += int(accepted.sum())
        if self._drafts < self._size:
            return None
        rate = self._accepted / self._drafts
        self._drafts = self._accepted = 0
        return rate
