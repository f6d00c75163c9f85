"""How drafts fare, out of what workers count since they started."""

from __future__ import annotations

from msgspec.structs import replace

from cluster.drafted import Drafts
from core.types import Role
from core.wire import DrafterCounters, SpeculationCounters, WorkerCounters, WorkerStatus
from placement.load import NOTHING, Drafted
from tests.statuses import status


def worker(name: str, generated: int, drafted: int, accepted: int, role: Role = Role.DECODE) -> WorkerStatus:
    counters = DrafterCounters(
        drafter="hybrid",
        version="",
        drafts=drafted,
        draft_tokens=drafted,
        accepted_tokens=accepted,
        alpha_sum=0.0,
        alpha_positions=0,
        drafts_per_position=[],
        accepted_per_position=[],
    )
    speculation = SpeculationCounters(drafters=[counters], switched_off=[], draft_seconds=0.0, verify_seconds=0.0)
    return status(name, role, counters=WorkerCounters(generated_tokens=generated, speculation=speculation))


def test_what_was_counted_since_the_last_time_is_told_of_all_who_decode() -> None:
    drafts = Drafts()
    assert drafts.since([worker("a", 1000, 900, 500), worker("b", 10, 5, 2)]) == NOTHING
    told = [worker("a", 1100, 980, 540), worker("b", 40, 25, 12, Role.BOTH), worker("b", 40, 25, 12, Role.BOTH)]
    assert drafts.since(told) == Drafted(steps=80, tokens=100, accepted=50)
    assert drafts.since(told) == NOTHING


def test_what_a_worker_did_before_it_was_known_or_as_another_is_left_out() -> None:
    drafts = Drafts()
    drafts.since([worker("a", 100, 50, 20)])
    assert drafts.since([worker("a", 30, 10, 5), worker("b", 100, 50, 20)]) == NOTHING
    assert drafts.since([worker("a", 40, 14, 7)]) == Drafted(steps=8, tokens=4, accepted=2)
    assert drafts.since([worker("b", 200, 60, 30)]) == NOTHING


def test_first_tokens_of_those_who_only_prefill_and_workers_without_drafts_are_no_steps() -> None:
    drafts, plain = Drafts(), replace(worker("b", 0, 0, 0), counters=WorkerCounters())
    for generated in (0, 50):
        told = [
            worker("a", generated, 0, 0, Role.PREFILL),
            replace(plain, counters=WorkerCounters(generated_tokens=generated)),
        ]
        assert drafts.since(told) == NOTHING
