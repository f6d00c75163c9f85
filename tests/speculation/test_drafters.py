"""The drafters that need no training: what they propose is a tree within its budget, and outputs stay what they are."""

from __future__ import annotations

import numpy as np
import pytest

from core.types import SamplingParams
from engine.runner import ModelRunner
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.drafters.base import Surroundings
from speculation.drafters.registry import DRAFTERS, make_drafter
from speculation.in_batch import InBatch
from speculation.laws import DraftLaw
from speculation.protocols import Drafter
from speculation.rounds import DraftRequest
from speculation.rules.registry import RULES
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import TINY
from tests.engine.late import LateRunner, check_same, engine_over

EACH = pytest.mark.parametrize("name", sorted(kind.name for kind in DRAFTERS.values() if not kind.takes_weights))
BUDGET = 12


def made(name: str, vocab_size: int = TINY["vocab_size"]) -> Drafter:
    return make_drafter(
        name,
        Surroundings(
            vocab_size=vocab_size,
            max_budget=BUDGET,
            max_requests=16,
            max_memory_bytes=64 << 20,
            law=DraftLaw.POINT_MASS,
        ),
    )


def request(key: int, token_ids: list[int], scope: str = "", *, remember: bool = True) -> DraftRequest:
    return DraftRequest(key, token_ids, max(1, len(token_ids) - 1), 0, 0.0, scope, remember)


def drafting_by(name: str) -> InBatch:
    """As much as it may in every step, verified by the sampler's tokens."""
    return InBatch(
        {name: made(name)},
        {name: RULES["sampled"]},
        make_controller("fixed", Limits(BUDGET, (name,))),
        Acceptance(BUDGET),
        vocab_size=TINY["vocab_size"],
        max_budget=BUDGET,
    )


@EACH
def test_outputs_are_what_they_are_without_it(model: ModelRunner, name: str) -> None:
    """Greedy texts of a tiny model run in circles, so there is something to be guessed; drawn ones don't."""
    jobs = [
        reproducible.Job(5 + 7 * n, SamplingParams(max_tokens=60, temperature=0.0 if n % 3 else 1.0, seed=n))
        for n in range(6)
    ]
    found = []
    speculator = drafting_by(name)
    for spec in (None, speculator):
        with engine_over(LateRunner(model, 1), speculator=spec) as harness:
            found.append(harness.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)]))
    for ours, theirs in zip(*found, strict=True):
        check_same(ours, theirs)
    assert not speculator.counters.switched_off
    assert sum(counts.accepted_tokens for counts in speculator.counters.by_drafter.values()) > 0


@EACH
def test_what_ends_a_request_may_lie_within_its_draft(model: ModelRunner, name: str) -> None:
    """The texts come again, so that they are drafted as they came, and each has to end before a token of its midst."""
    speculator = drafting_by(name)
    jobs = [reproducible.Job(9 + n, SamplingParams(max_tokens=24, temperature=0.0)) for n in range(4)]
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        whole = harness.outputs([job.sequence(f"whole {index}") for index, job in enumerate(jobs)])
        ended = []
        for turn in range(1, 8):
            stops = [output.token_ids[turn * 3] for output in whole]
            again = [
                reproducible.Job(job.prompt, SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=(stop,)))
                for job, stop in zip(jobs, stops, strict=True)
            ]
            ended.append(harness.outputs([job.sequence(f"{turn} {index}") for index, job in enumerate(again)]))
            for output, all_of_it, stop in zip(ended[-1], whole, stops, strict=True):
                assert output.token_ids == all_of_it.token_ids[: all_of_it.token_ids.index(stop) + 1]
    assert not speculator.counters.switched_off


@EACH
@pytest.mark.parametrize("text", [[3], [3, 3], [1, 2, 3, 1, 2, 3, 1, 2], list(range(40)) * 3])
def test_trees_keep_to_the_budgets_of_short_and_long_texts(name: str, text: list[int]) -> None:
    drafter = made(name)
    requests = [request(key, list(text)) for key in range(3)]
    for one in requests:
        drafter.start(one)
    for budgets in ([0, 1, BUDGET], [BUDGET, 0, 5], [0, 0, 0]):
        drafts = drafter.propose(requests, np.array(budgets, np.int64), 0.0)
        drafts.validate(TINY["vocab_size"])
        assert drafts.num_requests == 3
        assert (drafts.lengths <= budgets).all()
    for one in requests:
        drafter.finish(one.key)
    assert drafter.memory_bytes <= 64 << 20


@EACH
def test_the_same_state_proposes_the_same(name: str) -> None:
    proposals = []
    for _ in range(2):
        drafter = made(name)
        one = request(0, [1, 2, 3, 4, 1, 2, 3, 4, 1, 2])
        drafter.start(one)
        proposals.append(drafter.propose([one], np.array([BUDGET]), 0.0))
    assert proposals[0].tokens.tolist() == proposals[1].tokens.tolist()
    assert proposals[0].parents.tolist() == proposals[1].parents.tolist()


@pytest.mark.parametrize("name", ["prompt_lookup", "suffix", "hybrid"])
def test_a_text_that_repeats_is_guessed(name: str) -> None:
    drafter = made(name)
    one = request(0, [7, 8, 9, 10, 11, 12, 7, 8, 9])
    drafter.start(one)
    drafts = drafter.propose([one], np.array([4]), 0.0)
    assert drafts.tokens[0] == 10


def test_no_scope_sees_the_text_of_another() -> None:
    secret = [20, 21, 22, 23, 24, 25, 26]
    drafter = made("suffix")
    teller = request(0, [*secret, 1], "ours")
    drafter.start(teller)
    drafter.finish(0)
    for scope, knows in (("ours", True), ("theirs", False)):
        asker = request(1 if knows else 2, secret[:4], scope)
        drafter.start(asker)
        drafts = drafter.propose([asker], np.array([4]), 0.0)
        assert (24 in drafts.tokens) == knows
        drafter.finish(asker.key)


@pytest.mark.parametrize("name", ["suffix", "hybrid"])
def test_what_may_not_be_remembered_is_forgotten(name: str) -> None:
    secret = [20, 21, 22, 23, 24, 25, 26]
    drafter = made(name)
    drafter.start(request(0, [*secret, 1], remember=False))
    drafter.finish(0)
    asker = request(1, secret[:4])
    drafter.start(asker)
    assert 24 not in drafter.propose([asker], np.array([4]), 0.0).tokens
