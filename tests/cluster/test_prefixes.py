"""What a gateway believes of its workers' caches."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.prefixes import KnownPrefixes, digests_of
from core.types import Request, SamplingParams
from engine.block_manager import BlockManager
from engine.sequence import Sequence


def request(tokens: list[int], **fields: Any) -> Request:
    fields = {"sampling": SamplingParams(max_tokens=1)} | fields
    return Request(request_id="r", prompt_token_ids=tokens, deadline=0.0, **fields)


def test_what_was_sent_is_known_as_far_as_it_agrees() -> None:
    known = KnownPrefixes()
    known.remember("w", digests_of(request(list(range(64)))), 1000)
    assert known.cached_tokens(digests_of(request(list(range(40))))) == {"w": 32}
    assert known.cached_tokens(digests_of(request([*range(16), *range(48)]))) == {"w": 16}
    assert known.cached_tokens(digests_of(request([9, *range(63)]))) == {}


@pytest.mark.parametrize("fields", [{"cache_salt": "tenant"}, {"adapter": "french"}])
def test_tenants_and_adapters_have_prefixes_of_their_own(fields: dict[str, str]) -> None:
    known = KnownPrefixes()
    known.remember("w", digests_of(request(list(range(64)))), 1000)
    assert known.cached_tokens(digests_of(request(list(range(64)), **fields))) == {}


def test_a_prompt_that_is_scored_is_found_nowhere() -> None:
    assert digests_of(request(list(range(64)), sampling=SamplingParams(max_tokens=1, prompt_logprobs=1))) == []


def test_the_output_belongs_to_the_next_prompt() -> None:
    assert digests_of(request(list(range(20))), list(range(20, 32))) == digests_of(request(list(range(32))))


def test_what_is_known_of_a_prompt_need_not_be_computed_again() -> None:
    job = request(list(range(40)))
    assert digests_of(job, [7] * 60, digests_of(job)) == digests_of(job, [7] * 60)


def test_the_names_are_those_of_the_workers() -> None:
    """The block manager's keys are made of the same digests."""
    job = request(list(range(50)))
    sequence = Sequence(job)
    BlockManager(8, 16).allocate(sequence)
    assert sequence.unit_digests == digests_of(job)


def test_no_more_is_believed_than_the_cache_holds_and_the_oldest_is_dropped_from_its_end() -> None:
    known = KnownPrefixes()
    first, second = digests_of(request(list(range(64)))), digests_of(request(list(range(100, 148))))
    known.remember("w", first, 96)
    known.remember("w", second, 96)
    assert known.cached_tokens(second) == {"w": 48}
    assert known.cached_tokens(first) == {"w": 48}


def test_a_worker_that_is_gone_has_nothing() -> None:
    known = KnownPrefixes()
    known.remember("w", digests_of(request(list(range(64)))), 1000)
    known.forget("w")
    assert known.cached_tokens(digests_of(request(list(range(64))))) == {}
