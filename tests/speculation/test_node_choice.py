"""Which of the nodes that were drafted are verified in a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.acceptance import Acceptance
from speculation.controllers.choice import MARGIN, Choice
from speculation.controllers.step_time import Speculation, StepTime
from speculation.laws import DraftLaw
from speculation.rounds import Load, Outcome
from speculation.tree import DraftBatch
from tests.speculation.machine import Hardware
from tests.speculation.test_tree import batches

NAME = "random"


def timed(per_row: float) -> StepTime:
    """As on a machine where a row costs so much of a second."""
    machine, time = Hardware(fixed=10e-3, per_row=per_row, beyond=0.0), StepTime(1)
    for row_time in machine.row_times((2, 5, 9, 17, 33) * 6, 100):
        time.rehearse(row_time)
    return time


def load_of(requests: int) -> Load:
    return Load(["a"] * requests, np.full(requests, 100), np.full(requests, 32))


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([0.1e-3, 1e-3, 4e-3]), st.sampled_from([0.0, 3e-3]))
def test_no_other_number_of_the_worthiest_nodes_emits_more(
    batch: DraftBatch, per_row: float, drafting_s: float
) -> None:
    assert batch.confidence is not None
    time, load = timed(per_row), load_of(batch.num_requests)
    kept = Choice(time, load, Acceptance(32), drafting_s).of(batch, batch.confidence, 0)
    kept.validate(50)

    def goodput(worths: np.ndarray) -> float:
        sequences = min(len(worths), batch.num_requests)
        added = time.added(load, Speculation(np.array([float(len(worths))]), np.array([float(sequences)])))
        return float((batch.num_requests + worths.sum()) / (time.plain(load) + max(added, drafting_s)))

    worths = np.sort(batch.path_products(batch.confidence))[::-1]
    best = max(goodput(worths[:count]) for count in range(batch.num_nodes + 1))
    assert kept.confidence is not None
    assert goodput(kept.path_products(kept.confidence)) == pytest.approx(best, rel=MARGIN - 1)


def chain(*chances: float) -> DraftBatch:
    drafts = DraftBatch.of_chains([list(range(len(chances)))], DraftLaw.POINT_MASS, NAME)
    return replace(drafts, confidence=np.array(chances, np.float32))


def test_a_drafter_that_is_too_sure_of_itself_is_believed_less() -> None:
    stats, sure = Acceptance(8), chain(0.8, 0.9)
    choice = Choice(timed(1e-3), load_of(1), stats, 0.0)
    assert sure.confidence is not None
    assert choice.of(sure, sure.confidence, 0).num_nodes == 2
    for _ in range(50):
        stats.observe(sure, Outcome.of(sure, np.zeros(2, np.bool_), np.zeros(1, np.int64)), np.array([2]), ["a"])
    assert choice.of(sure, sure.confidence, 0).num_nodes == 0
    assert stats.worths("another", np.array([0.8])).tolist() == [0.8]


def test_less_is_never_worth_proposing_than_is_worth_verifying() -> None:
    choice = Choice(timed(1e-3), load_of(1), Acceptance(8), 0.0)
    floor = choice.floor(1.0)
    assert 0 < floor < 0.1
    one = chain(floor / 2)
    assert one.confidence is not None
    assert choice.of(one, one.confidence, 0).num_nodes == 0
