"""Who answers the questions: an engine that speculates or one that doesn't, over the same model and memory.

Only one of them works at a time. Answers owe nothing to those before but what a drafter has learnt: there is no prefix
cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cluster.config import EngineSection
from core.errors import InternalError, SlipstreamError
from core.types import FinishReason, Request, Role, SamplingParams, TokenLogprobs
from engine.block_manager import BlockManager
from engine.drafts import Draft, Speculator, Verdict
from engine.engine import Engine, Report
from engine.runner import ModelRunner
from engine.schedule import Schedule, SchedulerConfig
from engine.scheduler import Scheduler
from engine.sequence import Sequence as EngineSequence
from engine.step import StepBatch, StepOutput

_LOOK_S = 1.0
"""How often to look whether the engine is still there."""


@dataclass(slots=True)
class Answer:
    """Times are in seconds from when the question was asked."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_s: float = 0.0
    """When the first token came."""
    seconds: float = 0.0
    """When the last did."""
    steps: int = 0
    """That brought the tokens after the first."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A draft for question `index`, and the nodes of it that were accepted."""

    index: int
    draft: Draft
    path: Sequence[int]


class Watched:
    """A speculator, and what became of each of its drafts. Implements engine.drafts.Speculator."""

    def __init__(self, speculator: Speculator) -> None:
        self.judged: list[Judged] = []
        self._speculator = speculator
        self.propose, self.settle, self.forget = speculator.propose, speculator.settle, speculator.forget
        self.pack, self.unpack = speculator.pack, speculator.unpack

    @property
    def taps(self) -> tuple[int, ...]:
        return self._speculator.taps

    @property
    def reads_logits(self) -> bool:
        return self._speculator.reads_logits

    def judge(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[int | Verdict]:
        verdicts = self._speculator.judge(schedule, batch, output)
        chunks = [chunk for chunk in schedule.chunks if chunk.samples]
        for chunk, verdict in zip(chunks, verdicts, strict=True):
            if chunk.draft is not None and isinstance(verdict, Verdict):
                self.judged.append(Judged(int(chunk.sequence.request_id), chunk.draft, verdict.path))
        return verdicts


class Arm:
    """An engine with a thread of its own. `batch`: most questions at a time."""

    def __init__(self, runner: ModelRunner, batch: int, speculator: Speculator | None = None) -> None:
        config = SchedulerConfig(
            max_num_seqs=batch,
            max_num_batched_tokens=max(EngineSection().batched_tokens(Role.BOTH), batch),
            max_model_len=runner.config.max_position_embeddings,
        )
        blocks = BlockManager(runner.pool.num_blocks, runner.layout.block_size, enable_prefix_caching=False)
        self._engine = Engine(_Lent(runner), Scheduler(config, blocks), self._take, speculator=speculator)
        self._answers: list[Answer] = []
        self._asked = 0.0
        self._num_open = 0
        self._error: SlipstreamError | None = None
        self._done = threading.Event()
        self._engine.start()

    def answer(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[Answer]:
        """All of them at once, to their ends. Raises what ended one before its time."""
        self._done.clear()
        self._answers, self._num_open = [Answer() for _ in prompts], len(prompts)
        sequences = [
            EngineSequence(Request(request_id=str(index), prompt_token_ids=prompt, sampling=params, deadline=0.0))
            for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
        ]
        self._asked = time.perf_counter()
        for sequence in sequences:
            self._engine.add(sequence)
        while not self._done.wait(_LOOK_S):
            if not self._engine.alive:
                raise InternalError("the engine's loop has ended; why is on standard error")
        if self._error is not None:
            raise self._error
        return self._answers

    def close(self) -> None:
        self._engine.stop()

    def _take(self, report: Report) -> None:
        """On the engine's thread."""
        now = time.perf_counter() - self._asked
        for update in report.updates:
            answer = self._answers[int(update.sequence.request_id)]
            if answer.token_ids:
                answer.steps += 1
            else:
                answer.first_s = now
            answer.seconds = now
            answer.token_ids += update.token_ids
            answer.logprobs += update.logprobs or []
            if update.finish is not None:
                self._num_open -= 1
                if update.finish.reason is FinishReason.ERROR:
                    self._error = update.finish.to_error()
        if not self._num_open:
            self._done.set()


class _Lent:
    """A runner that outlives the engine it is lent to."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.max_steps_in_flight = runner.max_steps_in_flight

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        return self._runner.submit(batch)

    def check_health(self) -> None:
        self._runner.check_health()

    def shutdown(self) -> None:
        pass
