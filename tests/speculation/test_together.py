"""Every drafter with every rule it can have, and all that a request may ask for beside: greedy texts are those without
drafts, in every layout. Requests of a run have all pairs of what can be asked for; runs have all pairs of drafter,
rule, layout, room for KV and steps in flight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from tokenizers import Tokenizer

from core.types import Grammar, GrammarKind, Request, SamplingParams
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from engine.sequence import Sequence as EngineSequence
from engine.structured.grammars import Grammars
from speculation.acceptance import Acceptance
from speculation.controllers.base import BaseController, Limits
from speculation.drafters.registry import DRAFTERS, find_drafter
from speculation.in_batch import InBatch
from speculation.make import make_speculator
from speculation.rounds import Budgets, Load
from speculation.rules.registry import RULES
from speculation.settings import Settings
from tests.engine.driver import TINY, tokens
from tests.engine.late import LateRunner, Output, check_same, engine_over
from tests.speculation.characters import save_tokenizer
from tests.speculation.heads.trained import KINDS, MEMORY

VOCAB, BUDGET, LENGTH = TINY["vocab_size"], 8, 18
NUM_BLOCKS = {"roomy": 80, "preempted": 16}
LAYOUTS: dict[str, tuple[int, int]] = {"one": (1, 1), "tensor parallel": (2, 1), "pipeline parallel": (1, 2)}

Runner = ModelRunner | GroupRunner


# --- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    drafters: tuple[str, ...]
    rule: str
    layout: str
    room: str
    depth: int

    def __str__(self) -> str:
        return "-".join(("+".join(self.drafters), self.rule, self.layout, self.room, str(self.depth)))

    @property
    def values(self) -> tuple[object, ...]:
        return (self.drafters, self.rule, self.layout, self.room, self.depth)


IN_TURN = ("hybrid", "draft_model", "eagle3", "suffix")
"""They take turns at the same requests, step by step."""


def _possible() -> Iterator[Run]:
    several = [(name,) for name in DRAFTERS] + [IN_TURN]
    for drafters, rule, layout, room, depth in product(several, RULES.values(), LAYOUTS, NUM_BLOCKS, (1, 2)):
        if rule.lossless and all(rule.laws & set(find_drafter(name).laws) for name in drafters):
            yield Run(drafters, rule.name, layout, room, depth)


def _pairs(run: Run) -> set[tuple[object, ...]]:
    return set(combinations(enumerate(run.values), 2))


def all_pairs() -> list[Run]:
    """Few runs with every pair of values that one of the possible runs has."""
    possible = list(_possible())
    missing = set[tuple[object, ...]]().union(*map(_pairs, possible))
    chosen: list[Run] = []
    while missing:
        chosen.append(max(possible, key=lambda run: len(missing & _pairs(run))))
        missing -= _pairs(chosen[-1])
    return chosen


# --- requests ------------------------------------------------------------------------------------------------------

GRAMMAR = Grammar(GrammarKind.REGEX, "([a-p]{1,3}[0-9A-P]){2,20}")
FEATURES = ("grammar", "penalties", "logprobs", "stop", "prefix", "drawn")


def sampling(features: Sequence[str], seed: int) -> SamplingParams:
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, seed=seed, stop_token_ids=(VOCAB - 1,))
    changes: dict[str, dict[str, Any]] = {
        "grammar": {"grammar": GRAMMAR},
        "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "logit_bias": {7: 2.0, 9: -100.0}},
        "logprobs": {"logprobs": 2},
        "drawn": {"temperature": 0.8, "top_k": 30, "top_p": 0.95},
    }
    for feature in features:
        params = replace(params, **changes.get(feature, {}))
    return params


def requests() -> list[tuple[tuple[str, ...], Request]]:
    """None of the features, each one, and each two of them."""
    found = []
    chosen = [some for count in range(3) for some in combinations(FEATURES, count)]
    for index, features in enumerate(chosen):
        start = tokens(24, seed=1) if "prefix" in features else []
        request = Request(
            request_id=f"r{index}",
            prompt_token_ids=start + tokens(5 + index % 7, seed=index) * 2,
            sampling=sampling(features, index),
            deadline=0.0,
        )
        found.append((features, request))
    return found


def stopping(asked: list[tuple[tuple[str, ...], Request]], plain: list[Output]) -> list[Request]:
    """Those that are to stop do so at a token from the midst of what they would say."""
    found = []
    for (features, request), output in zip(asked, plain, strict=True):
        params = request.sampling
        if "stop" in features:
            stop = output.token_ids[len(output.token_ids) * 2 // 3]
            params = replace(params, stop_token_ids=(*params.stop_token_ids, stop))
        found.append(replace(request, sampling=params))
    return found


def outputs(
    runner: Runner, asked: Sequence[Request], folder: Path, *, num_blocks: int, depth: int, speculator: InBatch | None
) -> list[Output]:
    grammars = Grammars(folder, VOCAB)
    with engine_over(
        LateRunner(runner, depth), num_blocks=num_blocks, step_tokens=96, grammars=grammars, speculator=speculator
    ) as harness:
        found = harness.outputs([EngineSequence(request) for request in asked])
        assert harness.blocks.num_free == num_blocks
    return found


# --- what they run on ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def however_busy_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drafter seems to stall."""
    monkeypatch.setattr("speculation.crew.PATIENCE_STEPS", 10_000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def runners(target: ModelRunner) -> Iterator[Callable[[str], Runner]]:
    made: dict[str, Runner] = {}

    def get(layout: str) -> Runner:
        if layout not in made:
            assert target.folder is not None
            tp_size, pp_size = LAYOUTS[layout]
            given: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_blocks": NUM_BLOCKS["roomy"]}
            given["block_size"] = 8
            made[layout] = (
                ModelRunner.load(target.folder, **given)
                if tp_size * pp_size == 1
                else GroupRunner.load(target.folder, tp_size=tp_size, pp_size=pp_size, **given)
            )
        return made[layout]

    yield get
    for runner in made.values():
        if isinstance(runner, GroupRunner):
            runner.shutdown()
            runner.pool.close()


@pytest.fixture(scope="module")
def wanted(
    runners: Callable[[str], Runner], tokenizer: Path
) -> Callable[[str], tuple[list[tuple[str, ...]], list[Request], list[Output]]]:
    """By layout: requests, and their outputs without drafts."""
    known: dict[str, tuple[list[tuple[str, ...]], list[Request], list[Output]]] = {}

    def get(layout: str) -> tuple[list[tuple[str, ...]], list[Request], list[Output]]:
        if layout not in known:
            runner, asked = runners(layout), requests()
            plain: dict[str, Any] = {"num_blocks": NUM_BLOCKS["roomy"], "depth": 1, "speculator": None}
            ended = stopping(asked, outputs(runner, [request for _, request in asked], tokenizer, **plain))
            known[layout] = [features for features, _ in asked], ended, outputs(runner, ended, tokenizer, **plain)
        return known[layout]

    return get


class InTurn(BaseController):
    """Another drafter in every step, and budgets of every size."""

    def __init__(self, drafters: tuple[str, ...]) -> None:
        super().__init__(Limits(BUDGET, drafters))
        self._steps = 0

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        self._steps += 1
        chosen = [self.limits.drafters[(self._steps + n) % len(self.limits.drafters)] for n in range(len(load.classes))]
        asked = self.room(load) * (1 + np.arange(len(chosen)) % 3) // 3
        return Budgets(asked, asked, chosen)


@pytest.mark.parametrize("run", all_pairs(), ids=str)
def test_greedy_texts_are_those_without_drafts(
    run: Run,
    runners: Callable[[str], Runner],
    wanted: Callable[[str], tuple[list[tuple[str, ...]], list[Request], list[Output]]],
    folders: dict[str, Path],
    target: ModelRunner,
    tokenizer: Path,
) -> None:
    assert target.folder is not None
    runner = runners(run.layout)
    known = {kind: folders[kind] for kind in KINDS} | {"draft_model": target.folder}
    chosen = Settings(
        drafters=run.drafters,
        rule=run.rule,
        max_budget=BUDGET,
        max_memory_bytes=MEMORY * len(run.drafters),
        controller="fixed",
        weights={name: folder for name, folder in known.items() if name in run.drafters},
    )
    speculator = make_speculator(chosen, runner, 8)
    speculator._controller = InTurn(run.drafters)
    all_features, asked, plain = wanted(run.layout)
    found = outputs(runner, asked, tokenizer, num_blocks=NUM_BLOCKS[run.room], depth=run.depth, speculator=speculator)
    text = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for features, ours, theirs in zip(all_features, found, plain, strict=True):
        if "drawn" not in features or run.rule == "sampled" or "logprobs" in features:
            check_same(ours, theirs)
        if "grammar" in features and ours.finish is not None and ours.finish.stop_token_id is None:
            assert re.match("([a-p]{1,3}[0-9A-P])*[a-p]{0,3}$", text.decode(ours.token_ids))
    assert not speculator.counters.switched_off
    drafted = {name for name, _ in speculator.counters.by_drafter}
    assert drafted == set(run.drafters)
    assert sum(counts.accepted_tokens for counts in speculator.counters.by_drafter.values()) > 0
