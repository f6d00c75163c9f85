"""An engine over a group with two stages: each works on a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from cluster.config.tree import SlipstreamConfig
from cluster.worker import make_node
from core.types import Request, Role, SamplingParams
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.step import StepBatch, StepOutput
from tests.engine.driver import tokens
from tests.engine.late import Output, check_same, engine_over

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
OPTIONS = {"dtype": "float32", "device": "cpu", "num_blocks": 64, "block_size": 8}


@pytest.fixture(scope="module")
def stages(make_checkpoint: Callable[..., Path]) -> Iterator[GroupRunner]:
    runner = GroupRunner.load(make_checkpoint(**SHAPE), tp_size=1, pp_size=2, **OPTIONS)
    yield runner
    runner.shutdown()
    runner.pool.close()


class Borrowed:
    """A runner that outlives the engine, and remembers how many steps were in flight at a time."""

    def __init__(self, runner: GroupRunner | ModelRunner) -> None:
        self.max_steps_in_flight = runner.max_steps_in_flight
        self.in_flight: list[int] = []
        self._runner = runner
        self._flying: list[Future[StepOutput]] = []

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        future = self._runner.submit(batch)
        self._flying = [*(flying for flying in self._flying if not flying.done()), future]
        self.in_flight.append(len(self._flying))
        return future

    def check_health(self) -> None:
        self._runner.check_health()

    def shutdown(self) -> None: ...


def sequences(max_tokens: int) -> list[Sequence]:
    """Greedy and drawn, with penalties and logprobs, of prompts that share a beginning and some that take chunks."""
    settings = [
        SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=2),
        SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=3, top_p=0.9, prompt_logprobs=1),
        SamplingParams(max_tokens=max_tokens, temperature=1.2, seed=4, presence_penalty=1.0),
        SamplingParams(max_tokens=max_tokens // 2, temperature=0.7, seed=5, repetition_penalty=1.2, logprobs=0),
    ]
    return [
        Sequence(
            Request(
                request_id=str(index),
                prompt_token_ids=tokens(20, seed=1) + tokens(3 + 11 * index, seed=index),
                sampling=settings[index % len(settings)],
                deadline=0,
            )
        )
        for index in range(7)
    ]


def run(runner: Borrowed, num_blocks: int) -> tuple[list[Output], int]:
    with engine_over(runner, num_blocks=num_blocks, step_tokens=48) as harness:
        outputs = harness.outputs(sequences(24))
        assert harness.engine.stats.num_free_blocks == num_blocks
        return outputs, harness.engine.stats.num_preemptions


@pytest.mark.parametrize("num_blocks", [64, 17])
def test_outputs_are_those_of_one_device_and_the_stages_work_at_the_same_time(
    stages: GroupRunner, make_checkpoint: Callable[..., Path], num_blocks: int
) -> None:
    whole = Borrowed(ModelRunner.load(make_checkpoint(**SHAPE), **OPTIONS))
    parted = Borrowed(stages)
    wanted, _ = run(whole, 64)
    found, preemptions = run(parted, num_blocks)
    assert max(whole.in_flight) == 1
    assert max(parted.in_flight) == 2
    assert (preemptions > 0) == (num_blocks < 64)
    for ours, theirs in zip(found, wanted, strict=True):
        check_same(ours, theirs)


async def test_a_worker_keeps_as_many_steps_in_flight_as_it_has_stages(
    stages: GroupRunner, make_checkpoint: Callable[..., Path]
) -> None:
    node = make_node("w", Role.BOTH, stages, SlipstreamConfig(model="tiny"), make_checkpoint(**SHAPE))
    assert node._scheduler.config.max_steps_in_flight == 2
