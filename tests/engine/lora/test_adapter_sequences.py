"""From a request that names an adapter to a step that computes with it."""

from __future__ import annotations

import pytest

from core.errors import InvalidRequest
from core.types import Request, SamplingParams
from engine.batching import build_batch
from engine.block_manager import BlockManager, extend_unit_digests
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence


def sequence(name: str, adapter: str = "", length: int = 40, salt: str = "") -> Sequence:
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    prompt = list(range(length))
    request = Request(
        request_id=name, prompt_token_ids=prompt, sampling=sampling, deadline=0, cache_salt=salt, adapter=adapter
    )
    return Sequence(request)


@pytest.fixture
def scheduler() -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=256, max_model_len=100, adapters=frozenset({"sql", "poems"})
    )
    return Scheduler(config, BlockManager(64, 16))


def test_a_step_says_which_sequence_wants_which_adapter(scheduler):
    for name, adapter in (("a", "sql"), ("b", ""), ("c", "poems")):
        scheduler.add(sequence(name, adapter))
    assert build_batch(scheduler.schedule()).adapters == ("sql", "", "poems")


def test_a_step_of_the_base_model_alone_names_none(scheduler):
    scheduler.add(sequence("a"))
    assert build_batch(scheduler.schedule()).adapters == ()


@pytest.mark.parametrize("how", ["add", "reserve"])
def test_an_adapter_that_is_not_served_ends_its_request_only(scheduler, how):
    with pytest.raises(InvalidRequest, match="'other' is not served") as caught:
        getattr(scheduler, how)(sequence("a", "other"))
    assert caught.value.param == "model"
    scheduler.add(sequence("b", "sql"))


def test_a_prefix_computed_with_one_adapter_is_found_with_that_one_only():
    blocks = BlockManager(64, 16)
    first = sequence("a", "sql")
    assert blocks.allocate(first)
    first.num_computed_tokens = 40
    blocks.commit(first)
    blocks.free(first)
    found = {adapter: len(blocks.cached_prefix(sequence("b", adapter))) for adapter in ("sql", "poems", "")}
    assert found == {"sql": 2, "poems": 0, "": 0}
    assert not blocks.cached_prefix(sequence("c", "sql", salt="tenant"))


def test_no_salt_stands_for_an_adapter():
    digests = set()
    for salt, adapter in (("", "a"), ("a", ""), ("\u00ffa\u00ff", ""), ("b", "a"), ("", "ab"), ("", "")):
        chain: list[bytes] = []
        extend_unit_digests(chain, list(range(16)), salt, adapter)
        digests.add(chain[0])
    assert len(digests) == 6
