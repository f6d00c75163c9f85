"""What a drafter does for the answers of a model: what drafting takes, and how many tokens a step brings. Batches of
two sizes are answered by an engine that speculates as a worker does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from bench.speculation.arms import Answer, Arm, Watched
from bench.speculation.questions import read_questions
from core.types import SamplingParams
from engine.checkpoints import Progress
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from gateway.tokenizer import ServedModel
from placement.profile import Drafting
from speculation.make import make_speculator
from speculation.settings import Settings

_BATCHES = (1, 4)
_ROUNDS = 3
"""Batches of each size, after one that warms up."""
_MAX_TOKENS = 64
_PROMPT = 128
"""Tokens of a made-up prompt."""
_MEMORY = 2**28


def measure_drafting(
    runner: ModelRunner | GroupRunner,
    folder: Path,
    drafter: str,
    budget: int,
    dataset: Path | None,
    progress: Progress,
) -> Drafting:
    """With the questions of `dataset`, or prompts of random tokens. Raises ConfigError."""
    progress.begin(f"measuring {drafter}")
    settings = Settings(drafters=(drafter,), max_budget=budget, max_memory_bytes=_MEMORY)
    count = sum(_BATCHES) * (1 + _ROUNDS)
    prompts = _random(runner, count) if dataset is None else _questions(folder, dataset, count)
    spent = [_Spent(runner, settings, batch) for batch in _BATCHES]
    left = iter(prompts)
    for _ in range(1 + _ROUNDS):
        for one in spent:
            one.ask([next(left) for _ in range(one.batch)])
    for one in spent:
        one.close()
    small, large = (one.draft_ms for one in spent)
    each = max(0.0, (large - small) / (_BATCHES[1] - _BATCHES[0]))
    steps, emitted, drafted = (sum(getattr(one, name) for one in spent) for name in ("steps", "emitted", "drafted"))
    return Drafting(
        drafter=drafter,
        prompts="random" if dataset is None else dataset.name,
        budget=budget,
        acceptance_length=max(1.0, emitted / steps),
        rows=1.0 + drafted / steps,
        draft_ms=max(0.0, small - each),
        draft_sequence_ms=each,
    )


def _random(runner: ModelRunner | GroupRunner, count: int) -> list[list[int]]:
    chosen, room = random.Random(0), runner.config.max_position_embeddings - _MAX_TOKENS
    return [chosen.choices(range(runner.config.vocab_size), k=min(_PROMPT, room // 2)) for _ in range(count)]


def _questions(folder: Path, dataset: Path, count: int) -> list[list[int]]:
    """Over and over if there are fewer."""
    found = [one.token_ids for one in read_questions(dataset, ServedModel.load(folder, [""]), count, _MAX_TOKENS)]
    return [found[index % len(found)] for index in range(count)]


class _Spent:
    """An engine with batches of one size, and what its drafts took and brought after the first."""

    def __init__(self, runner: ModelRunner | GroupRunner, settings: Settings, batch: int) -> None:
        self.batch = batch
        self.steps = self.emitted = self.drafted = 0
        self._speculator = make_speculator(settings, runner, batch)
        self._watched = Watched(self._speculator)
        self._arm = Arm(runner, batch, self._watched)  # type: ignore[arg-type]
        self._draft_s = 0.0
        self._engine_steps = 0
        self._warm = False

    def close(self) -> None:
        self._arm.close()

    @property
    def draft_ms(self) -> float:
        """Of a step."""
        return self._draft_s / max(1, self._engine_steps) * 1e3

    def ask(self, prompts: Sequence[list[int]]) -> None:
        counters = self._speculator.counters
        before, judged = counters.draft_seconds + counters.verify_seconds, len(self._watched.judged)
        sampling = [SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0)] * len(prompts)
        answers: list[Answer] = self._arm.answer(prompts, sampling)
        if self._warm:
            self._draft_s += counters.draft_seconds + counters.verify_seconds - before
            self._engine_steps += max(answer.steps for answer in answers)
            self.steps += sum(answer.steps for answer in answers)
            self.emitted += sum(len(answer.token_ids) - 1 for answer in answers)
            self.drafted += sum(len(one.draft.token_ids) for one in self._watched.judged[judged:])
        self._warm = True
