"""How far apart two tokens may be for the model if rounding is to have decided between them.

The sums of a step are made in another order, and rounded elsewhere, if it has other rows. What that changes depends on
the model, so it is measured on the model alone: it answers a few questions, a row a step, and is then shown question
and answer as one chunk. At each token the logits of the two that were likeliest lie so far apart in the one way, and so
far in the other; STANDARD times the root mean square of the difference is what is excused. A draft that is wrong says
tokens that lie further from the best: as far as any two tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.exactness import MARGIN
from bench.speculation.arms import Answer, Arm, blocks_of
from bench.speculation.questions import Question
from core.types import PromptLogprobs, SamplingParams
from engine.runner import ModelRunner

QUESTIONS, TOKENS = 4, 64
"""That are answered, and of each at most."""
STANDARD = 6.0
"""Deviations: of the two tokens of a place, which chance brings to one in a billion if it is normal."""
MOST = {"float32": MARGIN, "bfloat16": 2**-1, "float16": 2**-4}
"""That is ever excused: a model whose steps differ by more has something wrong with it. Of the short types four steps
between the numbers from 16 to 32, where the best logits of many models lie."""
_NUM_TOP = 8
"""Tokens among which the two likeliest are looked for again."""


def margin_of(runner: ModelRunner, questions: Sequence[Question]) -> float:
    """Nats, from MARGIN to MOST."""
    arm = Arm(runner, 1, None, blocks_of(runner))
    try:
        changes = np.concatenate([_changes(arm, question.token_ids) for question in questions[:QUESTIONS]])
    finally:
        arm.close()
    deviation = float(np.sqrt(np.mean(changes**2))) if len(changes) else 0.0
    return min(max(MARGIN, STANDARD * deviation), MOST[runner.layout.dtype])


def _changes(arm: Arm, question: list[int]) -> NDArray[np.float64]:
    """Of the gap between the two likeliest tokens, at each token of the answer that a step of one row brought."""
    (answer,) = arm.answer([question], [SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=2)])
    (scored,) = arm.answer(
        [[*question, *answer.token_ids]],
        [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=_NUM_TOP)],
    )
    assert scored.prompt_logprobs is not None
    return _differences(answer, _tops(scored.prompt_logprobs)[len(question) - 1 :])


def _differences(answer: Answer, tops: Sequence[dict[int, float]]) -> NDArray[np.float64]:
    found = []
    for said, shown in list(zip(answer.logprobs, tops, strict=True))[1:]:  # the first token came of a chunk as well
        (first, best), (second, next_best) = said.top
        if first in shown and second in shown:
            found.append((best - next_best) - (shown[first] - shown[second]))
    return np.array(found, np.float64)


def _tops(scores: PromptLogprobs) -> list[dict[int, float]]:
    """By token of the prompt after its first: the likeliest there, with their logprobs."""
    ids = np.frombuffer(scores.top_ids, "<i4").reshape(-1, scores.num_top).tolist()
    logprobs = np.frombuffer(scores.top_logprobs, "<f4").reshape(-1, scores.num_top).tolist()
    return [dict(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
