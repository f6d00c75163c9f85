"""Where few drafts of a drafter that may be of no use are verified, the alarm learns from others that cost no rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from core.types import Grammar, GrammarKind, SamplingParams
from engine.runner import ModelRunner
from engine.structured.grammars import Grammars
from speculation.acceptance import Acceptance
from speculation.alarm import DOUBT, Alarm, Record
from speculation.controllers.base import BaseController, Limits
from speculation.counters import DrafterCounts
from speculation.in_batch import InBatch
from speculation.laws import DraftLaw
from speculation.rounds import Budgets, DraftRequest, Load, Needs
from speculation.rules.registry import RULES
from speculation.sounding import TOKENS, Sounding
from speculation.tree import DraftBatch
from tests.engine.driver import tokens
from tests.engine.late import LateRunner, Output, engine_over
from tests.engine.test_reproducible import Job
from tests.speculation.characters import save_tokenizer
from tests.speculation.prompting import VOCAB, Prompter

REQUESTS, LENGTH = 4, 30


class Guesser(Prompter):
    """Says how the texts go on that it knows, or something else."""

    needs = Needs(thread=False)

    def __init__(self, *, right: bool, needs: Needs = Needs(thread=False)) -> None:  # noqa: B008
        super().__init__(needs)
        self.right = right
        self.asked: list[tuple[int, list[int]]] = []
        """Requests of each proposal, and their budgets."""

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        self.asked.append((len(requests), budgets.tolist()))
        texts = [self.outputs[tuple(one.token_ids[: one.num_prompt_tokens])][one.position :] for one in requests]
        chains = [text[:budget] for text, budget in zip(texts, budgets, strict=True)]
        if not self.right:
            chains = [[(token + 1) % VOCAB for token in chain] for chain in chains]
        return DraftBatch.of_chains(chains, DraftLaw.POINT_MASS, self.name)


class OneOfThem(BaseController):
    """Tries the first request that there is, in every other step."""

    def __init__(self) -> None:
        super().__init__(Limits(4, ("prompter",)))
        self._steps = 0

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        self._steps += 1
        asked = np.zeros(len(load.classes), np.int64)
        asked[0] = self._steps % 2 * min(1, load.limits[0])
        return Budgets(asked, asked, ["prompter"] * len(asked))


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> ModelRunner:
    return ModelRunner.load(make_checkpoint(), dtype="float32", device="cpu", num_blocks=96, block_size=8)


def answered(model: ModelRunner, drafter: Guesser, tokenizer: Path | None = None) -> DrafterCounts:
    """What was counted while the drafter knew, or did not, how REQUESTS texts go on; which it does not change."""
    grammar = None if tokenizer is None else Grammar(GrammarKind.REGEX, "[a-p]{1,60}")
    params = SamplingParams(max_tokens=LENGTH, min_tokens=LENGTH, temperature=0.0, grammar=grammar)
    jobs = [Job(5 + n, params) for n in range(REQUESTS)]

    def run(speculator: InBatch | None) -> list[Output]:
        grammars = None if tokenizer is None else Grammars(tokenizer, VOCAB)
        with engine_over(LateRunner(model, 1), num_blocks=96, grammars=grammars, speculator=speculator) as harness:
            return harness.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)])

    plain = run(None)
    drafter.outputs = {
        tuple(tokens(job.prompt, seed=job.prompt)): out.token_ids for job, out in zip(jobs, plain, strict=True)
    }
    rules = {"prompter": RULES["sampled"]}
    speculator = InBatch({"prompter": drafter}, rules, OneOfThem(), Acceptance(4), vocab_size=VOCAB, max_budget=4)
    assert [out.token_ids for out in run(speculator)] == [out.token_ids for out in plain]
    assert not speculator.counters.switched_off
    [counts] = speculator.counters.by_drafter.values()
    return counts


def test_the_alarm_needs_fewer_verified_drafts(model: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request counts up to a bound only, so that the texts of four are not enough by themselves."""
    monkeypatch.setattr("speculation.alarm.OF_ONE", LENGTH)
    monkeypatch.setattr("speculation.alarm.FLOOR", 0.4)  # so few drafts are enough then
    enough = Record().most_misses
    drafter = Guesser(right=False)
    counts = answered(model, drafter)
    assert counts.watch.alarm is Alarm.LOW
    assert counts.drafts < enough, "else the verified ones would have been enough"
    assert counts.drafts == counts.draft_tokens, "others are told to nobody but the alarm"
    sounded = [asked for asked in drafter.asked if asked[1][0] == TOKENS]
    assert sounded
    assert drafter.asked[:DOUBT] == [(1, [1])] * DOUBT, "before it is in doubt it is not asked for more"


def test_of_one_that_is_right_no_more_is_asked(model: ModelRunner) -> None:
    drafter = Guesser(right=True)
    assert answered(model, drafter).watch.alarm is Alarm.NONE
    assert set(map(str, drafter.asked)) == {str((1, [1]))}


def test_nor_of_one_that_computes_something(model: ModelRunner) -> None:
    drafter = Guesser(right=False, needs=Needs())
    answered(model, drafter)
    assert set(map(str, drafter.asked)) == {str((1, [1]))}


def test_nor_for_requests_whose_grammar_would_have_its_say(model: ModelRunner, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    drafter = Guesser(right=False)
    answered(model, drafter, tmp_path)
    assert max(count for count, _ in drafter.asked) == 1


def test_a_draft_is_right_if_any_first_token_is() -> None:
    drafts = DraftBatch(
        np.array([5, 6, 7, 5]), np.array([-1, -1, 0, -1]), np.array([0, 3, 3, 4]), DraftLaw.POINT_MASS, "x"
    )
    sounding = Sounding(np.arange(3), drafts)
    assert sounding.right(np.array([6, 6, 6])).tolist() == [True, False, False]
    assert sounding.right(np.array([7, 5, 5])).tolist() == [False, False, True]
