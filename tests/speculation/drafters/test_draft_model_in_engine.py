"""A draft model in the batch of an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.types import SamplingParams
from engine.runner import ModelRunner
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.drafters.registry import find_drafter
from speculation.in_batch import InBatch
from speculation.rules.registry import find_rule
from tests.engine.late import LateRunner, Output, check_same, engine_over
from tests.engine.test_reproducible import Job
from tests.speculation.drafters.draft_models import made

NAME, BUDGET, VOCAB = "draft_model", 6, 60
"""A vocabulary of which every token can be drawn."""


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(vocab_size=VOCAB)


@pytest.fixture(scope="module")
def other(make_checkpoint: Callable[..., Path]) -> Path:
    """Another model of the same vocabulary."""
    return make_checkpoint(seed=2, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=24)


@pytest.fixture(scope="module")
def target(folder: Path) -> ModelRunner:
    return ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=64, block_size=8)


def speculator(folder: Path, rule: str, **given: int) -> InBatch:
    found = find_rule(rule)
    law = find_drafter(NAME).law_for(found)
    drafter = made(folder, vocab_size=VOCAB, law=law, branches=found.branches, **given)
    controller = make_controller("fixed", Limits(BUDGET, (NAME,)))
    return InBatch({NAME: drafter}, {NAME: found}, controller, Acceptance(BUDGET), vocab_size=VOCAB, max_budget=BUDGET)


def jobs(temperature: float, count: int = 4) -> list[Job]:
    return [Job(5 + 9 * n, SamplingParams(max_tokens=25, temperature=temperature, seed=n)) for n in range(count)]


def run(target: ModelRunner, asked: list[Job], spec: InBatch | None, num_blocks: int = 64) -> list[Output]:
    sequences = [job.sequence(str(index)) for index, job in enumerate(asked)]
    for sequence in sequences:
        sequence.token_ids[:] = [token % VOCAB for token in sequence.token_ids]
        sequence.request.prompt_token_ids[:] = sequence.token_ids
    with engine_over(LateRunner(target, 1), num_blocks=num_blocks, step_tokens=40, speculator=spec) as harness:
        return harness.outputs(sequences)


@pytest.mark.parametrize(
    ("rule", "temperature"), [("chain", 0.0), ("chain", 1.0), ("tree", 0.0), ("sampled", 0.0), ("sampled", 1.0)]
)
def test_drafts_of_the_target_itself_are_all_accepted(
    folder: Path, target: ModelRunner, rule: str, temperature: float
) -> None:
    spec = speculator(folder, rule)
    run(target, jobs(temperature), spec)
    assert not spec.counters.switched_off
    (counts,) = spec.counters.by_drafter.values()
    assert counts.drafts > 10
    assert counts.accepted[0] == counts.drafts, "the first token of each draft is the target's"
    if rule == "chain":
        assert counts.accepted_tokens == counts.draft_tokens


@pytest.mark.parametrize("rule", ["sampled", "chain", "tree", "k_seq"])
@pytest.mark.parametrize("num_blocks", [64, 14])
def test_greedy_outputs_are_what_they_are_without_it(
    other: Path, target: ModelRunner, rule: str, num_blocks: int
) -> None:
    """With room for all, and with so little that sequences are preempted."""
    spec = speculator(other, rule)
    plain, drafted = run(target, jobs(0.0), None), run(target, jobs(0.0), spec, num_blocks)
    for ours, theirs in zip(drafted, plain, strict=True):
        check_same(ours, theirs)
    assert not spec.counters.switched_off
    assert sum(counts.draft_tokens for counts in spec.counters.by_drafter.values()) > 0


def test_drawn_outputs_are_what_they_are_without_it_where_the_sampler_verifies(
    other: Path, target: ModelRunner
) -> None:
    spec = speculator(other, "sampled")
    plain, drafted = run(target, jobs(1.0), None), run(target, jobs(1.0), spec)
    for ours, theirs in zip(drafted, plain, strict=True):
        check_same(ours, theirs)
    assert not spec.counters.switched_off


def test_requests_that_find_no_room_for_their_kv_are_not_drafted_for(folder: Path, target: ModelRunner) -> None:
    """The memory of a draft model holds the texts of two."""
    spec = speculator(folder, "chain")
    drafter = spec._crew[NAME]
    drafter._cache = type(drafter._cache)(8, 16)  # type: ignore[attr-defined]
    asked = [Job(40, SamplingParams(max_tokens=20, temperature=0.0)) for _ in range(5)]
    plain, drafted = run(target, asked, None), run(target, asked, spec)
    for ours, theirs in zip(drafted, plain, strict=True):
        check_same(ours, theirs)
    assert not spec.counters.switched_off
    (counts,) = spec.counters.by_drafter.values()
    assert counts.accepted_tokens == counts.draft_tokens > 0
