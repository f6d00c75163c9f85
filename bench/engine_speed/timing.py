"""One step of an engine as its loop runs it, with a clock around it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from engine.batching import build_batch
from engine.drafts import Draft, Verdict
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from engine.schedule import Schedule
from engine.scheduler import Scheduler
from engine.step import StepOutput


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    scheduling_s: float
    """Of these, in the scheduler and in building the batch."""


def timed_step(runner: ModelRunner | GroupRunner, scheduler: Scheduler, draft: Draft | None = None) -> Step:
    """With a `draft`, every sequence that decodes has it verified, and none of it is accepted."""
    started = time.perf_counter()
    schedule = scheduler.schedule()
    if draft is not None:
        scheduler.attach(schedule, [draft] * len(scheduler.draft_room(schedule)))
    batch = build_batch(schedule)
    submitted = time.perf_counter()
    output = runner.submit(batch).result()
    if runner.pool.device.type == "cuda":
        torch.cuda.synchronize(runner.pool.device)
    done = time.perf_counter()
    scheduler.update(schedule, _sampled(schedule, output, draft), output.logprobs)
    ended = time.perf_counter()
    return Step(ended - started, ended - done + submitted - started)


def _sampled(schedule: Schedule, output: StepOutput, draft: Draft | None) -> list[int | Verdict]:
    token_ids: list[int | Verdict] = output.token_ids.tolist()
    if draft is None:
        return token_ids
    return [Verdict([0], []) if chunk.draft is not None else 0 for chunk in schedule.chunks if chunk.samples]
