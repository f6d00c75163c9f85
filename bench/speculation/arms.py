"""Who answers the questions: an engine that speculates or one that doesn't, over the same model and memory.

Both are turned by one thread, a step of the one after a step of the other, and each has a clock that stands still
meanwhile: whatever else the machine does meets both alike. Answers owe nothing to those before but what a drafter has
learnt: there is no prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cluster.config.engine import EngineSection
from core.errors import SlipstreamError
from core.types import FinishReason, PromptLogprobs, Request, Role, SamplingParams, TokenLogprobs
from engine.block_manager import BlockManager
from engine.drafts import Draft, Verdict
from engine.engine import Engine, Report
from engine.runner import ModelRunner
from engine.schedule import Schedule, SchedulerConfig
from engine.scheduler import Scheduler
from engine.sequence import Sequence as EngineSequence
from engine.speculator import Speculator
from engine.step import StepBatch, StepOutput


@dataclass(slots=True)
class Answer:
    """Times are in seconds from when the question was asked, by its arm's clock."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
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
    """A speculator, and what became of each of its drafts. Implements engine.speculator.Speculator."""

    def __init__(self, speculator: Speculator) -> None:
        self.judged: list[Judged] = []
        self._speculator = speculator
        self.rests, self.propose, self.settle = speculator.rests, speculator.propose, speculator.settle
        self.forget, self.pack, self.unpack = speculator.forget, speculator.pack, speculator.unpack

    @property
    def taps(self) -> tuple[int, ...]:
        return self._speculator.taps

    @property
    def reads_logits(self) -> bool:
        return self._speculator.reads_logits

    @property
    def reads_top(self) -> int:
        return self._speculator.reads_top

    def judge(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[int | Verdict]:
        verdicts = self._speculator.judge(schedule, batch, output)
        chunks = [chunk for chunk in schedule.chunks if chunk.samples]
        for chunk, verdict in zip(chunks, verdicts, strict=True):
            if chunk.draft is not None and isinstance(verdict, Verdict):
                self.judged.append(Judged(int(chunk.sequence.request_id), chunk.draft, verdict.path))
        return verdicts


class Arm:
    """An engine that is turned by whoever asks. `batch`: most questions at a time."""

    def __init__(
        self, runner: ModelRunner, batch: int, speculator: Speculator | None = None, blocks: BlockManager | None = None
    ) -> None:
        """`blocks`: of the runner's pool; give arms that are turned by turns the same."""
        config = SchedulerConfig(
            max_num_seqs=batch,
            max_num_batched_tokens=max(EngineSection().batched_tokens(Role.BOTH), batch),
            max_model_len=runner.config.max_position_embeddings,
        )
        scheduler = Scheduler(config, blocks or blocks_of(runner))
        self._engine = Engine(_Lent(runner), scheduler, self._take, speculator=speculator)
        self._answers: list[Answer] = []
        self._turned = self._turning_since = 0.0
        self._num_open = 0
        self._busy = False
        self._error: SlipstreamError | None = None

    def answer(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[Answer]:
        """All of them at once, to their ends. Raises what ended one before its time."""
        (answers,) = answer_by_turns([self], prompts, sampling)
        return answers

    def ask(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[Answer]:
        """What the answers will be, once `turn` has said so."""
        self._answers, self._num_open = [Answer() for _ in prompts], len(prompts)
        self._turned = 0.0
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            request = Request(request_id=str(index), prompt_token_ids=prompt, sampling=params, deadline=0.0)
            self._engine.add(EngineSequence(request))
        return self._answers

    def turn(self) -> bool:
        """One of the engine's loop. False once every answer has ended. Raises what ended one before its time."""
        self._turning_since = time.perf_counter()
        self._busy = self._engine.turn(wait=not self._busy)
        self._turned += time.perf_counter() - self._turning_since
        if self._error is not None:
            raise self._error
        return self._num_open > 0

    def close(self) -> None:
        self._engine.stop()

    def _take(self, report: Report) -> None:
        now = self._turned + time.perf_counter() - self._turning_since
        for update in report.updates:
            answer = self._answers[int(update.sequence.request_id)]
            if answer.token_ids:
                answer.steps += 1
            else:
                answer.first_s = now
            answer.seconds = now
            answer.token_ids += update.token_ids
            answer.logprobs += update.logprobs or []
            answer.prompt_logprobs = answer.prompt_logprobs or update.prompt_logprobs
            if update.finish is not None:
                self._num_open -= 1
                if update.finish.reason is FinishReason.ERROR:
                    self._error = update.finish.to_error()


def answer_by_turns(
    arms: Sequence[Arm], prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
) -> list[list[Answer]]:
    """Of each arm. They take one step at a time, in their order, until all have ended."""
    answers = [arm.ask(prompts, sampling) for arm in arms]
    left = list(arms)
    while left:
        left = [arm for arm in left if arm.turn()]
    return answers


def blocks_of(runner: ModelRunner) -> BlockManager:
    return BlockManager(runner.pool.num_blocks, runner.layout.block_size, enable_prefix_caching=False)


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
