"""In 16 bits a step of many rows rounds otherwise than one of a single row: where texts part, two tokens are as good as
equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import speculation.rules.sampled
from core.types import SamplingParams
from engine.runner import ModelRunner
from speculation.dice import KeyedDice
from speculation.rounds import Outcome, TargetRows
from speculation.tree import DraftBatch
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import tokens
from tests.engine.late import LateRunner
from tests.speculation.prompting import Prompter, in_batch, outputs

EPSILON = 2**-4
"""Between the logarithms of what the model gives both tokens."""
LENGTH = 50


def jobs(logprobs: int | None = None) -> list[reproducible.Job]:
    params = SamplingParams(max_tokens=LENGTH, min_tokens=LENGTH, temperature=0.0, logprobs=logprobs)
    return [reproducible.Job(5 + 9 * place, params) for place in range(10)]


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> ModelRunner:
    return ModelRunner.load(make_checkpoint(), dtype="bfloat16", device="cpu", num_blocks=64, block_size=8)


def margins(model: ModelRunner) -> tuple[list[float], list[float]]:
    """Between the two likeliest tokens: of all places without drafts, and of those where drafts brought another."""
    plain = outputs(LateRunner(model, 1), jobs(logprobs=2), num_blocks=64, step_tokens=64, speculator=None)
    between = [[one.top[0][1] - one.top[1][1] for one in output.logprobs] for output in plain]
    parted: list[float] = []
    for seed in range(4):
        drafter = Prompter(seed=seed)
        for job, output in zip(jobs(), plain, strict=True):
            drafter.outputs[tuple(tokens(job.prompt, seed=job.prompt))] = output.token_ids
        found = outputs(LateRunner(model, 1), jobs(), num_blocks=64, step_tokens=64, speculator=in_batch(drafter))
        assert sum(len(round_.outcome.path) for round_ in drafter.seen) > 50
        for ours, theirs, of_text in zip(found, plain, between, strict=True):
            other = np.flatnonzero(np.array(ours.token_ids) != theirs.token_ids)
            parted += [of_text[place] for place in other[:1]]
    return [margin for of_text in between for margin in of_text], parted


def test_texts_part_only_where_two_tokens_are_as_good_as_equal(model: ModelRunner) -> None:
    everywhere, parted = margins(model)
    assert max(parted, default=0.0) < EPSILON
    assert np.median(everywhere) > 4 * EPSILON


def accept_first(drafts: DraftBatch, rows: TargetRows, dice: KeyedDice) -> Outcome:
    """Whatever it is."""
    first = np.zeros(drafts.num_nodes, np.bool_)
    first[drafts.offsets[:-1]] = True
    return Outcome.of(drafts, first, rows.tokens[drafts.root_rows + 1])


def test_a_rule_that_is_wrong_is_found_so(model: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation.rules.sampled, "verify", accept_first)
    _, parted = margins(model)
    assert max(parted) > EPSILON
