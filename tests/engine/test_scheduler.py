"""The step scheduler, fed events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import ConfigError, InvalidRequest
from core.types import FinishReason, Request, SamplingParams, TokenLogprobs
from engine.block_manager import BlockManager
from engine.scheduler import Schedule, Scheduler, SchedulerConfig, SequenceUpdate
from engine.sequence import Sequence, Status

STOP = 2
CONFIG = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256)


def make_scheduler(num_blocks: int = 64, block_size: int = 16, config: SchedulerConfig = CONFIG) -> Scheduler:
    return Scheduler(config, BlockManager(num_blocks, block_size))


def make(
    request_id: str,
    prompt: int | list[int] = 10,
    *,
    max_tokens: int = 8,
    min_tokens: int = 0,
    priority: int = 0,
    hold: bool = False,
    emitted: list[int] | None = None,
) -> Sequence:
    """A sequence with a prompt of its own of the given length, or with the given prompt."""
    own = Random(request_id)
    tokens = prompt if isinstance(prompt, list) else [own.randrange(10, 10**6) for _ in range(prompt)]
    request = Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=(STOP,)),
        deadline=0,
        priority=priority,
        emitted_token_ids=emitted or [],
    )
    return Sequence(request, hold_after_prefill=hold)


def step(scheduler: Scheduler, token: int = 7) -> tuple[Schedule, list[SequenceUpdate]]:
    schedule = scheduler.schedule()
    return schedule, scheduler.update(schedule, [token] * sum(chunk.samples for chunk in schedule.chunks))


def plan(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    return [(c.sequence.request_id, c.start, c.num_tokens, c.samples) for c in schedule.chunks]


def run_out(scheduler: Scheduler, token: int = 7) -> list[SequenceUpdate]:
    updates: list[SequenceUpdate] = []
    for _ in range(2000):
        if not scheduler.has_work:
            return updates
        updates.extend(step(scheduler, token)[1])
    raise AssertionError("the scheduler does not come to an end")


# --- one sequence ----------------------------------------------------------------------------------------------------


def test_a_sequence_is_prefilled_then_decoded_to_max_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 10, max_tokens=3))
    seen = []
    while scheduler.has_work:
        schedule, updates = step(scheduler)
        seen.append((plan(schedule), [(u.index, u.token_ids, u.finish and u.finish.reason) for u in updates]))
    assert seen == [
        ([("a", 0, 10, True)], [(0, [7], None)]),
        ([("a", 10, 1, True)], [(1, [7], None)]),
        ([("a", 11, 1, True)], [(2, [7], FinishReason.LENGTH)]),
    ]
    assert scheduler.blocks.num_free == 64


def test_a_long_prompt_is_computed_in_chunks_and_samples_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 70))
    assert [plan(step(scheduler)[0]) for _ in range(3)] == [
        [("a", 0, 32, False)],
        [("a", 32, 32, False)],
        [("a", 64, 6, True)],
    ]


def test_a_stop_token_ends_the_output_and_is_counted_in_it() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    (update,) = step(scheduler, STOP)[1]
    assert update.finish is not None
    assert (update.token_ids, update.finish.reason, update.finish.stop_token_id) == ([STOP], FinishReason.STOP, STOP)
    assert not scheduler.has_work


def test_a_stop_token_ends_nothing_below_min_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", min_tokens=2))
    finishes = [step(scheduler, STOP)[1][0].finish for _ in range(3)]
    assert [finish is not None for finish in finishes] == [False, False, True]


def test_a_full_context_ends_the_output() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 250, max_tokens=100))
    updates = run_out(scheduler)
    assert len(updates) == 6
    assert updates[-1].finish is not None
    assert updates[-1].finish.reason is FinishReason.LENGTH


def test_logprobs_travel_with_their_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    scheduler.add(make("b"))
    logprobs = TokenLogprobs(-0.5, [(7, -0.5)])
    updates = scheduler.update(scheduler.schedule(), [7, 8], [None, logprobs])
    assert [(u.token_ids, u.logprobs) for u in updates] == [([7], None), ([8], [logprobs])]


def test_cached_tokens_are_reported_on_the_first_token_only() -> None:
    scheduler = make_scheduler()
    prompt = list(range(100, 150))
    scheduler.add(make("a", prompt))
    run_out(scheduler)
    scheduler.add(make("b", prompt))
    updates = run_out(scheduler)
    assert [u.num_cached_tokens for u in updates[:3]] == [48, 0, 0]
    assert (scheduler.blocks.num_queried_tokens, scheduler.blocks.num_hit_tokens) == (100, 48)


def test_a_resumed_request_goes_on_from_what_was_emitted() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 10, max_tokens=5, emitted=[31, 32, 33]))
    schedule, (update,) = step(scheduler)
    assert plan(schedule) == [("a", 0, 13, True)]
    assert (update.index, update.finish) == (3, None)
    _, (update,) = step(scheduler)
    assert (update.index, update.finish and update.finish.reason) == (4, FinishReason.LENGTH)


# --- the batch -------------------------------------------------------------------------------------------------------


def test_decodes_go_first_and_prefills_share_what_is_left() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 10))
    step(scheduler)
    scheduler.add(make("b", 40))
    scheduler.add(make("c", 40))
    assert plan(step(scheduler)[0]) == [("a", 10, 1, True), ("b", 0, 31, False)]
    assert plan(step(scheduler)[0]) == [("a", 11, 1, True), ("b", 31, 9, True), ("c", 0, 22, False)]


def test_a_decode_goes_before_an_older_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("long", 200))
    scheduler.reserve(make("kv", 20))
    step(scheduler)
    scheduler.join("kv", [7])
    assert plan(step(scheduler)[0]) == [("kv", 20, 1, True), ("long", 32, 31, False)]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler()
    for name in "abcdef":
        scheduler.add(make(name, 1))
    assert len(step(scheduler)[0].chunks) == 4
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 2)


def test_the_queue_is_ordered_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(config=replace(CONFIG, max_num_seqs=1))
    for name, priority in [("a", 1), ("b", 0), ("c", 1), ("d", -1)]:
        scheduler.add(make(name, 5, max_tokens=1, priority=priority))
    order = [update.sequence.request_id for update in run_out(scheduler)]
    assert order == ["d", "b", "a", "c"]


def test_waiting_tokens_are_those_still_to_be_prefilled() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 100))
    scheduler.add(make("b", 20))
    scheduler.reserve(make("c", 50))
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (3, 120)
    step(scheduler)
    assert scheduler.num_waiting_tokens == 88


def test_a_sequence_in_flight_is_not_scheduled_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 5))
    first = scheduler.schedule()
    scheduler.add(make("b", 5))
    second = scheduler.schedule()
    assert (plan(first), plan(second)) == ([("a", 0, 5, True)], [("b", 0, 5, True)])
    assert not scheduler.schedule().chunks
    scheduler.update(first, [7])
    assert plan(scheduler.schedule()) == [("a", 5, 1, True)]
    scheduler.update(second, [7])
    assert plan(scheduler.schedule()) == [("b", 5, 1, True)]


# --- blocks run out --------------------------------------------------------------------------------------------------


def joined(*names: str, num_blocks: int, first_tokens: list[int]) -> Scheduler:
    """Sequences of 15 prompt tokens, one block each, that have the given first tokens."""
    scheduler = make_scheduler(num_blocks=num_blocks)
    for name in names:
        scheduler.reserve(make(name, 15, max_tokens=30))
    assert len(scheduler.schedule().granted) == len(names)
    for name in names:
        scheduler.join(name, first_tokens)
    return scheduler


@pytest.mark.parametrize("first_tokens", [[7], [7, 7]])
def test_the_latest_is_preempted_and_the_oldest_proceeds(first_tokens: list[int]) -> None:
    scheduler = joined("a", "b", "c", num_blocks=3, first_tokens=first_tokens)
    preempted: list[str] = []
    for _ in range(5):
        schedule, _ = step(scheduler)
        assert "a" in [s.request_id for s in running(schedule)]
        preempted += [s.request_id for s in schedule.preempted]
    assert preempted == ["c"]  # b keeps its block and waits


def test_a_preempted_sequence_is_recomputed_and_loses_nothing() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for name in "ab":
        scheduler.add(make(name, 15, max_tokens=33))
    outputs: dict[str, list[int]] = {"a": [], "b": []}
    count = 0
    while scheduler.has_work:
        schedule = scheduler.schedule()
        assert not any(s.request_id == "a" for s in schedule.preempted)
        tokens = [1000 + count + i for i in range(sum(c.samples for c in schedule.chunks))]
        count += len(tokens)
        for update in scheduler.update(schedule, tokens):
            assert update.index == len(outputs[update.sequence.request_id])
            outputs[update.sequence.request_id] += update.token_ids
    assert scheduler.num_preemptions > 0
    assert [len(out) for out in outputs.values()] == [33, 33]
    assert scheduler.blocks.num_free == 4


def test_a_preempted_sequence_keeps_its_place_in_the_queue() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for name in "ab":
        scheduler.add(make(name, 15, max_tokens=40))
    scheduler.add(make("c", 15, max_tokens=1))
    ends = [u.sequence.request_id for u in run_out(scheduler) if u.finish is not None]
    assert scheduler.num_preemptions > 0
    assert ends.index("a") < ends.index("b")


def test_a_less_urgent_sequence_is_preempted_before_a_later_one() -> None:
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make("low", 15, max_tokens=60, priority=1))
    step(scheduler)
    scheduler.add(make("high", 15, max_tokens=60))
    preempted = []
    while scheduler.has_work:
        preempted += [s.request_id for s in step(scheduler)[0].preempted]
    assert set(preempted) == {"low"}


def test_a_sequence_in_flight_is_no_victim() -> None:
    scheduler = make_scheduler(num_blocks=2)
    for name in "ab":
        scheduler.reserve(make(name, 15, max_tokens=10))
    scheduler.schedule()
    scheduler.join("a", [7])
    step_of_a = scheduler.schedule()
    scheduler.join("b", [7])
    step_of_b = scheduler.schedule()
    scheduler.update(step_of_a, [7])  # its block is full
    assert not scheduler.schedule().chunks
    scheduler.update(step_of_b, [7])
    schedule = scheduler.schedule()
    assert plan(schedule) == [("a", 16, 1, True)]
    assert [s.request_id for s in schedule.preempted] == ["b"]


def test_cached_tokens_are_counted_once_however_often_a_sequence_is_preempted() -> None:
    scheduler = joined("a", "b", num_blocks=4, first_tokens=[7])
    b = scheduler._live["b"]
    run_out(scheduler)
    assert b.num_preemptions > 0
    assert b.num_cached_tokens == 0
    assert (scheduler.blocks.num_queried_tokens, scheduler.blocks.num_hit_tokens) == (30, 0)


def test_blocks_of_held_sequences_are_never_taken() -> None:
    scheduler = make_scheduler(num_blocks=3)
    scheduler.add(make("held", 30, hold=True))
    step(scheduler)
    scheduler.add(make("a", 15, max_tokens=10))
    step(scheduler)
    step(scheduler)
    schedule, _ = step(scheduler)
    assert not schedule.chunks  # it keeps its block and waits
    assert (scheduler.num_running, scheduler.num_preemptions) == (1, 0)
    assert scheduler.release("held")
    assert plan(step(scheduler)[0]) == [("a", 16, 1, True)]


def test_nothing_is_admitted_into_the_room_that_running_sequences_need_next() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make("a", 15, max_tokens=30))
    step(scheduler)
    scheduler.add(make("b", 40))  # three blocks, and three are free
    assert plan(step(scheduler)[0]) == [("a", 15, 1, True)]
    assert scheduler.num_waiting == 1


def test_many_greedy_sequences_in_a_tiny_pool_all_end_and_the_oldest_always_moves() -> None:
    scheduler = make_scheduler(num_blocks=8, config=replace(CONFIG, max_num_seqs=8))
    sequences = [make(str(i), 20 + i, max_tokens=90 - i) for i in range(12)]
    for sequence in sequences:
        scheduler.add(sequence)
    finished = 0
    for _ in range(5000):
        if not scheduler.has_work:
            break
        schedule, updates = step(scheduler)
        first = min((s for s in sequences if s.status is not Status.FINISHED or s in running(schedule)), key=age)
        assert first in running(schedule)
        finished += sum(u.finish is not None for u in updates)
    assert finished == 12
    assert scheduler.num_preemptions > 0
    assert [s.num_output_tokens for s in sequences] == [90 - i for i in range(12)]


def running(schedule: Schedule) -> list[Sequence]:
    return [chunk.sequence for chunk in schedule.chunks]


def age(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


# --- hand-off --------------------------------------------------------------------------------------------------------


def test_a_held_sequence_keeps_its_blocks_until_released_and_the_cache_keeps_the_prefix() -> None:
    scheduler = make_scheduler()
    held = make("a", 33, hold=True)
    scheduler.add(held)
    step(scheduler)
    _, (update,) = step(scheduler)
    assert (held.status, update.finish, held.num_computed_tokens) == (Status.HELD, None, 33)
    assert not scheduler.has_work
    assert scheduler.blocks.num_free == 61
    assert scheduler.release("a")
    assert not scheduler.release("a")
    assert scheduler.blocks.num_free == 64
    again = make("b", held.request.prompt_token_ids)
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached_tokens == 32


def test_a_first_token_that_ends_the_output_leaves_nothing_held() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", hold=True, max_tokens=1))
    (update,) = step(scheduler)[1]
    assert update.finish is not None
    assert scheduler.blocks.num_free == 64


def test_a_running_sequence_cannot_be_released() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    step(scheduler)
    assert not scheduler.release("a")
    assert scheduler.num_running == 1


def test_a_reservation_is_granted_joined_and_decoded() -> None:
    scheduler = make_scheduler()
    sequence = make("a", 40)
    scheduler.reserve(sequence)
    schedule = scheduler.schedule()
    assert (schedule.granted, schedule.chunks) == ([sequence], [])
    assert (sequence.status, len(sequence.block_table), sequence.num_computed_tokens) == (Status.RESERVED, 3, 0)
    assert not scheduler.schedule().granted
    scheduler.join("a", [77])
    schedule, (update,) = step(scheduler)
    assert plan(schedule) == [("a", 40, 1, True)]
    assert (update.index, update.num_cached_tokens) == (1, 0)


def test_a_reservation_needs_only_what_the_prefix_cache_lacks_and_feeds_it() -> None:
    scheduler = make_scheduler()
    prompt = list(range(100, 150))
    for name, cached in [("a", 0), ("b", 48)]:
        sequence = make(name, prompt)
        scheduler.reserve(sequence)
        scheduler.schedule()
        assert sequence.num_computed_tokens == cached
        scheduler.join(name, [7])  # known from here on


def test_a_resumed_request_is_reserved_with_what_was_emitted() -> None:
    scheduler = make_scheduler()
    sequence = make("a", 15, emitted=[5, 6])
    scheduler.reserve(sequence)
    scheduler.schedule()
    assert len(sequence.block_table) == 2
    scheduler.join("a", [7])
    schedule, (update,) = step(scheduler)
    assert (plan(schedule), update.index) == ([("a", 17, 1, True)], 3)


def test_reservations_hold_a_seat() -> None:
    scheduler = make_scheduler(config=replace(CONFIG, max_num_seqs=2))
    for name in "abc":
        scheduler.reserve(make(name))
    assert [s.request_id for s in scheduler.schedule().granted] == ["a", "b"]
    assert not scheduler.schedule().granted
    scheduler.abort("a")
    assert [s.request_id for s in scheduler.schedule().granted] == ["c"]


def test_a_reservation_passes_a_prompt_that_lacks_only_token_budget() -> None:
    scheduler = make_scheduler(num_blocks=16)
    scheduler.add(make("long", 100))
    scheduler.add(make("next", 100))
    scheduler.reserve(make("kv", 16))
    scheduler.reserve(make("big", 40))
    schedule = scheduler.schedule()
    assert plan(schedule) == [("long", 0, 32, False)]
    assert [s.request_id for s in schedule.granted] == ["kv"]  # one block beside those of "next"; "big" needs three


def test_a_joined_sequence_that_is_preempted_is_recomputed_here() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make("old", 15, max_tokens=49))
    step(scheduler)
    scheduler.reserve(make("new", 15, max_tokens=30))
    assert len(step(scheduler)[0].granted) == 1
    scheduler.join("new", [7])
    updates = run_out(scheduler)
    assert scheduler.num_preemptions > 0
    assert sum(u.sequence.request_id == "new" for u in updates) == 29
    assert scheduler.blocks.num_free == 4


# --- ends ------------------------------------------------------------------------------------------------------------


def test_abort_frees_in_any_state_and_only_once() -> None:
    scheduler = make_scheduler()
    for name in ("waiting", "running", "held", "reserved"):
        (scheduler.reserve if name == "reserved" else scheduler.add)(make(name, hold=name == "held"))
        if name != "waiting":
            continue
        scheduler.abort("waiting")
    step(scheduler)
    for name in ("running", "held", "reserved"):
        assert scheduler.abort(name)
        assert not scheduler.abort(name)
    assert not scheduler.abort("never seen")
    assert scheduler.blocks.num_free == 64
    assert not scheduler.has_work


def test_blocks_of_a_sequence_aborted_in_flight_are_freed_when_the_step_is_done() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    scheduler.add(make("b"))
    schedule = scheduler.schedule()
    assert scheduler.abort("a")
    assert scheduler.blocks.num_free == 62
    updates = scheduler.update(schedule, [7, 8])
    assert [(u.sequence.request_id, u.token_ids) for u in updates] == [("b", [8])]
    assert scheduler.blocks.num_free == 63


def test_a_name_can_be_used_again_after_its_request_has_ended() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a"))
    with pytest.raises(InvalidRequest, match="already"):
        scheduler.add(make("a"))
    schedule = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add(make("a", max_tokens=2))
    assert scheduler.update(schedule, [7]) == []
    assert len(run_out(scheduler)) == 2


@pytest.mark.parametrize(
    ("sequence", "param"),
    [
        (make("a", []), "prompt"),
        (make("a", 256), "prompt"),
        (make("a", 100), "prompt"),
        (make("a", 100, hold=True), "prompt"),
        (make("a", 10, max_tokens=56), "max_tokens"),
        (make("a", 10, max_tokens=0, emitted=[4]), "max_tokens"),
        (make("a", 10, max_tokens=2, emitted=[4, 5]), "max_tokens"),
    ],
)
def test_what_can_never_fit_is_refused_by_the_name_of_its_parameter(sequence: Sequence, param: str) -> None:
    scheduler = make_scheduler(num_blocks=4)
    for accept in (scheduler.add, scheduler.reserve):
        with pytest.raises(InvalidRequest) as caught:
            accept(sequence)
        assert caught.value.param == param
    assert not scheduler.has_work


def test_what_just_fits_runs_to_its_end() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make("a", 10, max_tokens=55))
    assert len(run_out(scheduler)) == 55
    scheduler.add(make("b", 64, max_tokens=100, hold=True))  # its output is decoded elsewhere
    step(scheduler)
    assert step(scheduler)[1][0].finish is None


@pytest.mark.parametrize("field", [name for name in SchedulerConfig.__dataclass_fields__ if name != "adapters"])
def test_limits_of_nothing_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(CONFIG, **{field: 0})


def test_a_step_must_have_room_for_every_sequence() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=7, max_model_len=10)


# --- laws ------------------------------------------------------------------------------------------------------------


class World:
    """A scheduler with a device, transfers and a gateway around it. The device holds, for each slot, the tokens that
    its KV was computed of; every read is checked against what the reader needs."""

    def __init__(self, num_blocks: int, block_size: int, config: SchedulerConfig) -> None:
        self.scheduler = make_scheduler(num_blocks, block_size, config)
        self.block_size = block_size
        self.sequences: list[Sequence] = []
        self.in_flight: list[Schedule] = []
        self.device: dict[int, int] = {}  # slot -> hash of the tokens up to and with its own
        self.ended: set[Sequence] = set()

    # events

    def admit(self, sequence: Sequence, reserve: bool = False) -> None:
        if sequence.request_id in self.scheduler._live:
            return
        (self.scheduler.reserve if reserve else self.scheduler.add)(sequence)
        self.sequences.append(sequence)

    def schedule(self) -> Schedule:
        own = {s: self.num_own_blocks(s) for s in self.sequences}
        schedule = self.scheduler.schedule()
        config = self.scheduler.config
        assert schedule.num_tokens == sum(c.num_tokens for c in schedule.chunks) <= config.max_num_batched_tokens
        assert len({c.sequence for c in schedule.chunks}) == len(schedule.chunks)
        busy = {c.sequence for flying in self.in_flight for c in flying.chunks}
        assert busy.isdisjoint(c.sequence for c in schedule.chunks)
        assert busy.isdisjoint(schedule.preempted)
        assert all(c.num_tokens > 0 for c in schedule.chunks)
        assert all(own[victim] for victim in schedule.preempted)  # nobody is preempted for nothing
        if schedule.chunks:
            self.in_flight.append(schedule)
        return schedule

    def update(self, token: int) -> list[SequenceUpdate]:
        """The oldest step in flight runs, as late as it may."""
        schedule = self.in_flight.pop(0)
        for chunk in schedule.chunks:
            self.read(chunk.sequence, chunk.start)
        for chunk in schedule.chunks:
            self.write(chunk.sequence, chunk.start, chunk.start + chunk.num_tokens)
        before = {c.sequence: c.sequence.num_output_tokens for c in schedule.chunks}
        updates = self.scheduler.update(schedule, [token] * sum(c.samples for c in schedule.chunks))
        for update in updates:
            assert update.index == before[update.sequence]
            assert update.sequence not in self.ended
            if update.finish is not None:
                self.ended.add(update.sequence)
        return updates

    def join(self, sequence: Sequence) -> None:
        """A transfer writes what the cache lacked, without waiting for the device."""
        self.read(sequence, sequence.num_computed_tokens)
        self.write(sequence, sequence.num_computed_tokens, len(sequence.token_ids))
        self.scheduler.join(sequence.request_id, [3])

    def release(self, sequence: Sequence) -> None:
        self.read(sequence, sequence.num_computed_tokens)
        assert self.scheduler.release(sequence.request_id)
        self.ended.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        assert self.scheduler.abort(sequence.request_id) == (sequence not in self.ended)
        self.ended.add(sequence)

    # the device

    def slots(self, sequence: Sequence, start: int, end: int) -> Iterator[tuple[int, int]]:
        for position in range(start, end):
            block = sequence.block_table[position // self.block_size]
            yield (
                block * self.block_size + position % self.block_size,
                hash(tuple(sequence.token_ids[: position + 1])),
            )

    def read(self, sequence: Sequence, end: int) -> None:
        for slot, content in self.slots(sequence, 0, end):
            assert self.device.get(slot) == content, f"{sequence.request_id} reads KV of other tokens"

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        for slot, content in self.slots(sequence, start, end):
            self.device[slot] = content

    def num_own_blocks(self, sequence: Sequence) -> int:
        others = {block for other in self.sequences if other is not sequence for block in other.block_table}
        return len(set(sequence.block_table) - others)

    # laws

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.blocks.check_invariants([s for s in self.sequences if s.block_table])
        by_status = {status: self.having(status) for status in Status}
        assert by_status[Status.RUNNING] == sorted(scheduler._running, key=lambda s: self.sequences.index(s))
        assert set(by_status[Status.WAITING]) == set(scheduler._waiting)
        assert len(by_status[Status.RUNNING]) + len(by_status[Status.RESERVED]) == scheduler.num_running
        assert scheduler.num_running <= scheduler.config.max_num_seqs
        assert set(by_status[Status.FINISHED]) == self.ended
        assert not any(s.block_table for s in by_status[Status.WAITING])
        prefilling = [s for s in by_status[Status.RUNNING] if s.num_pending_tokens > 1]
        to_prefill = prefilling + [s for s in by_status[Status.WAITING] if not s.awaits_kv]
        assert scheduler.num_waiting_tokens == sum(s.num_pending_tokens for s in to_prefill)

    def having(self, status: Status) -> list[Sequence]:
        return [s for s in self.sequences if s.status is status]

    def drain(self) -> None:
        """Whatever has happened, everything comes to an end, the first in order moving all the time."""
        while self.in_flight:
            self.update(5)
        for sequence in self.having(Status.HELD):
            self.release(sequence)
        for _ in range(3000):
            for sequence in self.having(Status.RESERVED):
                self.join(sequence)
            if not self.scheduler.has_work:
                break
            schedule = self.schedule()
            assert schedule.chunks or schedule.granted
            oldest = min(self.having(Status.RUNNING), key=age, default=None)
            if oldest is not None and not schedule.granted:
                assert oldest in running(schedule)
            if schedule.chunks:
                self.update(5)
            for sequence in self.having(Status.HELD):
                self.release(sequence)
            self.check()
        assert self.ended == set(self.sequences)
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


EVENTS = ["add", "hold", "reserve", "schedule", "update", "join", "release", "abort first", "abort last"]


def play(world: World, event: str, number: int) -> None:
    prompt = [1] * 5 + [number % 2] * 10
    live = [s for s in world.sequences if s not in world.ended]
    if event in ("add", "hold", "reserve"):
        world.admit(make(str(number), prompt, max_tokens=4, hold=event == "hold"), reserve=event == "reserve")
    elif event == "schedule":
        world.schedule()
    elif event == "update" and world.in_flight:
        world.update(STOP if number % 3 == 0 else 5)
    elif event == "join" and (reserved := world.having(Status.RESERVED)):
        world.join(reserved[0])
    elif event == "release" and (held := world.having(Status.HELD)):
        world.release(held[0])
    elif event.startswith("abort") and live:
        world.abort(live[0] if event == "abort first" else live[-1])


@pytest.mark.parametrize("opening", EVENTS[:3])
def test_every_short_history_keeps_the_laws_and_drains(opening: str) -> None:
    """All histories of four events after a sequence has come and a step was scheduled."""
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64)
    for events in product(EVENTS, repeat=4):
        world = World(num_blocks=5, block_size=8, config=config)
        for number, event in enumerate([opening, "schedule", *events]):
            play(world, event, number)
            world.check()
        world.drain()


class Histories(RuleBasedStateMachine):
    """Long random histories in pools that are too small, several steps in flight."""

    block_size = 16
    num_blocks = 7

    def __init__(self) -> None:
        super().__init__()
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=100)
        self.world = World(self.num_blocks, self.block_size, config)
        self.count = 0

    @rule(
        head=st.lists(st.integers(0, 1), max_size=4),
        tail=st.integers(1, 17),
        max_tokens=st.integers(1, 30),
        priority=st.sampled_from([0, 0, 0, 1]),
        role=st.sampled_from(["both", "hold", "reserve"]),
        emitted=st.integers(0, 3),
    )
    def arrive(self, head: list[int], tail: int, max_tokens: int, priority: int, role: str, emitted: int) -> None:
        prompt = [kind for kind in head for _ in range(16)] + [1] * tail
        self.count += 1
        sequence = make(
            str(self.count),
            prompt,
            max_tokens=max_tokens + emitted + (role == "reserve"),  # its first token must not end it
            priority=priority,
            hold=role == "hold",
            emitted=[1] * emitted,
        )
        try:
            self.world.admit(sequence, reserve=role == "reserve")
        except InvalidRequest:
            assert len(sequence.token_ids) + max_tokens >= min(self.num_blocks * self.block_size, 99)

    @precondition(lambda self: len(self.world.in_flight) < 3)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.in_flight)
    @rule(token=st.sampled_from([0, 1, 1, STOP]))
    def update(self, token: int) -> None:
        self.world.update(token)

    @rule(token=st.sampled_from([0, 1]), steps=st.integers(1, 12))
    def run(self, token: int, steps: int) -> None:
        for _ in range(steps):
            self.world.schedule()
            if self.world.in_flight:
                self.world.update(token)

    @precondition(lambda self: self.world.having(Status.RESERVED))
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        self.world.join(data.draw(st.sampled_from(self.world.having(Status.RESERVED))))

    @precondition(lambda self: self.world.having(Status.HELD))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.world.release(data.draw(st.sampled_from(self.world.having(Status.HELD))))

    @precondition(lambda self: self.world.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(self.world.sequences)))

    @invariant()
    def laws(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.drain()


class HistoriesOfSmallBlocks(Histories):
    block_size = 8
    num_blocks = 13


class HistoriesOfLargeBlocks(Histories):
    block_size = 32
    num_blocks = 4


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
TestHistories.settings = SETTINGS
TestHistoriesOfSmallBlocks = HistoriesOfSmallBlocks.TestCase
TestHistoriesOfSmallBlocks.settings = SETTINGS
TestHistoriesOfLargeBlocks = HistoriesOfLargeBlocks.TestCase
TestHistoriesOfLargeBlocks.settings = SETTINGS
