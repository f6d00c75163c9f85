"""Acceptance that can't be right is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from speculation.alarm import FLOOR, HIGH_DRAFTS, LOW_DRAFTS, OF_ONE, REMEMBERED, Alarm, Record, Watch
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.counters import Counters
from speculation.laws import DraftLaw
from speculation.overlap import Overlap
from speculation.rounds import Outcome
from speculation.tree import DraftBatch
from tests.speculation.machine import Hardware, SimulatedDrafter, simulate

NOTHING = Overlap(0.0, 0)

AT_FIRST = Record().most_misses
"""Where nothing is known of a drafter."""


def feed(watch: Watch, accepted: NDArray[np.bool_], free: NDArray[np.bool_] | None = None, requests: int = 99) -> None:
    """Four at a time, of so many requests in turn."""
    free = np.ones(len(accepted), np.bool_) if free is None else free
    for start in range(0, len(accepted), 4):
        of = [at % requests for at in range(start, start + 4)]
        watch.count(accepted[start : start + 4], free[start : start + 4], of)


def evenly(count: int, share: float) -> NDArray[np.bool_]:
    places = np.arange(1, count + 1)
    return np.floor(places * share) > np.floor((places - 1) * share)


def drawn(count: int, share: float, seed: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.random.default_rng(seed).random(count) < share
    return found


@pytest.mark.parametrize(
    ("accepted", "free", "alarm"),
    [
        (0.0, 1.0, Alarm.LOW),
        (0.0, 0.0, Alarm.LOW),
        (0.008, 1.0, Alarm.LOW),
        (0.02, 1.0, Alarm.NONE),
        (0.9, 1.0, Alarm.NONE),
        (0.995, 1.0, Alarm.NONE),
        (1.0, 1.0, Alarm.HIGH),
        (1.0, 0.0, Alarm.NONE),
    ],
)
def test_an_alarm_is_raised_for_what_no_drafter_does(accepted: float, free: float, alarm: Alarm) -> None:
    watch = Watch("drafter x")
    feed(watch, evenly(2 * HIGH_DRAFTS, accepted), evenly(2 * HIGH_DRAFTS, free))
    assert watch.alarm is alarm


@pytest.mark.parametrize(("before", "after"), [(FLOOR, FLOOR), (0.3, 0.15), (0.8, 0.25)])
def test_no_alarm_is_raised_for_texts_that_are_hard_to_foretell(before: float, after: float) -> None:
    for seed in range(5):
        watch = Watch("drafter x")
        for share in (before, after, before):
            feed(watch, drawn(5 * LOW_DRAFTS, share, seed))
            assert watch.alarm is Alarm.NONE


def test_what_is_counted_of_a_drafter_raises_its_alarm() -> None:
    """As a worker counts the drafts of its steps."""
    counters, drafts = Counters(), DraftBatch.of_chains([[5, 6]] * 4, DraftLaw.POINT_MASS, "wrong")
    rejected = Outcome.of(drafts, np.zeros(8, np.bool_), np.zeros(4, np.int64))
    for step in range(-(-AT_FIRST // 4)):
        assert all(not one.alarm for one in counters.snapshot().drafters), step
        counters.count(drafts, rejected, NOTHING, np.ones(4, np.bool_), range(step, step + 4))
    assert [(one.drafter, one.alarm) for one in counters.snapshot().drafters] == [("wrong", "low")]


def test_the_better_a_drafter_was_the_sooner_it_is_missed() -> None:
    """Whatever its version; and what was long ago counts no more."""
    counters, drafts = Counters(), DraftBatch.of_chains([[5]] * 4, DraftLaw.POINT_MASS, "x", "1")
    for step in range(50):
        accepted = Outcome.of(drafts, np.arange(4) % 2 == 0, np.zeros(4, np.int64))
        counters.count(drafts, accepted, NOTHING, np.ones(4, np.bool_), range(step, step + 4))
    most = counters.records["x"].most_misses
    assert most < AT_FIRST / 2
    newer, alarm = replace(drafts, version="2"), [""]
    rejected = Outcome.of(newer, np.zeros(4, np.bool_), np.zeros(4, np.int64))
    while not alarm[-1]:
        counters.count(newer, rejected, NOTHING, np.ones(4, np.bool_), range(len(alarm), len(alarm) + 4))
        alarm.append(counters.by_drafter["x", "2"].watch.alarm.value)
    assert (alarm[-1], counters.by_drafter["x", "1"].watch.alarm) == ("low", Alarm.NONE)
    assert most <= 4 * (len(alarm) - 1) < most + 4
    forgotten = Record(100, 80)
    for _ in range(8):
        forgotten.add(np.zeros(REMEMBERED, np.bool_))
    assert forgotten.most_misses == AT_FIRST


@pytest.mark.parametrize(("breaks", "steps"), [(0, 12_000), (600, 1000)])
def test_a_drafter_that_the_controller_gives_up_is_found_by_the_few_drafts_that_are_verified(
    breaks: int, steps: int
) -> None:
    """Of no use from some step on: of one that was good before it is known almost at once."""
    counters, alphas, verified = Counters(), {"any": 0.0}, list[int]()

    def classes(step: int) -> list[str]:
        alphas["any"] = 0.6 if step < breaks else 0.0
        counts = counters.by_drafter.get(("x", ""))
        if counts is not None and step >= breaks and counts.watch.alarm is not Alarm.LOW:
            verified.append(counts.drafts)
        return ["any"] * 4

    controller = make_controller("goodput", Limits(16, ("x",), Hardware().row_times((2, 5, 9, 17) * 3, 200)))
    simulate(controller, {"x": SimulatedDrafter(alphas)}, classes, steps, counters=counters)
    assert counters.by_drafter["x", ""].watch.alarm is Alarm.LOW
    assert verified[-1] - verified[0] < (2 * AT_FIRST / 3 if breaks else AT_FIRST)


@pytest.mark.parametrize(("batch", "steps"), [(16, 3000), (32, 2000)])
def test_where_others_are_asked_about_as_well_it_is_found_in_a_fraction_of_the_steps(batch: int, steps: int) -> None:
    """Without that it takes 10,000 at 16."""
    alarms = []
    for sounds in (False, True):
        counters = Counters()
        controller = make_controller("goodput", Limits(16, ("x",), Hardware().row_times((2, 5, 9, 17) * 3, 200)))
        drafters = {"x": SimulatedDrafter(0.0)}
        simulate(controller, drafters, ["any"] * batch, steps, counters=counters, sounds=sounds)
        alarms.append(counters.by_drafter["x", ""].watch.alarm)
    assert alarms == [Alarm.NONE, Alarm.LOW]


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_a_drafter_that_is_only_not_worth_it_raises_none(alpha: float) -> None:
    for seed in range(3):
        counters = Counters()
        controller = make_controller("goodput", Limits(16, ("x",), Hardware().row_times((2, 5, 9, 17) * 3, 200)))
        drafters = {"x": SimulatedDrafter(alpha)}
        simulate(controller, drafters, ["any"] * 16, 2000, counters=counters, sounds=True, seed=seed)
        assert counters.by_drafter["x", ""].watch.alarm is Alarm.NONE


def test_one_request_of_which_nothing_is_foretold_raises_none() -> None:
    watch = Watch("drafter x")
    feed(watch, drawn(LOW_DRAFTS, 0.5, 0))
    feed(watch, np.zeros(LOW_DRAFTS // 2, np.bool_), requests=1)
    assert watch.alarm is Alarm.NONE
    feed(watch, np.zeros(LOW_DRAFTS // 2, np.bool_), requests=LOW_DRAFTS // 2 // OF_ONE)
    assert watch.alarm is Alarm.LOW


def test_a_few_drafts_are_no_reason_and_an_alarm_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, nothing = Watch("drafter x 7"), np.zeros(6 * LOW_DRAFTS, np.bool_)
    feed(watch, nothing[: AT_FIRST - 4])
    assert watch.alarm is Alarm.NONE
    assert not caplog.records
    feed(watch, nothing)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "drafter x 7" in record.getMessage()
    feed(watch, evenly(2 * LOW_DRAFTS, 0.5))
    assert watch.alarm is Alarm.NONE
