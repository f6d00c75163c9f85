"""The loop: commands in, schedule, run, update, report.

One thread owns the scheduler and, through it, the blocks; everybody else talks to it by commands that it carries out
between two steps. What a step produced is handed to `on_report` on that thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.errors import InternalError, InvalidRequest
from core.types import Finish
from engine.batching import build_batch
from engine.scheduler import Schedule, Scheduler, SequenceUpdate
from engine.sequence import Sequence
from engine.step import Runner

logger = logging.getLogger(__name__)

THREAD_NAME = "engine"
"""What `top -H` shows for the thread that computes, and for those that OpenMP starts from it."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot taken between two steps. Counters are monotonic since start."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one turn of the loop brought. `granted` sequences have their blocks and wait for KV (Engine.join)."""

    updates: list[SequenceUpdate] = field(default_factory=list)
    granted: list[Sequence] = field(default_factory=list)


class Engine:
    """Runs sequences. Methods may be called from any thread and return at once; after a step has failed, `failure`
    says how, every sequence has ended with InternalError, and so does each one added later."""

    def __init__(self, runner: Runner, scheduler: Scheduler, on_report: Callable[[Report], None]) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._on_report = on_report
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, Sequence] = {}
        self._rejected: list[SequenceUpdate] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._step_seconds = 0.0
        self._step_started: float | None = None
        self.failure: InternalError | None = None
        self.stats = self._snapshot()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish the step in flight, then end the thread. Sequences still live are dropped."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._runner.shutdown()

    @property
    def seconds_in_step(self) -> float:
        """How long the step under way has been running; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    @property
    def alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    # --- commands --------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Prefill and decode it (or hold it after prefill)."""
        self._commands.put(lambda: self._admit(sequence, self._scheduler.add))

    def reserve(self, sequence: Sequence) -> None:
        """Allocate blocks for its prompt as soon as there is room; it then shows up in Report.granted."""
        self._commands.put(lambda: self._admit(sequence, self._scheduler.reserve))

    def join(self, request_id: str, token_ids: list[int]) -> None:
        """The KV of a reserved sequence has arrived; `token_ids` are the output tokens its giver emitted."""
        self._commands.put(lambda: self._join(request_id, token_ids))

    def release(self, request_id: str) -> None:
        """Unreference the blocks of a held sequence."""
        self._commands.put(lambda: self._drop(request_id, self._scheduler.release))

    def abort(self, request_id: str) -> None:
        """End a sequence in whatever state, without a report. Unknown ids are ignored."""
        self._commands.put(lambda: self._drop(request_id, self._scheduler.abort))

    def set_step_tokens(self, max_num_batched_tokens: int) -> None:
        """Change the token budget of a step."""
        self._commands.put(lambda: self._set_step_tokens(max_num_batched_tokens))

    # --- the loop --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        _name_thread(THREAD_NAME)
        idle = True
        while self._carry_out_commands(wait=idle):
            schedule = self._scheduler.schedule()
            report = Report(updates=self._rejected, granted=list(schedule.granted))
            self._rejected = []
            if schedule.chunks:
                report.updates.extend(self._step(schedule))
            # Nothing to run and nothing granted: only a command can change that.
            idle = not schedule.chunks and not schedule.granted
            self.stats = self._snapshot()
            if report.updates or report.granted:
                self._on_report(report)

    def _carry_out_commands(self, wait: bool) -> bool:
        """Run what is queued, after waiting for a first command if `wait`. False once stop was asked for."""
        try:
            command = self._commands.get(block=wait)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _step(self, schedule: Schedule) -> list[SequenceUpdate]:
        self._step_started = time.monotonic()
        future = self._runner.submit(build_batch(schedule))
        error = future.exception()  # waits
        self._step_started = None
        if error is not None:
            return self._fail(error)
        output = future.result()
        updates = self._scheduler.update(schedule, output.token_ids.tolist(), output.logprobs)
        self._steps += 1
        self._step_seconds += output.seconds
        self._count(updates)
        for update in updates:
            if update.finish is not None:
                self._live.pop(update.sequence.request_id, None)
        return updates

    def _count(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self._generated_tokens += len(update.token_ids)
            if update.index == len(update.sequence.request.emitted_token_ids):
                self._prompt_tokens += update.sequence.num_prompt_tokens

    def _fail(self, error: BaseException) -> list[SequenceUpdate]:
        """A step raised: device state is unknown, so nothing that lives here can go on. Blocks that a peer may still be
        reading are freed too; no step will ever write to them."""
        logger.error("engine step failed; the worker will be replaced", exc_info=error)
        self.failure = InternalError(f"engine step failed: {error}")
        victims = list(self._live.values())
        for sequence in victims:
            self._drop(sequence.request_id, self._scheduler.abort)
        return [self._failed(sequence, self.failure) for sequence in victims]

    # --- command bodies, on the loop's thread ------------------------------------------------------------------------

    def _admit(self, sequence: Sequence, accept: Callable[[Sequence], None]) -> None:
        if self.failure is not None:
            self._rejected.append(self._failed(sequence, self.failure))
            return
        try:
            accept(sequence)
        except InvalidRequest as error:
            self._rejected.append(self._failed(sequence, error))
        else:
            self._live[sequence.request_id] = sequence

    def _join(self, request_id: str, token_ids: list[int]) -> None:
        if request_id in self._live:  # it may have been aborted while its KV was on the way
            self._scheduler.join(request_id, token_ids)

    def _set_step_tokens(self, max_num_batched_tokens: int) -> None:
        self._scheduler.config = replace(self._scheduler.config, max_num_batched_tokens=max_num_batched_tokens)

    def _drop(self, request_id: str, free: Callable[[str], object]) -> None:
        if self._live.pop(request_id, None) is not None:
            free(request_id)

    @staticmethod
    def _failed(sequence: Sequence, error: InternalError | InvalidRequest) -> SequenceUpdate:
        return SequenceUpdate(
            sequence=sequence, token_ids=[], index=sequence.num_output_tokens, finish=Finish.from_error(error)
        )

    def _snapshot(self) -> EngineStats:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=blocks.num_free,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=blocks.num_queried_tokens,
            prefix_cache_hits=blocks.num_hit_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
        )


def _name_thread(name: str) -> None:
    """Tell the kernel, where it wants to know; Python before 3.14 does not."""
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    if comm.exists():
        comm.write_text(name)
