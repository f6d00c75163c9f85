"""Pairs the answers: each batch of questions is put to an engine that speculates and to one that doesn't, which take
their steps by turns.

A greedy answer must be the same from both. Where it is not, the tokens that the two say first must both lie within
`margin` of the model's best (rounding.py): there rounding decides, which differs with the rows of a step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.prompts import num_equal
from bench.setting import setting_of
from bench.speculation.arms import Answer, Arm, Watched, answer_by_turns, blocks_of
from bench.speculation.goals import goals
from bench.speculation.questions import Question, read_questions
from bench.speculation.report import Drafts, Pair, Seconds, by_task
from bench.speculation.rounding import margin_of
from core.errors import ConfigError
from core.types import SamplingParams
from engine.runner import ModelRunner
from engine.sampler import GREEDY_TEMPERATURE
from gateway.tokenizer import ServedModel
from speculation.make import make_speculator
from speculation.settings import Settings

COMPARED = 16
"""Tokens among which those that two answers say are looked for, where they part."""
BLOCK_SIZE = 16
_WARM_UP_TOKENS = 16
"""Of a made-up question that is asked before the others, and of its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    dataset: Path
    entries: Sequence[Settings]
    batches: tuple[int, ...]
    num_prompts: int
    max_tokens: int
    temperature: float
    ignore_eos: bool
    threads: int | None
    dtype: str
    device: str


def measure(folder: Path, options: Options, on_result: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The JSON result, but for the model's name. `on_result` is shown each of `results` as it comes. Raises
    ConfigError, ModelError."""
    model = ServedModel.load(folder, ["model"])
    questions = read_questions(options.dataset, model, options.num_prompts, options.max_tokens)
    if (most := max(options.batches)) > len(questions):
        raise ConfigError(
            f"--batch: {most} is more than the {len(questions)} questions that are asked; raise "
            "--num-prompts, or lower it"
        )
    for entry in options.entries:
        entry.check_weights(folder, options.dtype)
    runner = ModelRunner.load(
        folder,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        block_size=BLOCK_SIZE,
        num_blocks=_num_blocks(questions, options),
    )
    try:
        runner.warm_up(max(entry.max_budget for entry in options.entries))
        margin = margin_of(runner, questions)
        results = []
        for batch, entry in product(options.batches, options.entries):
            results.append(_run(runner, entry, batch, questions, _sampling(options, model), margin))
            on_result(results[-1])
        return {**setting_of(runner), **_asked(options), "margin": margin, "results": results}
    finally:
        runner.shutdown()
        runner.pool.close()


def _run(
    runner: ModelRunner,
    entry: Settings,
    batch: int,
    questions: Sequence[Question],
    sampling: SamplingParams,
    margin: float,
) -> dict[str, Any]:
    """Batches are full ones: questions that are left over are not asked."""
    with closing(Trial(runner, entry, batch, margin)) as trial:
        trial.warm_up(batch)
        for first in range(0, len(questions) - batch + 1, batch):
            trial.ask(questions[first : first + batch], [replace(sampling, seed=first + i) for i in range(batch)])
    found = by_task(trial.pairs)
    return {
        "drafters": list(entry.drafters),
        "rule": entry.rule,
        "controller": entry.controller,
        "batch": batch,
        **found,
        "goals": goals(entry.controller, found["all"]),
        "divergences": trial.divergences,
        "switched_off": trial.switched_off,
    }


def _sampling(options: Options, model: ServedModel) -> SamplingParams:
    ends = () if options.ignore_eos else model.eos_token_ids
    return SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, stop_token_ids=ends)


def _asked(options: Options) -> dict[str, Any]:
    return {
        "dataset": str(options.dataset),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "budget": options.entries[0].max_budget,
    }


def _num_blocks(questions: Sequence[Question], options: Options) -> int:
    """For the longest questions together, each with its answer, a draft, and a block to spare, in both arms."""
    batch, extra = max(options.batches), options.max_tokens + max(entry.max_budget for entry in options.entries)
    longest = sorted((len(question.token_ids) for question in questions), reverse=True)[:batch]
    return 2 * sum(-(-(length + extra) // BLOCK_SIZE) + 1 for length in longest)


# --- one way to speculate, at one batch size -----------------------------------------------------------------------


class Trial:
    """An engine that speculates, and one that doesn't."""

    def __init__(self, runner: ModelRunner, entry: Settings, batch: int, margin: float) -> None:
        """`margin`: see rounding.py."""
        self.pairs: list[Pair] = []
        self.divergences: list[dict[str, Any]] = []
        self._margin = margin
        self._vocab_size = runner.config.vocab_size
        self._num_asked = 0
        self._speculator = make_speculator(entry, runner, batch)
        self._watched = Watched(self._speculator)
        blocks = blocks_of(runner)
        self._plain, self._drafting = Arm(runner, batch, None, blocks), Arm(runner, batch, self._watched, blocks)

    def close(self) -> None:
        self._plain.close()
        self._drafting.close()

    @property
    def switched_off(self) -> dict[str, str]:
        """Drafters that failed, and why."""
        return self._speculator.counters.switched_off

    def warm_up(self, batch: int) -> None:
        """By made-up questions, so that the first one doesn't wait for threads to start."""
        made_up = random.Random(0).choices(range(self._vocab_size), k=_WARM_UP_TOKENS)
        params = SamplingParams(max_tokens=_WARM_UP_TOKENS, temperature=0.0)
        answer_by_turns([self._plain, self._drafting], [made_up] * batch, [params] * batch)

    def ask(self, questions: Sequence[Question], sampling: Sequence[SamplingParams]) -> None:
        """A batch, of both."""
        prompts = [question.token_ids for question in questions]
        before = self._seconds
        self._watched.judged.clear()
        plain_ones, drafted_ones = answer_by_turns([self._plain, self._drafting], prompts, sampling)
        seconds = self._seconds.part_since(before, len(questions))
        drafts = [Drafts() for _ in questions]
        for judged in self._watched.judged:
            drafts[judged.index].add(judged.draft, judged.path)
        for index, (question, plain, drafted) in enumerate(zip(questions, plain_ones, drafted_ones, strict=True)):
            self.pairs.append(Pair(question.task, self._num_asked, plain, drafted, drafts[index], seconds))
            if sampling[index].temperature < GREEDY_TEMPERATURE and plain.token_ids != drafted.token_ids:
                self.divergences.append(self._divergence(question, plain, drafted))
        self._num_asked += 1

    @property
    def _seconds(self) -> Seconds:
        counters = self._speculator.counters
        return Seconds(counters.step_seconds, counters.draft_seconds, counters.verify_seconds)

    def _divergence(self, question: Question, plain: Answer, drafted: Answer) -> dict[str, Any]:
        """An answer that ends where the other goes on has nothing to say there, and no rounding explains it."""
        place = num_equal(plain.token_ids, drafted.token_ids)
        common = plain.token_ids[:place]
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=min(COMPARED, self._vocab_size))
        (answer,) = self._plain.answer([[*question.token_ids, *common]], [params])
        likely = dict(answer.logprobs[0].top)
        said = [token for one in (plain, drafted) for token in one.token_ids[place : place + 1]]
        margin = max(likely.values()) - min(likely.get(token, min(likely.values())) for token in said)
        known = len(said) == 2 and likely.keys() >= set(said)
        return {
            "question_id": question.question_id,
            "position": place,
            "margin": margin,
            "excused": known and margin < self._margin,
        }
