"""Runners that answer late, and an engine over one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from core.types import Finish, PromptLogprobs, Request, SamplingParams, TokenLogprobs
from engine.block_manager import BlockManager
from engine.engine import Engine, Report
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence
from engine.speculator import Speculator
from engine.step import Runner, StepBatch, StepOutput
from engine.structured.grammars import Grammars
from tests.engine.driver import tokens

WAIT_S = 60


@dataclass
class Step:
    """As it lies at a runner. The token at position i is 100 + i."""

    batch: StepBatch
    future: Future[StepOutput] = field(default_factory=Future)

    def end(self) -> None:
        rows = self.batch.logit_rows
        self.future.set_result(StepOutput(token_ids=self.batch.positions[rows] + 101, seconds=0.5))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return np.diff(self.batch.query_starts).tolist()


class HandRunner:
    """Its steps end when the test says so, and at once after `let_go`."""

    max_steps_in_flight = 2

    def __init__(self) -> None:
        self.steps: queue.Queue[Step] = queue.Queue()
        self.ended = threading.Event()
        self._let_go = False
        self._lock = threading.Lock()

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        step = Step(batch)
        with self._lock:
            if self._let_go:
                step.end()
            else:
                self.steps.put(step)
        return step.future

    def let_go(self) -> None:
        with self._lock:
            self._let_go = True
            while not self.steps.empty():
                self.steps.get().end()

    def next(self) -> Step:
        return self.steps.get(timeout=WAIT_S)

    def check_health(self) -> None: ...

    def shutdown(self) -> None:
        self.ended.set()


class LateRunner:
    """Runs the steps of another in their order on a thread of its own, up to `depth` of them behind."""

    def __init__(self, runner: Runner, depth: int) -> None:
        self.max_steps_in_flight = depth
        self.most_in_flight = 0
        self._runner = runner
        self._flying: list[Future[StepOutput]] = []
        self._thread = ThreadPoolExecutor(1)

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        future = self._thread.submit(lambda: self._runner.submit(batch).result())
        self._flying = [flying for flying in self._flying if not flying.done()] + [future]
        self.most_in_flight = max(self.most_in_flight, len(self._flying))
        return future

    def check_health(self) -> None: ...

    def shutdown(self) -> None:
        self._thread.shutdown()


@dataclass
class Output:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finish: Finish | None = None


class Harness:
    def __init__(
        self,
        runner: Runner,
        num_blocks: int,
        step_tokens: int,
        grammars: Grammars | None,
        speculator: Speculator | None = None,
        num_seqs: int = 8,
    ) -> None:
        self.reports: queue.Queue[Report] = queue.Queue()
        self.blocks = BlockManager(num_blocks, 8)
        config = SchedulerConfig(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=step_tokens,
            max_model_len=256,
            max_steps_in_flight=runner.max_steps_in_flight,
            min_decodes_per_step=1,
        )
        self.engine = Engine(runner, Scheduler(config, self.blocks), self.reports.put, grammars, speculator=speculator)

    def tokens(self) -> list[tuple[str, list[int]]]:
        """What the next report brings."""
        return [(u.sequence.request_id, u.token_ids) for u in self.reports.get(timeout=WAIT_S).updates]

    def ends(self) -> dict[str, str]:
        updates = self.reports.get(timeout=WAIT_S).updates
        return {u.sequence.request_id: u.finish.error or u.finish.reason.value for u in updates if u.finish}

    def outputs(self, sequences: list[Sequence]) -> list[Output]:
        """All of them to their ends."""
        found = {sequence.request_id: Output() for sequence in sequences}
        for sequence in sequences:
            self.engine.add(sequence)
        while any(output.finish is None for output in found.values()):
            for update in self.reports.get(timeout=WAIT_S).updates:
                output = found[update.sequence.request_id]
                assert output.finish is None
                assert update.index == len(output.token_ids)
                output.token_ids += update.token_ids
                output.logprobs += update.logprobs or []
                output.prompt_logprobs = update.prompt_logprobs or output.prompt_logprobs
                output.finish = update.finish
        return list(found.values())

    def beginnings(self, sequences: list[Sequence], length: int) -> list[list[int]]:
        """So many tokens of each, which is aborted when it has them."""
        found: dict[str, list[int]] = {sequence.request_id: [] for sequence in sequences}
        for sequence in sequences:
            self.engine.add(sequence)
        short = set(found)
        while short:
            for update in self.reports.get(timeout=WAIT_S).updates:
                name = update.sequence.request_id
                found[name] += update.token_ids
                if name in short and len(found[name]) >= length:
                    self.engine.abort(name)
                    short.discard(name)
        return [token_ids[:length] for token_ids in found.values()]


@contextmanager
def engine_over(
    runner: Runner,
    *,
    num_blocks: int = 64,
    step_tokens: int = 64,
    grammars: Grammars | None = None,
    speculator: Speculator | None = None,
    num_seqs: int = 8,
) -> Iterator[Harness]:
    harness = Harness(runner, num_blocks, step_tokens, grammars, speculator, num_seqs)
    harness.engine.start()
    try:
        yield harness
    finally:
        harness.engine.stop()
        assert not harness.engine._thread.is_alive(), "the engine waits for a step that nobody will end"


def sequence(name: str, prompt: int = 5, max_tokens: int = 3) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    request = Request(request_id=name, prompt_token_ids=tokens(prompt, seed=prompt), sampling=sampling, deadline=0)
    return Sequence(request)


def check_same(ours: Output, theirs: Output) -> None:
    assert (ours.token_ids, ours.finish) == (theirs.token_ids, theirs.finish)
    for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
    if ours.prompt_logprobs is not None and theirs.prompt_logprobs is not None:
        one, other = (np.frombuffer(s.logprobs, "<f4") for s in (ours.prompt_logprobs, theirs.prompt_logprobs))
        assert np.allclose(one, other, atol=1e-4)
