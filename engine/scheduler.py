"""What runs in the next step. A state machine: events in, schedules and updates out; no clock, no thread, no device.

A sequence waits, is admitted once blocks for all the tokens it has can be allocated, is prefilled in chunks, and
decodes. In the prefill role (`hold_after_prefill`) its blocks belong to a hand-off from admission on, until `release`,
and it is held after its first token. The decode role reserves blocks for KV that is computed elsewhere (`reserve`,
`join`). Steps are filled in the manner of Sarathi-Serve (arXiv:2403.02310): every decode first, then chunks of prefills
in what remains of the token budget, so that no prompt stalls a decode.

When blocks run out, a running sequence takes them from one that comes after it in (priority, arrival), which is
recomputed later. The first in that order can be nobody's victim, so it runs on to its end and then the next is first:
no live-lock. Blocks that another worker may be reading or writing are never taken: those of sequences exposed to a
hand-off, computed or held, and of reserved ones. An exposed sequence has all the blocks it will ever need here and so
waits for nobody's: its prompt runs to its end, and leases and deadlines end the hand-off. A sequence that finds no
victim keeps its blocks and sits the step out.

Where several steps may be in flight, each takes its share. Sequences that decode are parted evenly over as many steps
as are worth it, and wait while so many are out, so that batches which came to be uneven or too many join. Prompts are
begun in a step until it has its part of all tokens still to be computed; one that fits is not cut for the sake of
evenness, as its pieces could not overlap. Steps that all have their share leave nobody out, so that whoever is left out
of one is in the next or, with more in flight, in one of the next few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import chain, islice

from core.errors import InvalidRequest, Undrawable
from core.types import Finish, FinishReason, PromptLogprobs, TokenLogprobs
from engine.batching import slots_of
from engine.block_manager import BlockManager
from engine.drafts import Candidate, Draft, Verdict, moves_of
from engine.schedule import Chunk, Opened, Schedule, SchedulerConfig, SequenceUpdate, check_fits, finish_after
from engine.sequence import Sequence, Status
from engine.step import UNDRAWABLE
from engine.waiting import Ordered, awaits_prefix

_UNDRAWABLE = Finish.from_error(
    Undrawable("no token can be drawn: the model's scores for this request are not numbers or all forbidden")
)

__all__ = ["Chunk", "Schedule", "Scheduler", "SchedulerConfig", "SequenceUpdate"]


class Scheduler:
    """Owns the blocks of its sequences from `add` or `reserve` to finish or `abort`, or, once Schedule.opened has named
    them, to `release`.

    Several steps may be in flight; a sequence is in at most one of them.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.num_preemptions = 0
        self._live: dict[str, Sequence] = {}
        self._waiting = Ordered()
        self._running = Ordered()
        self._queued_tokens = 0  # of the waiting sequences, less those whose KV will arrive
        self._reserved: dict[str, Sequence] = {}
        self._handed_over_is_shared = True  # whether the prefix cache took the KV of the last hand-off
        self._num_arrived = 0
        self._num_decode_steps = 0  # in flight

    # --- for WorkerStatus ------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Sequences in the batch, the reserved ones that are about to join it included."""
        return len(self._running) + len(self._reserved)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens still to be prefilled here: those of waiting sequences, less any cached prefix that admission may
        find, and what is left of prompts that run in chunks."""
        return self._queued_tokens + sum(s.num_pending_tokens for s in self._running if s.num_pending_tokens > 1)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs. It may have to wait for blocks: see Schedule."""
        return bool(len(self._waiting) or len(self._running))

    # --- events ----------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Prefill a sequence, then decode or hold it. `Schedule.opened` names one with `hold_after_prefill` when it is
        admitted; `release` must follow, whatever becomes of it. Raises InvalidRequest if it can never fit."""
        check_fits(sequence, self.config, self.blocks.num_blocks * self.blocks.block_size)
        self._enqueue(sequence)

    def reserve(self, sequence: Sequence) -> None:
        """Queue for blocks for the tokens of a sequence that is prefilled elsewhere; while it is `deferred` it is
        passed over. `Schedule.granted` names it when it has them; then comes `join`, or `abort`. Raises InvalidRequest
        if it can never fit."""
        check_fits(sequence, self.config, self.blocks.num_blocks * self.blocks.block_size)
        sequence.awaits_kv = True
        self._enqueue(sequence)

    def join(self, request_id: str, first_tokens: list[int], *, exact: bool = True) -> None:
        """The KV of a reserved sequence is in its blocks. `first_tokens`, at least one, were emitted by the worker that
        computed it, which has also seen to it that they do not finish the sequence. KV that is not `exact`, and what is
        computed on top of it, stays out of the prefix cache."""
        sequence = self._live[request_id]
        assert sequence.status is Status.RESERVED, f"{request_id} is {sequence.status.name}, not reserved"
        assert first_tokens, f"{request_id} joins without the token to go on from"
        sequence.awaits_kv = False
        sequence.inexact_kv = not exact
        self._handed_over_is_shared = exact
        sequence.num_computed_tokens = len(sequence.token_ids)
        self.blocks.commit(sequence)
        sequence.token_ids.extend(first_tokens)
        del self._reserved[request_id]
        self._run(sequence)

    def release(self, request_id: str) -> bool:
        """The hand-off that a sequence was opened for has ended, and the sequence with it, in whatever state. False,
        with nothing changed, if there is no such one."""
        sequence = self._live.get(request_id)
        if sequence is None or not sequence.exposed:
            return False
        sequence.exposed = False
        self._end(sequence)
        return True

    def abort(self, request_id: str) -> bool:
        """End a sequence in any state; no update follows. False if there is none of that name.

        One that is exposed is computed no further, and keeps its blocks until `release`. Of a reserved one this frees
        blocks that another worker may be writing: the caller has made sure that it no longer does. A step in flight
        still writes to the blocks of its sequences. Later steps of the device come after it, but KV that arrives for a
        reservation does not wait for the device, so these blocks are freed when the step is updated.
        """
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    # --- steps -----------------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Choose the next step. Every schedule with chunks must come back through `update`, in their order. The caller
        asks again until there are no chunks or max_steps_in_flight steps, and then after each update."""
        schedule = Schedule(self.blocks.block_size)
        ready = self._make_room(schedule)
        decoding = [sequence for sequence in ready if sequence.num_pending_tokens == 1]
        prompts = [sequence for sequence in ready if sequence.num_pending_tokens > 1]
        chosen = decoding[: self._decode_share()]
        for sequence in chosen + prompts:
            self._schedule_chunk(schedule, sequence)
        schedule.decodes = bool(chosen)
        self._num_decode_steps += schedule.decodes
        self._admit(schedule, self._prompt_share())
        return schedule

    def draft_room(self, schedule: Schedule) -> list[Candidate]:
        """The sequences of the step that decode, and how many draft tokens each may have on top of what is scheduled:
        within its own ends, and its part of the token budget and of the blocks that no other sequence is about to
        need."""
        decoding = [chunk.sequence for chunk in schedule.chunks if chunk.decodes]
        if not decoding:
            return []
        budget = (self.config.max_num_batched_tokens - schedule.num_tokens) // len(decoding)
        blocks = max(0, self.blocks.num_free - self._headroom()) // len(decoding)
        return [Candidate(sequence, min(budget, self._draft_limit(sequence, blocks))) for sequence in decoding]

    def attach(self, schedule: Schedule, drafts: SequenceOf[Draft | None]) -> None:
        """Compute drafts too, one for each of the candidates that `draft_room` has just named, within its room."""
        left = iter(drafts)
        for place, chunk in enumerate(schedule.chunks):
            if not chunk.decodes or (draft := next(left)) is None:
                continue
            room = self.blocks.extend(chunk.sequence, chunk.start + draft.num_rows)
            assert room, f"the draft of {chunk.sequence.request_id} is longer than its room"
            schedule.chunks[place] = replace(chunk, num_tokens=draft.num_rows, draft=draft)
            schedule.num_tokens += draft.num_rows - 1

    def update(
        self,
        schedule: Schedule,
        sampled_token_ids: SequenceOf[int | Verdict],
        logprobs: SequenceOf[TokenLogprobs | None] = (),
        prompt_logprobs: SequenceOf[PromptLogprobs] = (),
    ) -> list[SequenceUpdate]:
        """Take in a finished step: one sampled token, or the verdict on its draft, and one logprobs entry unless there
        are none at all, for each chunk that samples, and the prompt logprobs of each chunk that is scored, in their
        order."""
        num_samples = sum(chunk.samples for chunk in schedule.chunks)
        assert len(sampled_token_ids) == num_samples, f"{len(sampled_token_ids)} tokens for {num_samples} samples"
        updates: list[SequenceUpdate] = []
        self._num_decode_steps -= schedule.decodes
        row, scores = 0, iter(prompt_logprobs)
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            sequence.in_flight = False
            if chunk.num_scored:
                sequence.prompt_logprobs.append(next(scores))
            if sequence.status is Status.FINISHED:  # aborted in flight
                self.blocks.free(sequence)
            elif chunk.draft is not None:
                verdict = sampled_token_ids[row]
                assert isinstance(verdict, Verdict)
                updates.append(self._take_verdict(chunk, verdict))
            else:
                sequence.num_computed_tokens += chunk.num_tokens
                self.blocks.commit(sequence)
                if sequence.status is Status.HELD:  # aborted in flight; its blocks are a hand-off's
                    pass
                elif chunk.samples:
                    token_id = sampled_token_ids[row]
                    assert isinstance(token_id, int)
                    found = logprobs[row] if logprobs else None
                    updates.append(self._append(sequence, [token_id], None if found is None else [found]))
                elif not sequence.num_pending_tokens:
                    updates.append(self._finish_without_output(sequence))
            row += chunk.samples
        return updates

    # --- choosing --------------------------------------------------------------------------------------------------

    def _make_room(self, schedule: Schedule) -> list[Sequence]:
        """The running sequences that have blocks for all their tokens, or can get them, in order."""
        return [
            sequence
            for sequence in list(self._running)  # extending one may preempt others that are yet to come here
            if sequence.status is Status.RUNNING and not sequence.in_flight and self._extend(schedule, sequence)
        ]

    def _extend(self, schedule: Schedule, sequence: Sequence) -> bool:
        while not self.blocks.extend(sequence, len(sequence.token_ids)):
            victim = self._victim_for(sequence)
            if victim is None:
                return False
            self._preempt(victim)
            schedule.preempted.append(victim)
        return True

    def _victim_for(self, sequence: Sequence) -> Sequence | None:
        """The last running sequence after this one that is not exposed. One in flight is left to finish its step.
        Freeing it helps: its last block is its own, because others share a block only once it is full, and a sequence
        whose last block is full gets its next one before anything is admitted that could share it."""
        for victim in reversed(self._running):
            if victim is sequence:
                break
            if not victim.in_flight and not victim.exposed:
                return victim
        return None

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self.blocks.free(victim)
        victim.prompt_logprobs.clear()  # its prompt is computed again, and scored again
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(victim)

    def _schedule_chunk(self, schedule: Schedule, sequence: Sequence) -> None:
        """Schedule as many of the sequence's pending tokens as the budget leaves room for."""
        pending = sequence.num_pending_tokens
        num_tokens = min(pending, self.config.max_num_batched_tokens - schedule.num_tokens)
        if num_tokens:
            start = sequence.num_computed_tokens
            samples = num_tokens == pending and sequence.request.sampling.max_tokens > 0
            last_scored = sequence.num_prompt_tokens - 1 if sequence.owes_prompt_logprobs else 0
            num_scored = max(0, min(start + num_tokens, last_scored) - start)
            schedule.chunks.append(Chunk(sequence, start, num_tokens, samples, num_scored))
            schedule.num_tokens += num_tokens
            sequence.in_flight = True

    def _draft_limit(self, sequence: Sequence, num_new_blocks: int) -> int:
        """Draft tokens that can matter to it, and whose KV fits with so many more blocks."""
        num_tokens = len(sequence.token_ids)
        of_output = sequence.request.sampling.max_tokens - sequence.num_output_tokens - 1
        of_context = self.config.max_model_len - num_tokens - 1
        of_kv = (len(sequence.block_table) + num_new_blocks) * self.blocks.block_size - num_tokens
        return max(0, min(of_output, of_context, of_kv))

    # --- shares of the steps in flight -----------------------------------------------------------------------------

    def _decode_share(self) -> int:
        """Sequences that the next step may decode. Those in flight are the shares of the other steps."""
        most = self.config.max_steps_in_flight
        if most == 1:
            return self.config.max_num_seqs
        decoding = sum(sequence.num_pending_tokens == 1 for sequence in self._running)
        steps = max(1, min(most, decoding // self.config.min_decodes_per_step))
        return -(-decoding // steps) if self._num_decode_steps < steps else 0

    def _prompt_share(self) -> int:
        """Tokens of the next step from which on no further prompt is begun in it."""
        budget, most = self.config.max_num_batched_tokens, self.config.max_steps_in_flight
        if most == 1:
            return budget
        outstanding = self._queued_tokens + sum(sequence.num_pending_tokens for sequence in self._running)
        return min(budget, -(-outstanding // most))

    # --- admission -------------------------------------------------------------------------------------------------

    def _admit(self, schedule: Schedule, max_tokens: int) -> None:
        """Admit from the front of the queue, in order, those that are not deferred. A prompt that lacks nothing but
        token budget lets reservations pass, which need none, as long as they leave its seat and its blocks alone; so
        does a sequence that would compute, or have handed over, what is about to be in the prefix cache."""
        seats = self.config.max_num_seqs - self.num_running
        owed = 0
        for sequence in list(islice((s for s in self._waiting if not s.deferred), seats)):
            lacks_tokens = not sequence.awaits_kv and schedule.num_tokens >= max_tokens
            if lacks_tokens or self._awaits_prefix(sequence, self._filling()):
                owed += self.blocks.blocks_for(len(sequence.token_ids))
            elif not sequence.awaits_kv and self._awaits_prefix(sequence, (s for s in self._waiting if s.deferred)):
                continue  # it owes nothing: who is awaited needs blocks first
            elif not self.blocks.allocate(sequence, spare=owed + self._headroom()):
                break
            elif sequence.awaits_kv:
                self._grant(schedule, sequence)
            else:
                self._start(schedule, sequence)

    def _filling(self) -> Iterator[Sequence]:
        """Those that have blocks, and whose prompt's KV is being computed or handed over."""
        return chain((s for s in self._running if s.num_pending_tokens > 1), self._reserved.values())

    def _awaits_prefix(self, sequence: Sequence, others: Iterable[Sequence]) -> bool:
        shared = [other for other in others if self._handed_over_is_shared or not other.awaits_kv]
        return awaits_prefix(sequence, shared, self.blocks)

    def _headroom(self) -> int:
        """Blocks to leave free: one for each running sequence that will decode, so that what is admitted is not
        preempted at once. None if nothing runs, since then nothing would ever be admitted into a small pool."""
        return sum(not sequence.hold_after_prefill for sequence in self._running)

    def _start(self, schedule: Schedule, sequence: Sequence) -> None:
        self._leave_queue(sequence)
        self._run(sequence)
        if sequence.hold_after_prefill:
            sequence.exposed = True
            blocks, num_tokens = list(sequence.block_table), len(sequence.token_ids)
            schedule.opened.append(Opened(sequence, blocks, num_tokens, sequence.num_computed_tokens))
        self._schedule_chunk(schedule, sequence)

    def _grant(self, schedule: Schedule, sequence: Sequence) -> None:
        self._leave_queue(sequence)
        sequence.status = Status.RESERVED
        self._reserved[sequence.request_id] = sequence
        schedule.granted.append(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        self._unwait(sequence)
        sequence.awaited_block = None, 0
        if sequence.num_preemptions == 0:
            self.blocks.count_query(sequence)
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)

    # --- beginnings and ends ---------------------------------------------------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        if sequence.request_id in self._live:
            raise InvalidRequest(f"request_id {sequence.request_id} is already being served", param="request_id")
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._live[sequence.request_id] = sequence
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._waiting.add(sequence)
        self._queued_tokens += 0 if sequence.awaits_kv else len(sequence.token_ids)

    def _unwait(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._queued_tokens -= 0 if sequence.awaits_kv else len(sequence.token_ids)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        self._running.add(sequence)

    def _take_verdict(self, chunk: Chunk, verdict: Verdict) -> SequenceUpdate:
        """The KV of the path is moved to its place when the sequence is computed next; the prefix cache, which others
        share, hears of it after that."""
        sequence = chunk.sequence
        assert chunk.draft is not None
        sequence.num_computed_tokens += 1
        self.blocks.commit(sequence)
        update = self._append(sequence, verdict.token_ids, verdict.logprobs)
        if sequence.status is Status.RUNNING:
            sequence.num_computed_tokens += len(verdict.path)
            sequence.kv_moves = moves_of(slots_of(chunk, self.blocks.block_size), verdict.path)
            if sequence.kv_moves is None:
                self.blocks.commit(sequence)
        accepted = min(len(verdict.path), len(update.token_ids))  # what ends the sequence may be one of the path
        return replace(update, num_drafted_tokens=len(chunk.draft.token_ids), num_accepted_tokens=accepted)

    def _append(
        self, sequence: Sequence, token_ids: SequenceOf[int], logprobs: SequenceOf[TokenLogprobs] | None
    ) -> SequenceUpdate:
        """Take the tokens up to the one that ends the sequence, if one does."""
        index, finish = sequence.num_output_tokens, None
        for token_id in token_ids:
            if token_id == UNDRAWABLE:
                finish = _UNDRAWABLE
                break
            sequence.token_ids.append(token_id)
            if sequence.constraint is not None:
                sequence.constraint.advance([token_id])
            if (finish := finish_after(sequence, self.config.max_model_len)) is not None:
                break
        if finish is not None or sequence.exposed:
            self._end(sequence)
        taken = sequence.num_output_tokens - index
        return SequenceUpdate(
            sequence,
            list(token_ids[:taken]),
            index,
            logprobs=None if logprobs is None else list(logprobs[:taken]),
            prompt_logprobs=sequence.take_prompt_logprobs(),
            finish=finish,
            num_cached_tokens=sequence.num_cached_tokens if index == 0 else 0,
        )

    def _finish_without_output(self, sequence: Sequence) -> SequenceUpdate:
        """The prompt is computed, and max_tokens is 0."""
        self._end(sequence)
        return SequenceUpdate(
            sequence,
            [],
            0,
            prompt_logprobs=sequence.take_prompt_logprobs(),
            finish=Finish(reason=FinishReason.LENGTH),
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _end(self, sequence: Sequence) -> None:
        """It is computed no further, and its blocks are free unless they are a hand-off's."""
        if sequence.status is Status.WAITING:
            self._unwait(sequence)
        elif sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is Status.RESERVED:
            del self._reserved[sequence.request_id]
        if sequence.exposed:
            sequence.status = Status.HELD
            return
        del self._live[sequence.request_id]
        sequence.status = Status.FINISHED
        if not sequence.in_flight:
            self.blocks.free(sequence)
