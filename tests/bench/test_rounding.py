"""What of a greedy answer rounding explains is as much as it changes the model's own, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.exactness import MARGIN
from bench.speculation import rounding
from bench.speculation.arms import Answer
from bench.speculation.measure import Trial
from bench.speculation.questions import Question
from bench.speculation.rounding import MOST, STANDARD, margin_of
from core.types import SamplingParams, TokenLogprobs
from engine.runner import ModelRunner
from speculation.settings import Settings
from tests.tiny import save_tiny_llama

RANDOM = random.Random(0)
QUESTIONS = [Question(n, "qa", RANDOM.choices(range(3, 128), k=20 + n)) for n in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(params=["float32", "bfloat16"])
def runner(folder: Path, request: pytest.FixtureRequest) -> Iterator[ModelRunner]:
    threads = torch.get_num_threads()
    runner = ModelRunner.load(folder, dtype=request.param, device="cpu", threads=1, block_size=16, num_blocks=32)
    yield runner
    runner.shutdown()
    runner.pool.close()
    torch.set_num_threads(threads)


def test_it_is_what_other_rows_change_in_the_model_alone(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = runner.layout.dtype
    assert MARGIN <= margin_of(runner, QUESTIONS) < MOST["bfloat16"]
    monkeypatch.setattr(rounding, "MARGIN", 0.0)
    least, most = {"float32": (0.0, 1e-5), "bfloat16": (1e-4, 1e-1)}[dtype]
    assert least < margin_of(runner, QUESTIONS) < most


def test_a_model_that_computes_something_else_in_other_rows_excuses_no_more_for_it(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = torch.Tensor.log_softmax
    monkeypatch.setattr("engine.scoring.torch.Tensor.log_softmax", lambda x, dim: score(x * 4000, dim))
    assert margin_of(runner, QUESTIONS) == MOST[runner.layout.dtype]


def test_the_gap_between_the_same_two_tokens_is_compared() -> None:
    said = [TokenLogprobs(-0.1, [(5, -0.1), (7, -0.4)]) for _ in range(4)]
    shown = [{5: -9.0, 7: -1.0}, {5: -0.2, 7: -0.3, 9: -3.0}, {7: -0.1, 5: -0.3}, {5: -0.1, 9: -0.2}]
    found = rounding._differences(Answer(logprobs=said), shown)
    assert found.tolist() == pytest.approx([0.2, 0.5])  # not of the first token, nor where one of the two is not shown
    assert STANDARD * np.sqrt(np.mean(found**2)) > found.max()


def test_answers_that_part_have_both_to_say_what_is_as_good_as_the_best(runner: ModelRunner) -> None:
    """However wide the margin is."""
    settings = Settings(drafters=("prompt_lookup",), max_budget=4, max_memory_bytes=1 << 20)
    with closing(Trial(runner, settings, 1, margin=100.0)) as trial:
        plain = Answer(token_ids=[*range(20, 30)])

        def excused(*token_ids: int) -> bool:
            found = trial._divergence(QUESTIONS[0], plain, Answer(token_ids=list(token_ids)))
            assert found["position"] == len(token_ids[:4])
            return bool(found["excused"])

        likely = _ranked(trial, [*QUESTIONS[0].token_ids, 20, 21, 22, 23])
        plain.token_ids[4] = likely[0]
        assert excused(20, 21, 22, 23, likely[1])
        assert not excused(20, 21, 22, 23, likely[-1])
        assert not excused(20, 21, 22, 23)


def _ranked(trial: Trial, text: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=128)
    (answer,) = trial._plain.answer([text], [params])
    return [token for token, _ in answer.logprobs[0].top]
