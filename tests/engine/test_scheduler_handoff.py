"""The step scheduler on both sides of a hand-off: what is held, and what is reserved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.block_manager import BlockManager
from engine.sequence import Sequence, Status
from tests.engine.scheduling import CONFIG, make, make_scheduler, plan, run_out, step


def deferred(sequence: Sequence) -> Sequence:
    """As it is until the prefill side has blocks for it."""
    sequence.deferred = True
    return sequence


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


def test_a_hand_off_owns_the_blocks_from_admission_on() -> None:
    scheduler = make_scheduler()
    first = make("a", 33, hold=True)
    second = make("b", first.token_ids[:16] + [7] * 24, hold=True)
    for sequence, num_tokens, num_cached_tokens in [(first, 33, 0), (second, 40, 16)]:
        scheduler.add(sequence)
        (opened,) = step(scheduler)[0].opened
        assert (opened.sequence, opened.block_ids) == (sequence, sequence.block_table)
        assert (opened.num_tokens, opened.num_cached_tokens) == (num_tokens, num_cached_tokens)
        assert not step(scheduler)[0].opened


def test_a_first_token_that_ends_the_output_leaves_the_blocks_to_the_hand_off() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", hold=True, max_tokens=1))
    (update,) = step(scheduler)[1]
    assert update.finish is not None
    assert scheduler.blocks.num_free == 63
    assert scheduler.release("a")
    assert scheduler.blocks.num_free == 64


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_abort_of_an_exposed_sequence_stops_it_and_leaves_the_blocks_to_the_hand_off(steps: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make("a", 100, hold=True))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.abort("a")
    assert scheduler.blocks.num_free == 57
    assert not scheduler.has_work
    assert scheduler.release("a")
    assert not scheduler.abort("a")
    assert scheduler.blocks.num_free == 64


def test_blocks_of_an_exposed_sequence_that_ends_in_flight_are_freed_when_both_are_done_with_them() -> None:
    for ends in (["abort", "release"], ["release"]):
        scheduler = make_scheduler()
        scheduler.add(make("a", hold=True))
        schedule = scheduler.schedule()
        for end in ends:
            assert getattr(scheduler, end)("a")
        assert scheduler.blocks.num_free == 63, "the step still writes to it"
        assert scheduler.update(schedule, [7]) == []
        assert scheduler.blocks.num_free == 64


def test_an_abort_in_flight_that_the_hand_off_outlives_brings_no_token() -> None:
    scheduler = make_scheduler()
    sequence = make("a", 20, hold=True)
    scheduler.add(sequence)
    schedule = scheduler.schedule()
    scheduler.abort("a")
    assert scheduler.update(schedule, [7]) == []
    assert (sequence.status, sequence.num_computed_tokens, sequence.num_output_tokens) == (Status.HELD, 20, 0)
    assert scheduler.release("a")
    assert scheduler.blocks.num_free == 64


def test_an_exposed_prompt_is_nobodys_victim_and_runs_to_its_end() -> None:
    scheduler = make_scheduler(num_blocks=7, config=replace(CONFIG, max_num_batched_tokens=4))
    scheduler.add(make("old", 31, max_tokens=80))
    for _ in range(8):
        step(scheduler)
    exposed = make("exposed", 63, hold=True)
    scheduler.add(exposed)
    schedules = [step(scheduler)[0] for _ in range(21)]
    assert exposed.status is Status.HELD
    assert not any(schedule.preempted for schedule in schedules)
    assert "old" not in [name for name, *_ in plan(schedules[-1])], "it finds no block"
    assert scheduler.release("exposed")
    assert [name for name, *_ in plan(step(scheduler)[0])] == ["old"]


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


@pytest.mark.parametrize("exact", [True, False])
def test_kv_that_is_handed_over_already_is_waited_for_and_not_handed_over_twice(exact: bool) -> None:
    scheduler = make_scheduler()
    first = make("a", 150)
    second = make("b", first.token_ids)
    for sequence in (first, second):
        scheduler.reserve(sequence)
    assert step(scheduler)[0].granted == [first]
    assert not step(scheduler)[0].granted
    scheduler.join("a", [7], exact=exact)
    assert step(scheduler)[0].granted == [second]
    assert second.num_computed_tokens == (144 if exact else 0)
    assert (second.block_table[:9] == first.block_table[:9]) == exact
    for name in "ab":
        assert scheduler.abort(name)
    assert scheduler.blocks.num_free == 64


def test_who_waits_for_a_prefix_does_not_look_it_up_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler()
    first = make("a", 150)
    second = make("b", first.token_ids)
    for sequence in (first, second):
        scheduler.reserve(sequence)
    lookups: list[str] = []
    look_up = BlockManager.cached_prefix

    def counted(self: BlockManager, of: Sequence) -> list[int]:
        lookups.append(of.request_id)
        return look_up(self, of)

    monkeypatch.setattr(BlockManager, "cached_prefix", counted)
    for _ in range(5):
        scheduler.schedule()
    assert lookups.count("b") == 1
    scheduler.join("a", [7])
    assert step(scheduler)[0].granted == [second]
    assert second.num_computed_tokens == 144
    assert second.awaited_block == (None, 0)  # or one finished sequence would keep the next alive, and so on


def test_nobody_waits_for_kv_that_will_not_be_shared_either() -> None:
    """As with a codec that loses something: the choices of a request would be handed over one after the other."""
    scheduler = make_scheduler()
    first = make("a", 150)
    others = [make(name, first.token_ids) for name in "bcd"]
    for sequence in (first, *others):
        scheduler.reserve(sequence)
    assert step(scheduler)[0].granted == [first]
    scheduler.join("a", [7], exact=False)
    assert step(scheduler)[0].granted == others


def test_who_waits_for_a_hand_off_that_fails_has_one_of_its_own() -> None:
    scheduler = make_scheduler()
    first = make("a", 150)
    second = make("b", first.token_ids)
    for sequence in (first, second):
        scheduler.reserve(sequence)
    step(scheduler)
    scheduler.abort("a")
    assert step(scheduler)[0].granted == [second]
    assert second.num_computed_tokens == 0


def test_a_prompt_waits_for_kv_that_is_announced_and_holds_back_no_block_that_it_needs() -> None:
    scheduler = make_scheduler(num_blocks=12)
    announced = deferred(make("a", 150))
    scheduler.reserve(announced)
    shared = make("b", announced.token_ids)
    scheduler.add(shared)
    assert not step(scheduler)[0].chunks
    announced.deferred = False
    assert step(scheduler)[0].granted == [announced]
    scheduler.join("a", [7])
    schedule, _ = step(scheduler)
    assert ("b", 144, 6, True) in plan(schedule)


def test_a_reservation_does_not_wait_for_one_that_has_no_blocks_where_it_is_computed() -> None:
    scheduler = make_scheduler()
    announced = deferred(make("a", 150))
    second = make("b", announced.token_ids)
    for sequence in (announced, second):
        scheduler.reserve(sequence)
    assert step(scheduler)[0].granted == [second]


@pytest.mark.parametrize(("shared", "own"), [(112, 30), (128, 160)])
def test_a_hand_off_is_not_waited_for_where_it_brings_little(shared: int, own: int) -> None:
    scheduler = make_scheduler(config=replace(CONFIG, max_model_len=512))
    first = make("a", 150)
    second = make("b", first.token_ids[:shared] + [1] * own)
    for sequence in (first, second):
        scheduler.reserve(sequence)
    assert step(scheduler)[0].granted == [first, second]


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


def test_a_deferred_reservation_waits_without_standing_in_the_way_of_others() -> None:
    scheduler = make_scheduler(num_blocks=4, config=replace(CONFIG, max_num_seqs=2))
    deferred = [make(name, 50) for name in "abc"]
    for sequence in deferred:
        sequence.deferred = True
        scheduler.reserve(sequence)
    scheduler.reserve(make("d", 30))
    assert [s.request_id for s in scheduler.schedule().granted] == ["d"]
    scheduler.abort("d")
    deferred[1].deferred = False
    assert scheduler.schedule().granted == [deferred[1]]


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
