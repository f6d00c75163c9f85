from __future__ import annotations

import pytest

from cluster.break_even import BreakEven
from cluster.router import Candidate, Prompt, choose
from core.errors import Overloaded, Unavailable
from core.types import Role
from core.wire import WorkerCounters, WorkerStatus


def worker(name: str, role: Role, *, running: int = 0, waiting: int = 0, tokens: int = 0, free: int = 100) -> Candidate:
    status = WorkerStatus(
        worker_id=name,
        role=role,
        num_running=running,
        num_waiting=waiting,
        num_waiting_tokens=tokens,
        num_free_blocks=free,
        num_blocks=100,
        block_size=16,
        max_num_seqs=8,
        counters=WorkerCounters(),
    )
    return Candidate(name, f"{name}:1", status)


def names(
    num_tokens: int,
    *workers: Candidate,
    max_waiting: int = 10,
    cached: dict[str, int] | None = None,
    break_even: BreakEven | None = None,
) -> tuple[str | None, str]:
    route = choose(Prompt(num_tokens, cached or {}), workers, max_waiting, break_even or BreakEven())
    return (route.prefill.worker_id if route.prefill else None, route.decode.worker_id)


def test_prefill_and_decode_are_chosen_together_by_role() -> None:
    assert names(10, worker("d", Role.DECODE), worker("p", Role.PREFILL)) == ("p", "d")


def test_the_prompt_goes_where_the_fewest_tokens_wait() -> None:
    p1, p2 = worker("p1", Role.PREFILL, tokens=500), worker("p2", Role.PREFILL, tokens=20)
    assert names(10, p1, p2, worker("d", Role.DECODE)) == ("p2", "d")


def test_decode_goes_to_the_smallest_batch_that_has_room_for_the_kv() -> None:
    d1, d2 = worker("d1", Role.DECODE, running=1, free=1), worker("d2", Role.DECODE, running=5)
    assert names(10, worker("p", Role.PREFILL), d1, d2) == ("p", "d1")
    assert names(400, worker("p", Role.PREFILL), d1, d2) == ("p", "d2")


def test_what_was_sent_since_the_last_heartbeat_counts() -> None:
    busy = Candidate("p1", "p1:1", worker("p1", Role.PREFILL).status, assigned_tokens=100, assigned_requests=1)
    assert names(10, busy, worker("p2", Role.PREFILL, tokens=50), worker("d", Role.DECODE)) == ("p2", "d")


def test_what_has_ended_since_the_last_heartbeat_does_not_count() -> None:
    said = worker("a", Role.BOTH, running=2).status
    assert names(10, Candidate("a", "a:1", said, ended_requests=2), worker("b", Role.BOTH, running=1)) == (None, "a")


def test_requests_that_a_worker_has_not_told_of_count() -> None:
    """They were on their way when it last spoke."""
    said = worker("a", Role.BOTH).status
    assert names(10, Candidate("a", "a:1", said, in_flight=2), worker("b", Role.BOTH, running=1)) == (None, "b")


def test_one_worker_for_both_needs_no_hand_off() -> None:
    assert names(10, worker("a", Role.BOTH, running=2), worker("b", Role.BOTH)) == (None, "b")


@pytest.mark.parametrize("role", list(Role))
def test_the_last_worker_alive_does_everything_whatever_its_role(role: Role) -> None:
    assert names(10, worker("w", role)) == (None, "w")


def test_a_full_cluster_refuses_at_once() -> None:
    with pytest.raises(Overloaded):
        names(10, worker("p", Role.PREFILL, waiting=3), worker("d", Role.DECODE, waiting=3), max_waiting=3)


def test_an_empty_cluster_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        choose(Prompt(10), [], 10, BreakEven())


def test_the_prefill_worker_that_has_most_of_the_prompt_is_the_next_to_be_done() -> None:
    p1, p2, d = worker("p1", Role.PREFILL, tokens=50), worker("p2", Role.PREFILL), worker("d", Role.DECODE)
    assert names(100, p1, p2, d, cached={"p1": 64}) == ("p1", "d")
    assert names(100, p1, p2, d, cached={"p1": 32}) == ("p2", "d")


def test_a_conversation_goes_on_where_it_was_unless_that_batch_is_larger() -> None:
    p, d1 = worker("p", Role.PREFILL), worker("d1", Role.DECODE, running=4)
    everything = BreakEven(min_tokens=0)
    near, far = worker("d2", Role.DECODE, running=6), worker("d2", Role.DECODE, running=7)
    assert names(100, p, d1, near, cached={"d2": 64}, break_even=everything) == ("p", "d2")
    assert names(100, p, d1, far, cached={"d2": 64}, break_even=everything) == ("p", "d1")


def test_what_is_mostly_cached_on_the_decode_worker_is_not_handed_over() -> None:
    p, d = worker("p", Role.PREFILL), worker("d", Role.DECODE)
    assert names(200, p, d, cached={"d": 112}) == (None, "d")
    assert names(200, p, d, cached={"d": 96}) == ("p", "d")
    assert names(200, p, d, cached={"d": 112, "p": 112}) == ("p", "d")


def test_others_in_the_batch_count_against_prefilling_beside_them() -> None:
    p, d = worker("p", Role.PREFILL), worker("d", Role.DECODE, running=4)
    assert names(200, p, d, cached={"d": 112}) == ("p", "d")
    assert names(200, p, d, cached={"d": 160}) == (None, "d")


def test_what_needs_no_decode_stays_on_the_prefill_worker_that_is_the_next_to_be_done() -> None:
    p1, p2, d = worker("p1", Role.PREFILL, tokens=50), worker("p2", Role.PREFILL), worker("d", Role.DECODE)
    for group, alone in [((p1, p2, d), "p2"), ((d,), "d")]:
        route = choose(Prompt(100, decodes=False), group, 10, BreakEven())
        assert (route.prefill, route.decode.worker_id) == (None, alone)


def test_cached_tokens_need_no_room() -> None:
    p, d1, d2 = worker("p", Role.PREFILL), worker("d1", Role.DECODE, free=2), worker("d2", Role.DECODE, running=1)
    assert names(96, p, d1, d2, cached={"d1": 64}, break_even=BreakEven(0)) == ("p", "d1")
