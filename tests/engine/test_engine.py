"""The loop, over a runner whose next token is a function of the position."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from core.types import FinishReason, Request, SamplingParams
from engine.block_manager import BlockManager
from engine.engine import Engine, Report
from engine.scheduler import Scheduler, SchedulerConfig, SequenceUpdate
from engine.sequence import Sequence, Status
from engine.step import StepBatch, StepOutput

WAIT_S = 60


class CountingRunner:
    """The token at position i is 100 + i; `broken` makes the next step raise."""

    def __init__(self) -> None:
        self.broken = False
        self.closed = False

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        future: Future[StepOutput] = Future()
        if self.broken:
            future.set_exception(RuntimeError("device lost"))
        else:
            future.set_result(StepOutput(token_ids=np.asarray(batch.positions[batch.logit_rows] + 101)))
        return future

    def shutdown(self) -> None:
        self.closed = True


class Harness:
    def __init__(self) -> None:
        self.reports: queue.Queue[Report] = queue.Queue()
        self.runner = CountingRunner()
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
        self.blocks = BlockManager(num_blocks=16, block_size=16)
        self.engine = Engine(self.runner, Scheduler(config, self.blocks), self.reports.put)
        self.engine.start()

    def updates(self, request_id: str) -> Iterator[SequenceUpdate]:
        """Updates of one request until it finishes."""
        while True:
            for update in self.reports.get(timeout=WAIT_S).updates:
                if update.sequence.request_id == request_id:
                    yield update
                    if update.finish is not None:
                        return


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.engine.stop()
    assert harness.runner.closed


def sequence(name: str, prompt: int = 5, max_tokens: int = 3, hold: bool = False) -> Sequence:
    request = Request(
        request_id=name,
        prompt_token_ids=list(range(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        deadline=0.0,
    )
    return Sequence(request, hold_after_prefill=hold)


def test_a_sequence_runs_to_its_end_and_gives_its_blocks_back(harness: Harness) -> None:
    harness.engine.add(sequence("a"))
    updates = list(harness.updates("a"))
    assert [t for u in updates for t in u.token_ids] == [105, 106, 107]
    assert updates[-1].finish is not None
    assert updates[-1].finish.reason is FinishReason.LENGTH
    assert harness.blocks.num_free == 16


def test_a_sequence_that_can_never_fit_ends_with_the_callers_error(harness: Harness) -> None:
    harness.engine.add(sequence("big", prompt=500))
    (update,) = harness.updates("big")
    assert update.finish is not None
    assert update.finish.error == "InvalidRequest"


def test_a_held_sequence_keeps_its_blocks_until_released(harness: Harness) -> None:
    held = sequence("h", hold=True)
    harness.engine.add(held)
    assert [opened.sequence for opened in harness.reports.get(timeout=WAIT_S).opened] == [held]
    report = harness.reports.get(timeout=WAIT_S)
    assert report.updates[0].token_ids == [105]
    assert held.status is Status.HELD
    assert harness.engine.stats.num_free_blocks == 15
    harness.engine.release("h")
    harness.engine.add(sequence("after", max_tokens=1))
    list(harness.updates("after"))
    assert harness.engine.stats.num_free_blocks == 16


def test_kv_from_elsewhere_joins_the_batch_at_the_second_token(harness: Harness) -> None:
    harness.engine.reserve(sequence("r"))
    (granted,) = harness.reports.get(timeout=WAIT_S).granted
    assert granted.status is Status.RESERVED
    harness.engine.join("r", [105])
    updates = list(harness.updates("r"))
    assert [(u.index, u.token_ids) for u in updates] == [(1, [106]), (2, [107])]


def test_an_abort_before_the_kv_arrives_frees_the_reservation(harness: Harness) -> None:
    harness.engine.reserve(sequence("r"))
    harness.reports.get(timeout=WAIT_S)
    harness.engine.abort("r")
    harness.engine.join("r", [105])
    harness.engine.add(sequence("after", max_tokens=1))
    list(harness.updates("after"))
    assert harness.engine.stats.num_free_blocks == 16


def test_a_failed_step_ends_every_sequence_and_marks_the_engine(harness: Harness) -> None:
    harness.engine.reserve(sequence("waits"))
    harness.reports.get(timeout=WAIT_S)
    harness.runner.broken = True
    harness.engine.add(sequence("a"))
    ended = {u.sequence.request_id: u.finish for u in harness.reports.get(timeout=WAIT_S).updates}
    assert {name: finish.error for name, finish in ended.items() if finish} == {
        "waits": "InternalError",
        "a": "InternalError",
    }
    assert not harness.engine.alive
    harness.engine.add(sequence("late"))
    (update,) = harness.updates("late")
    assert update.finish is not None
    assert update.finish.error == "InternalError"
