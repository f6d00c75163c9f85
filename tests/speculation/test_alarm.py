"""Acceptance that can't be right is said."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from speculation.alarm import HIGH_DRAFTS, LOW_DRAFTS, Alarm, Watch
from speculation.counters import Counters
from speculation.laws import DraftLaw
from speculation.rounds import Outcome
from speculation.tree import DraftBatch


def feed(watch: Watch, count: int, *, accepted: float, free: float = 1.0) -> None:
    """`accepted` and `free` are shares, spread evenly."""
    places = np.arange(1, count + 1)
    some, loose = (np.floor(places * share) > np.floor((places - 1) * share) for share in (accepted, free))
    for start in range(0, count, 4):
        watch.count(some[start : start + 4], loose[start : start + 4])


@pytest.mark.parametrize(
    ("accepted", "free", "alarm"),
    [
        (0.0, 1.0, Alarm.LOW),
        (0.0, 0.0, Alarm.LOW),
        (0.02, 1.0, Alarm.NONE),
        (0.9, 1.0, Alarm.NONE),
        (0.995, 1.0, Alarm.NONE),
        (1.0, 1.0, Alarm.HIGH),
        (1.0, 0.0, Alarm.NONE),
    ],
)
def test_an_alarm_is_raised_for_what_no_drafter_does(accepted: float, free: float, alarm: Alarm) -> None:
    watch = Watch("drafter x")
    feed(watch, 2 * HIGH_DRAFTS, accepted=accepted, free=free)
    assert watch.alarm is alarm


def test_what_is_counted_of_a_drafter_raises_its_alarm() -> None:
    """As a worker counts the drafts of its steps."""
    counters, drafts = Counters(), DraftBatch.of_chains([[5, 6]] * 4, DraftLaw.POINT_MASS, "wrong")
    rejected = Outcome.of(drafts, np.zeros(8, np.bool_), np.zeros(4, np.int64))
    for step in range(LOW_DRAFTS // 4):
        assert all(not one.alarm for one in counters.snapshot().drafters), step
        counters.count(drafts, rejected, np.ones(4, np.bool_))
    assert [(one.drafter, one.alarm) for one in counters.snapshot().drafters] == [("wrong", "low")]


def test_a_few_drafts_are_no_reason_and_an_alarm_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch("drafter x 7")
    feed(watch, LOW_DRAFTS - 4, accepted=0.0)
    assert watch.alarm is Alarm.NONE
    assert not caplog.records
    feed(watch, 5 * LOW_DRAFTS, accepted=0.0)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "drafter x 7" in record.getMessage()
    feed(watch, 2 * LOW_DRAFTS, accepted=0.5)
    assert watch.alarm is Alarm.NONE
