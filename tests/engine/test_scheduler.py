"""The step scheduler, fed events: single sequences, who is in a step, and ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import ConfigError, InvalidRequest
from core.types import FinishReason, TokenLogprobs
from engine.block_manager import BlockManager
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence
from tests.engine.scheduling import CONFIG, STOP, make, make_scheduler, plan, run_out, step

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


def test_a_prompt_waits_for_who_computes_what_it_can_share_and_no_longer() -> None:
    scheduler = make_scheduler()
    first = make("a", 70)
    for sequence in (first, make("b", first.token_ids[:40] + [1] * 10), make("c", 10)):
        scheduler.add(sequence)
    assert [plan(step(scheduler)[0]) for _ in range(3)] == [
        [("a", 0, 32, False)],
        [("a", 32, 32, False)],  # "b" needs 8 tokens of its own block; there is no room in this step
        [("a", 64, 6, True), ("b", 32, 18, True), ("c", 0, 8, False)],
    ]


def test_nobody_waits_for_a_step_to_save_little() -> None:
    scheduler = make_scheduler()
    first = make("a", 20)
    for sequence in (first, make("b", first.token_ids[:16] + [1] * 30)):
        scheduler.add(sequence)
    assert plan(step(scheduler)[0]) == [("a", 0, 20, True), ("b", 0, 12, False)]


def test_who_shares_a_prompt_goes_on_alone_when_its_computer_is_aborted() -> None:
    scheduler = make_scheduler()
    first = make("a", 60)
    scheduler.add(first)
    scheduler.add(make("b", first.token_ids))
    step(scheduler)
    scheduler.abort("a")
    assert plan(step(scheduler)[0]) == [("b", 32, 28, True)]


def test_without_a_prefix_cache_nobody_waits_for_anybody() -> None:
    scheduler = Scheduler(CONFIG, BlockManager(64, 16, enable_prefix_caching=False))
    for name in "ab":
        scheduler.add(make(name, [5] * 16))
    assert plan(step(scheduler)[0]) == [("a", 0, 16, True), ("b", 0, 16, True)]


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


# --- ends ------------------------------------------------------------------------------------------------------------


def test_abort_frees_in_any_state_and_only_once() -> None:
    scheduler = make_scheduler()
    for name in ("waiting", "running", "held", "reserved"):
        (scheduler.reserve if name == "reserved" else scheduler.add)(make(name, hold=name == "held"))
        if name != "waiting":
            continue
        scheduler.abort("waiting")
    step(scheduler)
    for name in ("running", "reserved"):
        assert scheduler.abort(name)
        assert not scheduler.abort(name)
    assert scheduler.release("held")
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
