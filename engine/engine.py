"""The loop: commands in, schedule, run, update, report.

Over a runner that works on several steps at a time the loop keeps that many in flight, of different sequences, and
takes in their outputs in the order in which they were submitted.

One thread owns the scheduler and, through it, the blocks; everybody else talks to it by commands that it carries out
between two steps. What a step produced is handed to `on_report` on that thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.draft_state import DraftStates
from core.errors import InternalError, InvalidRequest
from core.types import Finish
from engine.batching import build_batch, of_plain_rows
from engine.counters import Counters, EngineStats
from engine.drafts import Verdict
from engine.schedule import Chunk, Opened
from engine.scheduler import Schedule, Scheduler, SequenceUpdate
from engine.sequence import Sequence, Status
from engine.speculator import Speculator
from engine.step import Runner, StepBatch, StepOutput

if TYPE_CHECKING:
    from engine.structured.constraint import Constraint
    from engine.structured.grammars import Grammars

logger = logging.getLogger(__name__)

THREAD_NAME = "engine"
"""What `top -H` shows for the thread that computes, and for those that OpenMP starts from it."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a turn of the loop brought, in its order: what was decided before the step, or what the step did.

    `granted` sequences have their blocks and wait for KV (Engine.join). `opened` ones have blocks that only
    Engine.release gives back. The KV of `computed` chunks, of those, is in its blocks, as is that of a chunk whose
    update is here."""

    updates: list[SequenceUpdate] = field(default_factory=list)
    granted: list[Sequence] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    computed: list[Chunk] = field(default_factory=list)


OnWritten = Callable[[list[Chunk], int], None]
"""Called on the loop's thread, in the middle of a step: the KV of these chunks of opened sequences is written (on CUDA:
enqueued on the current stream) for all layers up to and with this one."""


class Engine:
    """Runs sequences. Methods may be called from any thread and return at once; after a step has failed, `failure`
    says how, every sequence has ended with InternalError, and so does each one added later."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        on_report: Callable[[Report], None],
        grammars: Grammars | None = None,
        on_written: OnWritten | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """`on_written` is called for runners whose KV sink is `layer_written`."""
        self._speculator = speculator
        self._on_written = on_written
        self._writing: list[Chunk] = []
        self._runner = runner
        self._scheduler = scheduler
        self._on_report = on_report
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._grammars = grammars
        self._live: dict[str, Sequence] = {}
        self._compiling: dict[str, Sequence] = {}
        """Not admitted yet: their grammars are being compiled."""
        self._dropped_in_flight: set[Sequence] = set()
        """That the speculator has yet to forget."""
        self._rejected: list[SequenceUpdate] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._flying: deque[tuple[Schedule, StepBatch, Future[StepOutput]]] = deque()
        self._max_flying = scheduler.config.max_steps_in_flight
        self._busy_since: float | None = None
        self._stopped = False
        self.failure: InternalError | None = None
        self._counters = Counters(scheduler)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish the steps in flight, then end the thread. Sequences still live are dropped."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._grammars is not None:
            self._grammars.close()
        self._runner.shutdown()

    @property
    def seconds_in_step(self) -> float:
        """How long the oldest step under way has been running, the time before it was the oldest left out, or how long
        the loop has been at what came of it or at commands; 0 when it waits for one."""
        started = self._busy_since
        return 0.0 if started is None else time.monotonic() - started

    @property
    def stats(self) -> EngineStats:
        """As the last turn of the loop left it, with what was given since among what waits."""
        return self._counters.stats

    @property
    def alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    # --- commands --------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Prefill and decode it (or hold it after prefill)."""
        self._give(sequence, len(sequence.token_ids), self._scheduler.add)

    def reserve(self, sequence: Sequence) -> None:
        """Allocate blocks for its prompt as soon as there is room; it then shows up in Report.granted."""
        self._give(sequence, 0, self._scheduler.reserve)

    def _give(self, sequence: Sequence, num_tokens: int, accept: Callable[[Sequence], None]) -> None:
        self._counters.given(num_tokens)
        self._commands.put(lambda: self._take(sequence, num_tokens, accept))

    def undefer(self, request_id: str) -> None:
        """A sequence that came deferred may have its blocks now. Unknown ids are ignored."""
        self._commands.put(lambda: self._undefer(request_id))

    def join(
        self, request_id: str, token_ids: list[int], *, exact: bool = True, draft_states: DraftStates | None = None
    ) -> None:
        """The KV of a reserved sequence has arrived, changed by a codec unless `exact`; `token_ids` are the output
        tokens its giver emitted, `draft_states` what its drafters know of the prompt."""
        self._commands.put(lambda: self._join(request_id, token_ids, exact, draft_states or {}))

    def release(self, request_id: str) -> None:
        """End a sequence that was opened, and unreference its blocks."""
        self._commands.put(lambda: self._release(request_id))

    def abort(self, request_id: str) -> None:
        """End a sequence in whatever state, without a report; one that was opened keeps its blocks until released.
        Unknown ids are ignored."""
        self._commands.put(lambda: self._drop(request_id))

    def set_step_tokens(self, max_num_batched_tokens: int) -> None:
        """Change the token budget of a step."""
        self._commands.put(lambda: self._set_step_tokens(max_num_batched_tokens))

    def speculate(self, speculator: Speculator) -> None:
        """Have drafts from now on, after having had none."""
        self._commands.put(lambda: self._start_to_speculate(speculator))

    # --- for the runner ----------------------------------------------------------------------------------------------

    def layer_written(self, layer: int, batch: StepBatch) -> None:  # noqa: ARG002
        """A ModelRunner's kv_sink: it runs a step while it is submitted, so the chunks are those being submitted."""
        if self._on_written is not None:
            self._on_written(self._writing, layer)

    # --- the loop --------------------------------------------------------------------------------------------------

    def turn(self, wait: bool = False) -> bool:
        """Carry out the commands, after waiting for one if `wait`, and take a step, on the calling thread: for whoever
        turns the loop himself instead of starting its thread. False if there is nothing more to do before a command."""
        try:
            self._carry_out_commands(wait)
            going_on = not self._stopped and self._step()
        except Exception as error:  # noqa: BLE001 - whatever is wrong in here, every request gets its end
            self._tell(Report(updates=self._fail(error)))
            going_on = False
        if not self._flying:
            self._busy_since = None
        return going_on

    def _run(self) -> None:
        _name_thread(THREAD_NAME)
        busy = False
        while not self._stopped:
            busy = self.turn(wait=not busy)
        while self._flying:
            self._tell(self._take_in_oldest())

    def _step(self) -> bool:
        """Submit the next step, if there is one, and take in the oldest, once it is done or no other may be submitted
        before. False if there was nothing to do: only a command can change that, or the end of the oldest step."""
        schedule = self._scheduler.schedule()
        if self._rejected or schedule.granted or schedule.opened:  # KV can move while the step runs
            self._tell(Report(updates=self._rejected, granted=schedule.granted, opened=schedule.opened))
            self._rejected = []
        if schedule.chunks:
            self._submit(schedule)
        takes_in = len(self._flying) == self._max_flying or bool(self._flying and self._flying[0][2].done())
        self._tell(self._take_in_oldest() if takes_in else Report())
        if takes_in or schedule.chunks or schedule.granted:
            return True
        if self._flying:
            self._flying[0][2].add_done_callback(lambda _: self._commands.put(_look_again))
        return False

    def _tell(self, report: Report) -> None:
        self._counters.snapshot()
        if report.updates or report.granted or report.opened or report.computed:
            self._on_report(report)

    def _carry_out_commands(self, wait: bool) -> None:
        """Run what is queued, after waiting for a first command if `wait`, up to the one to stop."""
        try:
            command = self._commands.get(block=wait)
            if not self._flying:
                self._busy_since = time.monotonic()
            while command is not None:
                command()
                command = self._commands.get_nowait()
            self._stopped = True
        except queue.Empty:
            pass

    def _submit(self, schedule: Schedule) -> None:
        if not self._flying:
            self._busy_since = time.monotonic()
        if self._speculator is None:
            batch = build_batch(schedule)
        else:
            reader = self._speculator
            self._draft(schedule, reader)
            batch = build_batch(schedule, taps=reader.taps, return_logits=reader.reads_logits, num_top=reader.reads_top)
        self._writing = [chunk for chunk in schedule.chunks if chunk.sequence.exposed]
        self._flying.append((schedule, batch, self._runner.submit(batch)))

    def _draft(self, schedule: Schedule, speculator: Speculator) -> None:
        if speculator.rests(schedule):
            return
        if candidates := self._scheduler.draft_room(schedule):
            drafts = speculator.propose(candidates, schedule.num_tokens - len(candidates))
            if drafts is not None:
                self._scheduler.attach(schedule, drafts)

    def _take_in_oldest(self) -> Report:
        schedule, batch, future = self._flying.popleft()
        error = future.exception()  # waits
        self._busy_since = time.monotonic()
        if error is not None:
            return Report(updates=self._fail(error))
        output = future.result()
        updates = self._take_in(schedule, batch, output)
        self._counters.stepped(schedule.num_tokens, output.seconds, updates)
        for update in updates:
            if update.finish is not None:
                self._live.pop(update.sequence.request_id, None)
        return Report(updates, computed=[chunk for chunk in schedule.chunks if _opened_part(chunk)])

    def _take_in(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[SequenceUpdate]:
        speculator, scheduler = self._speculator, self._scheduler
        verdicts: list[int | Verdict] = output.token_ids.tolist()
        logprobs = output.logprobs
        if speculator is not None and any(chunk.draft is not None for chunk in schedule.chunks):
            verdicts, logprobs = speculator.judge(schedule, batch, output), of_plain_rows(schedule, logprobs)
        updates = scheduler.update(schedule, verdicts, logprobs, output.prompt_logprobs)
        if speculator is None:
            return updates
        speculator.settle(schedule, batch, output)
        for chunk in schedule.chunks:
            if chunk.sequence in self._dropped_in_flight:
                self._dropped_in_flight.remove(chunk.sequence)
                speculator.forget(chunk.sequence)
        return [self._without_drafts(update, speculator) for update in updates]

    @staticmethod
    def _without_drafts(update: SequenceUpdate, speculator: Speculator) -> SequenceUpdate:
        """Of a sequence that is not computed here any more, drafters keep nothing."""
        held = update.finish is None and update.sequence.status is Status.HELD
        if held:
            update = replace(update, draft_states=speculator.pack(update.sequence))
        if held or update.finish is not None:
            speculator.forget(update.sequence)
        return update

    def _fail(self, error: BaseException) -> list[SequenceUpdate]:
        """A step raised: device state is unknown, so nothing that lives here can go on, and later steps in flight are
        of no use. Blocks of a hand-off stay its own."""
        logger.error("engine step failed; the worker will be replaced", exc_info=error)
        self._flying.clear()
        self._busy_since = None
        self.failure = InternalError(f"engine step failed: {error}")
        victims = [*self._live.values(), *self._compiling.values()]
        for sequence in victims:
            self._drop(sequence.request_id)
        return [self._failed(sequence, self.failure) for sequence in victims]

    # --- command bodies, on the loop's thread ------------------------------------------------------------------------

    def _take(self, sequence: Sequence, num_tokens: int, accept: Callable[[Sequence], None]) -> None:
        self._counters.taken(num_tokens)
        self._admit(sequence, accept)

    def _admit(self, sequence: Sequence, accept: Callable[[Sequence], None]) -> None:
        if self.failure is not None:
            self._rejected.append(self._failed(sequence, self.failure))
            return
        try:
            if sequence.request.sampling.grammar is not None and sequence.constraint is None:
                self._compile(sequence, accept)
                return
            accept(sequence)
        except InvalidRequest as error:
            self._rejected.append(self._failed(sequence, error))
        else:
            self._live[sequence.request_id] = sequence

    def _compile(self, sequence: Sequence, accept: Callable[[Sequence], None]) -> None:
        """Have the grammar compiled beside the loop; the sequence is admitted with its constraint."""
        if self._grammars is None:
            raise InvalidRequest("this worker was started without a tokenizer to follow grammars in; ask without one")
        if sequence.request_id in self._compiling:
            raise InvalidRequest(f"request_id {sequence.request_id} is already being served", param="request_id")
        self._compiling[sequence.request_id] = sequence
        future = self._grammars.constrain(sequence)
        future.add_done_callback(lambda done: self._commands.put(lambda: self._compiled(sequence, accept, done)))

    def _compiled(self, sequence: Sequence, accept: Callable[[Sequence], None], done: Future[Constraint]) -> None:
        if self._compiling.get(sequence.request_id) is not sequence:
            return  # aborted in the meantime
        del self._compiling[sequence.request_id]
        error = done.exception()
        if error is None:
            sequence.constraint = done.result()
            if not self._end_with_constraint(sequence):
                self._admit(sequence, accept)
        elif isinstance(error, InvalidRequest):
            self._rejected.append(self._failed(sequence, error))
        else:
            logger.error("compiling the grammar of %s failed", sequence.request_id, exc_info=error)
            self._rejected.append(self._failed(sequence, InternalError(f"compiling the grammar failed: {error}")))

    def _end_with_constraint(self, sequence: Sequence) -> bool:
        """Whether the tokens that a sequence came with leave nothing to draw."""
        end = sequence.constraint.end if sequence.constraint is not None else None
        if end is not None:
            self._rejected.append(SequenceUpdate(sequence, [], sequence.num_output_tokens, finish=end))
        return end is not None

    def _join(self, request_id: str, token_ids: list[int], exact: bool, draft_states: DraftStates) -> None:
        sequence = self._live.get(request_id)  # it may have been aborted while its KV was on the way
        if sequence is None:
            return
        self._scheduler.join(request_id, token_ids, exact=exact)
        if sequence.constraint is not None:
            sequence.constraint.advance(token_ids)
            if self._end_with_constraint(sequence):
                self._drop(request_id)
                return
        if self._speculator is not None and draft_states:
            self._speculator.unpack(sequence, draft_states)

    def _undefer(self, request_id: str) -> None:
        sequence = self._live.get(request_id) or self._compiling.get(request_id)
        if sequence is not None:
            sequence.deferred = False

    def _set_step_tokens(self, max_num_batched_tokens: int) -> None:
        self._scheduler.config = replace(self._scheduler.config, max_num_batched_tokens=max_num_batched_tokens)

    def _start_to_speculate(self, speculator: Speculator) -> None:
        while self._flying:  # it has not seen these steps being planned
            self._tell(self._take_in_oldest())
        self._speculator = speculator

    def _drop(self, request_id: str) -> None:
        self._compiling.pop(request_id, None)
        if (sequence := self._live.pop(request_id, None)) is not None:
            self._scheduler.abort(request_id)
            self._forget(sequence)

    def _release(self, request_id: str) -> None:
        sequence = self._live.pop(request_id, None)
        if sequence is not None:
            self._forget(sequence)
        self._scheduler.release(request_id)

    def _forget(self, sequence: Sequence) -> None:
        """Drafters do once they have been told of the step that it is part of."""
        if self._speculator is None:
            return
        if sequence.in_flight:
            self._dropped_in_flight.add(sequence)
        else:
            self._speculator.forget(sequence)

    @staticmethod
    def _failed(sequence: Sequence, error: InternalError | InvalidRequest) -> SequenceUpdate:
        return SequenceUpdate(
            sequence=sequence, token_ids=[], index=sequence.num_output_tokens, finish=Finish.from_error(error)
        )


def _opened_part(chunk: Chunk) -> bool:
    """A chunk of an opened sequence that brings no update."""
    return chunk.sequence.exposed and not chunk.samples


def _look_again() -> None:
    """The command that has nothing to say but that a step is done."""


def _name_thread(name: str) -> None:
    """Tell the kernel, where it wants to know; Python before 3.14 does not."""
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    if comm.exists():
        comm.write_text(name)
