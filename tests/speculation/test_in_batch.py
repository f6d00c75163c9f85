"""Speculation in the batch of an engine: the output is what it would have been without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.types import SamplingParams, SpeculationWish
from engine.runner import ModelRunner
from engine.sequence import Sequence as EngineSequence
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.in_batch import InBatch
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import DraftRequest, Needs
from speculation.rules.registry import RULES
from speculation.tree import DraftBatch
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import tokens
from tests.engine.late import HandRunner, LateRunner, check_same, engine_over, sequence
from tests.speculation.prompting import BUDGET, ENGINES, VOCAB, Prompter, in_batch, outputs


# The same examples every run: at a tie of two logits within float32 rounding a nucleus may end on either side.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    jobs=st.lists(reproducible.jobs, min_size=1, max_size=8),
    **ENGINES,
)
def test_outputs_are_what_they_are_without_it(
    model: ModelRunner, jobs: list[reproducible.Job], step_tokens: int, spare: int, depth: int, seed: int
) -> None:
    """Greedy and drawn, with penalties, logprobs, stop tokens, priorities, shared prefixes and too few blocks."""
    wanted = outputs(LateRunner(model, 1), jobs, num_blocks=64, step_tokens=64, speculator=None)
    drafter = Prompter(seed=seed)
    for job, output in zip(jobs, wanted, strict=True):
        drafter.outputs[tuple(tokens(job.prompt, seed=job.prompt))] = output.token_ids
    speculator = in_batch(drafter)
    found = outputs(
        LateRunner(model, depth), jobs, num_blocks=11 + spare, step_tokens=step_tokens, speculator=speculator
    )
    for ours, theirs in zip(found, wanted, strict=True):
        check_same(ours, theirs)
    assert not drafter.alive
    assert not speculator.counters.switched_off


def test_right_drafts_save_steps_and_are_counted(model: ModelRunner) -> None:
    job = reproducible.Job(20, SamplingParams(max_tokens=40, temperature=0.0))
    (wanted,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=None)
    drafter = Prompter()
    drafter.outputs[tuple(tokens(20, seed=20))] = wanted.token_ids
    speculator = in_batch(drafter)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        (found,) = harness.outputs([job.sequence("a")])
        steps = harness.engine.stats.steps
    assert found.token_ids == wanted.token_ids
    (counts,) = speculator.counters.by_drafter.values()
    assert steps + counts.accepted_tokens == 40
    assert counts.accepted_tokens == sum(len(round_.outcome.path) for round_ in drafter.seen) > 10
    assert counts.accepted.sum() == counts.accepted_tokens
    assert counts.draft_tokens >= counts.reached.sum() > counts.accepted_tokens


def test_a_request_is_drafted_for_by_the_one_that_it_asked_for(model: ModelRunner) -> None:
    first, other = Prompter(), Prompter()
    other.name = "other"  # type: ignore[misc]
    drafters = {first.name: first, other.name: other}
    speculator = InBatch(
        drafters,
        dict.fromkeys(drafters, RULES["sampled"]),
        make_controller("fixed", Limits(BUDGET, tuple(drafters))),
        Acceptance(BUDGET),
        vocab_size=VOCAB,
        max_budget=BUDGET,
    )
    job = reproducible.Job(20, SamplingParams(max_tokens=20, temperature=0.0)).sequence("r")
    asked = msgspec.structs.replace(job.request, speculation=SpeculationWish(drafter="other"))
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        harness.outputs([EngineSequence(asked)])
    assert not first.seen
    assert other.seen
    assert {name for name, _ in speculator.counters.by_drafter} == {"other"}


class Broken(Prompter):
    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        if len(self.seen) > 3:
            raise RuntimeError("no more ideas")
        return super().propose(requests, budgets, floor)


class Lying(Prompter):
    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        return DraftBatch.of_chains([[VOCAB + 1] for _ in requests], self.law, self.name)


class Forgetful(Prompter):
    """Of whom it was asked about."""

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        return DraftBatch.of_chains([[3]] * (len(requests) + 1), self.law, self.name)


class Drawing(Prompter):
    """By a law of which its rule may know nothing."""

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        drafts = DraftBatch.of_chains([[3] for _ in requests], DraftLaw.IID, self.name)
        rows = np.arange(len(requests))
        return replace(drafts, q=QLaw(rows, torch.full((len(rows), VOCAB), 1 / VOCAB)))


class Silent(Prompter):
    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("name_again", ["b", "c"])
def test_of_a_request_that_is_dropped_while_it_is_computed_nothing_is_kept(name_again: str) -> None:
    """Of two in flight the second is dropped, and another comes, perhaps of its name; what drafters are told of the
    step that it was part of is no news of a request to keep."""
    drafter, runner = Prompter(Needs(top=3)), HandRunner()
    speculator = in_batch(drafter)
    with engine_over(runner, speculator=speculator) as harness:
        for name in ("a", "b"):
            harness.engine.add(sequence(name, max_tokens=8))
        first, second = runner.next(), runner.next()
        harness.engine.abort("b")
        harness.engine.add(sequence(name_again, max_tokens=2))
        first.end()
        third = runner.next()  # of the first request, so that the commands have been carried out
        second.end()
        third.end()
        runner.let_go()
        ended: set[str] = set()
        while ended != {"a", name_again}:
            ended |= harness.ends().keys()
    assert drafter.alive == set()
    assert speculator._wishes == {}


@pytest.mark.parametrize(
    ("drafter", "reason"),
    [
        (Broken(), "no more ideas"),
        (Lying(), "not in a vocabulary"),
        (Forgetful(), "of 2 requests, where 1 are to be drafted for"),
        (Drawing(), "law: iid, where the drafter's is point_mass"),
        (Silent(), "'NoneType' object has no attribute"),
    ],
)
def test_a_drafter_that_fails_is_switched_off_and_requests_go_on(
    model: ModelRunner, drafter: Prompter, reason: str
) -> None:
    job = reproducible.Job(20, SamplingParams(max_tokens=60, temperature=0.0))
    (wanted,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=None)
    drafter.outputs[tuple(tokens(20, seed=20))] = wanted.token_ids
    speculator = in_batch(drafter)
    (found,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=speculator)
    assert found.token_ids == wanted.token_ids
    assert reason in speculator.counters.switched_off["prompter"]
