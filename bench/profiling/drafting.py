"""What a drafter does for the answers of a model: what drafting takes, and how many tokens a step brings. Batches of
two sizes are answered by an engine that speculates as a worker does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.profiling.questions import QUESTIONS
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

OWN = "questions of our own"
BATCHES = (1, 4)
_ROUNDS = 3
"""Batches of each size, after one that warms up."""
_MAX_TOKENS, _LEAST_TOKENS = 128, 16
"""Of an answer, in which drafters find what to go by, and of one where there is no time for more."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Rounds with the one that warms up, and the length of their answers."""

    rounds: int = 1 + _ROUNDS
    max_tokens: int = _MAX_TOKENS

    @staticmethod
    def within(seconds: float, step_s: float) -> Effort:
        """As much as there is time for, where a step of the larger batch takes `step_s`: two rounds at the least."""
        steps = seconds / step_s / len(BATCHES)
        rounds = int(min(max(2, steps // _MAX_TOKENS), 1 + _ROUNDS))
        return Effort(rounds, int(min(max(_LEAST_TOKENS, steps // rounds), _MAX_TOKENS)))


WHOLE = Effort()


def measure_drafting(
    runner: ModelRunner | GroupRunner,
    folder: Path,
    settings: Settings,
    dataset: Path | None,
    progress: Progress,
    effort: Effort = WHOLE,
) -> Drafting:
    """With the questions of `dataset`, or those of our own. Raises ConfigError, ModelError."""
    drafter = ",".join(settings.drafters)
    progress.begin(f"measuring drafts by {drafter}", effort.rounds)
    count = sum(BATCHES) * effort.rounds
    prompts = question_ids(folder, dataset, count, effort.max_tokens)
    spent = [_Spent(runner, settings, batch, effort.max_tokens) for batch in BATCHES]
    left = iter(prompts)
    for done in range(1, 1 + effort.rounds):
        for one in spent:
            one.ask([next(left) for _ in range(one.batch)])
        progress.update(done)
    for one in spent:
        one.close()
    small, large = (one.draft_ms for one in spent)
    each = max(0.0, (large - small) / (BATCHES[1] - BATCHES[0]))
    steps, emitted, drafted = (sum(getattr(one, name) for one in spent) for name in ("steps", "emitted", "drafted"))
    return Drafting(
        drafter=drafter,
        prompts=OWN if dataset is None else dataset.name,
        budget=settings.max_budget,
        acceptance_length=max(1.0, emitted / steps),
        rows=1.0 + drafted / steps,
        draft_ms=max(0.0, small - each),
        draft_sequence_ms=each,
    )


def question_ids(folder: Path, dataset: Path | None, count: int, max_tokens: int) -> list[list[int]]:
    """So many, over and over if there are fewer, of the dataset or of our own; of the latter the end that leaves room
    for an answer. Raises ConfigError, naming the line of the dataset at fault."""
    model = ServedModel.load(folder, [""])
    if dataset is None:
        room = max(1, model.max_model_len - max_tokens)
        found = [model.question_ids(text)[-room:] for text in QUESTIONS]
    else:
        found = [one.token_ids for one in read_questions(dataset, model, count, max_tokens)]
    return [found[index % len(found)] for index in range(count)]


class _Spent:
    """An engine with batches of one size, and what its drafts took and brought after the first."""

    def __init__(self, runner: ModelRunner | GroupRunner, settings: Settings, batch: int, max_tokens: int) -> None:
        self.batch = batch
        self._sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
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
        answers: list[Answer] = self._arm.answer(prompts, [self._sampling] * len(prompts))
        if self._warm:
            self._draft_s += counters.draft_seconds + counters.verify_seconds - before
            self._engine_steps += max(answer.steps for answer in answers)
            self.steps += sum(answer.steps for answer in answers)
            self.emitted += sum(len(answer.token_ids) - 1 for answer in answers)
            self.drafted += sum(len(one.draft.token_ids) for one in self._watched.judged[judged:])
        self._warm = True
