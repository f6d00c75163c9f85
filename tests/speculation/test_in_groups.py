"""Speculation over a group of processes: tensor and pipeline parallel ranks verify trees and move their KV as one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from core.types import SamplingParams
from engine.parallel.runner import GroupRunner
from engine.step import StepBatch, StepOutput
from speculation.rounds import Needs
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import TINY
from tests.engine.late import LateRunner, check_same, engine_over
from tests.speculation.prompting import Prompter, in_batch

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2}
NUM_BLOCKS = 30
"""Few enough that some requests are preempted."""


class WatchedRunner(LateRunner):
    """Knows whether ranks sent whole rows of logits."""

    def __init__(self, runner: GroupRunner) -> None:
        super().__init__(runner, 2)
        self.steps: list[Future[StepOutput]] = []

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        self.steps.append(super().submit(batch))
        return self.steps[-1]

    @property
    def num_with_logits(self) -> int:
        return sum(step.result().logits is not None for step in self.steps)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
def test_outputs_of_a_group_are_what_they_are_without(
    make_checkpoint: Callable[..., Path], tp_size: int, pp_size: int
) -> None:
    layers = TINY["num_hidden_layers"]
    drafter = Prompter(Needs(taps=(0, layers), top=3))
    jobs = [
        reproducible.Job(5 + 9 * n, SamplingParams(max_tokens=30, temperature=0.7 * (n % 2), seed=n)) for n in range(6)
    ]
    runner = GroupRunner.load(
        make_checkpoint(**SHAPE),
        tp_size=tp_size,
        pp_size=pp_size,
        dtype="float32",
        device="cpu",
        num_blocks=NUM_BLOCKS,
        block_size=8,
    )
    try:
        found = []
        for speculator in (None, in_batch(drafter)):
            watched = WatchedRunner(runner)
            with engine_over(watched, num_blocks=NUM_BLOCKS, speculator=speculator) as harness:
                sequences = [job.sequence(str(index)) for index, job in enumerate(jobs)]
                found.append(harness.outputs(sequences))
            assert watched.num_with_logits == 0  # the likeliest tokens are enough
            for job, output in zip(jobs, found[0], strict=True):
                drafter.outputs[tuple(job.sequence("").request.prompt_token_ids)] = output.token_ids
    finally:
        runner.shutdown()
        runner.pool.close()
    for ours, theirs in zip(found[1], found[0], strict=True):
        check_same(ours, theirs)
    assert sum(feedback.outcome.num_accepted.sum() for feedback in drafter.seen) > len(jobs)
    hidden = TINY["hidden_size"]
    for feedback in drafter.seen:
        seen = feedback.observed
        assert {tap: tuple(states.shape) for tap, states in seen.taps.items()} == {
            tap: (len(seen.indices), hidden) for tap in (0, layers)
        }
        assert seen.top_ids is not None
        assert seen.top_ids.shape == (len(seen.indices), 3)
