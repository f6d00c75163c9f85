"""The questions that are asked: lines of Spec-Bench's form, as token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from bench.prompts import spread
from bench.serving.datasets import read_lines
from core.errors import ConfigError
from gateway.tokenizer import ServedModel

MT_BENCH = "mt_bench"
_OF_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories that Spec-Bench counts as one task."""
_FLAG = "--dataset"


@dataclass(frozen=True, slots=True)
class Question:
    question_id: int | str | None
    """As the file has it."""
    task: str
    token_ids: list[int]


class _Row(Struct):
    turns: list[str]
    category: str = "other"
    question_id: int | str | None = None


def read_questions(path: Path, model: ServedModel, count: int, max_tokens: int) -> list[Question]:
    """`count` of those that leave room for the answer, or all if there are fewer, evenly spread over the file and then
    shuffled, so that several tasks are in a batch. First turns only. Raises ConfigError, naming the line at fault."""

    def question(row: _Row) -> Question:
        if not row.turns:
            raise ValueError("`turns` is empty")
        task = MT_BENCH if row.category in _OF_MT_BENCH else row.category
        return Question(row.question_id, task, model.question_ids(row.turns[0]))

    found = read_lines(path, _Row, question, _FLAG)
    if not found:
        raise ConfigError(f"{_FLAG}: {path} holds no question", param=_FLAG)
    fit = [one for one in found if 0 < len(one.token_ids) <= model.max_model_len - max_tokens]
    if not fit:
        raise ConfigError(
            f"--max-tokens: with {max_tokens} no question of {path} fits the model's {model.max_model_len}; lower it"
        )
    chosen = spread(fit, count)
    random.Random(0).shuffle(chosen)
    return chosen
