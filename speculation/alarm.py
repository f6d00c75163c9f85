"""Acceptance that no working drafter has: so low that it might as well not draft, or so high that what it drafts is
perhaps not being verified."""

from __future__ import annotations

import logging
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

LOW, LOW_DRAFTS = 0.01, 512
HIGH, HIGH_DRAFTS = 0.999, 2048


class Alarm(StrEnum):
    NONE = ""
    LOW = "low"
    HIGH = "high"


class Watch:
    """Over the drafts of one drafter in one version, of which those with a first token accepted are counted. Low is
    judged by LOW_DRAFTS of them at a time, high by HIGH_DRAFTS of those whose requests draw freely."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._low = False
        self._high = False
        self._all = _Window(LOW_DRAFTS)
        self._free = _Window(HIGH_DRAFTS)

    @property
    def alarm(self) -> Alarm:
        return Alarm.LOW if self._low else Alarm.HIGH if self._high else Alarm.NONE

    def count(self, accepted: NDArray[np.bool_], free: NDArray[np.bool_]) -> None:
        """Some drafts [drafts]: whether any of it was accepted, and whether its request draws freely."""
        before = self.alarm
        if (rate := self._all.add(accepted)) is not None:
            self._low = rate < LOW
        if (rate := self._free.add(accepted[free])) is not None:
            self._high = rate >= HIGH
        if self.alarm is not before:
            self._say()

    def _say(self) -> None:
        match self.alarm:
            case Alarm.LOW:
                logger.warning("%s: less than %g of its drafts are accepted; is it the right one?", self._name, LOW)
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
