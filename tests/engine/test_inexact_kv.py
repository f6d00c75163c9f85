"""KV that a codec has changed on its way serves the sequence it was sent for, and no other."""

from __future__ import annotations

import pytest

from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status
from tests.engine.scheduling import make, make_scheduler, run_out, step

PROMPT = list(range(100, 150))


def received(scheduler: Scheduler, *, exact: bool, max_tokens: int = 40) -> Sequence:
    """A sequence whose prompt has come from elsewhere."""
    sequence = make("received", PROMPT, max_tokens=max_tokens)
    scheduler.reserve(sequence)
    step(scheduler)
    scheduler.join("received", [7], exact=exact)
    return sequence


def cached_tokens(scheduler: Scheduler, tokens: list[int]) -> int:
    """How many of these the prefix cache has for a new sequence."""
    return len(scheduler.blocks.cached_prefix(make("new", [*tokens, 1]))) * scheduler.blocks.block_size


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize(("exact", "prompt", "whole"), [(True, 48, 80), (False, 0, 0)])
def test_neither_the_prompt_nor_what_is_computed_on_top_of_it_is_anybody_elses(
    block_size: int, exact: bool, prompt: int, whole: int
) -> None:
    scheduler = make_scheduler(block_size=block_size)
    sequence = received(scheduler, exact=exact)
    assert cached_tokens(scheduler, PROMPT) == prompt
    for _ in range(35):
        step(scheduler)
    assert len(sequence.token_ids) == 86
    assert cached_tokens(scheduler, sequence.token_ids) == whole
    tokens = list(sequence.token_ids)
    run_out(scheduler)
    assert cached_tokens(scheduler, tokens) == whole
    scheduler.blocks.check_invariants([])


def test_what_the_cache_had_before_it_keeps() -> None:
    scheduler = make_scheduler()
    scheduler.add(make("first", PROMPT[:33], max_tokens=1))
    run_out(scheduler)
    sequence = received(scheduler, exact=False)
    assert sequence.num_cached_tokens == 32
    run_out(scheduler)
    assert cached_tokens(scheduler, PROMPT) == 32
    scheduler.blocks.check_invariants([])


def test_a_sequence_that_was_preempted_is_computed_here_and_cached_again() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make("urgent", 10, max_tokens=100, priority=-1))
    step(scheduler)
    sequence = received(scheduler, exact=False, max_tokens=60)
    while sequence.status is Status.RUNNING:
        assert cached_tokens(scheduler, PROMPT) == 0
        step(scheduler)
    assert sequence.num_preemptions == 1
    run_out(scheduler)
    assert cached_tokens(scheduler, PROMPT) == 48
