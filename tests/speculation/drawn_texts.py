"""Short texts that an engine draws with drafts from a draft model, and the law that they are to follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.types import Request, SamplingParams
from engine.runner import ModelRunner
from engine.sampler import sampling_law
from engine.sequence import Sequence as EngineSequence
from engine.step import SamplingRow
from engine.structured.grammars import Grammars
from speculation.counters import DrafterCounts
from speculation.make import make_speculator
from speculation.settings import Settings
from tests.engine.late import LateRunner, engine_over

VOCAB = 12
BUDGET = 8
"""Enough that a tree has siblings. Requests may go on for as long, so that there is room for it."""
PROMPT = [3, 5, 7, 5]
AT_ONCE = 48
"""Requests in a step. What a text is hangs on its seed and on what is drafted for it only, so more are sooner done; but
all that begin in a step have to be drafted for in the next, so no more than the draft model catches up with then."""
NUM_BLOCKS = 4 * AT_ONCE
"""Of 8 tokens: a prompt, an output and drafts have 23 at the most."""
Logits = Callable[[list[int]], torch.Tensor]
"""[tokens, VOCAB] of a text."""
Allowed = Callable[[Sequence[int]], Sequence[int]]
"""The tokens that may follow an output."""


class Pair(NamedTuple):
    """A target, in its folder too, and the folder of a draft model that has not much in common with it."""

    target: ModelRunner
    folder: Path
    draft: Path


def joint_law(logits: Logits, length: int, params: dict[str, Any], allowed: Allowed | None = None) -> NDArray[Any]:
    """[VOCAB] * length: by the logits, `params` of SamplingParams and what a grammar allows."""
    joint = np.zeros((VOCAB,) * length)

    def follow(text: list[int], probability: float) -> None:
        if len(text) == length:
            joint[tuple(text)] = probability
            return
        mask = None if allowed is None else np.array([sum(1 << token for token in allowed(text))], np.uint32)
        row = SamplingRow(SamplingParams(max_tokens=length, **params), len(text), PROMPT, text, allowed=mask)
        chances = sampling_law(logits([*PROMPT, *text])[-1:].float(), [row])[0].double().numpy()
        for token in np.flatnonzero(chances):
            follow([*text, int(token)], probability * chances[token])

    follow([], 1.0)
    return joint / joint.sum()


def drawn(
    pair: Pair, rule: str, length: int, params: dict[str, Any], count: int, grammars: Grammars | None = None
) -> tuple[NDArray[np.int64], DrafterCounts]:
    """Of `count` requests, how often each text came, [VOCAB] * length, and what was counted of their drafts."""
    chosen = Settings(
        drafters=("draft_model",),
        rule=rule,
        max_budget=BUDGET,
        max_memory_bytes=64 << 20,
        controller="fixed",
        weights={"draft_model": pair.draft},
    )
    speculator = make_speculator(chosen, pair.target, AT_ONCE)
    requests = [
        Request(
            request_id=str(seed),
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=length + BUDGET, seed=seed, **params),
            deadline=0,
        )
        for seed in range(count)
    ]
    room = {"num_blocks": NUM_BLOCKS, "step_tokens": AT_ONCE * (1 + BUDGET), "num_seqs": AT_ONCE}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("speculation.crew.PATIENCE_STEPS", 10_000)  # however busy the machine is, no drafter stalls
        with engine_over(LateRunner(pair.target, 1), **room, grammars=grammars, speculator=speculator) as harness:
            found = harness.beginnings([EngineSequence(request) for request in requests], length)
    assert speculator.counters.switched_off == {}
    counts = np.zeros((VOCAB,) * length, np.int64)
    np.add.at(counts, tuple(np.array(found).T), 1)
    [of_drafts] = speculator.counters.by_drafter.values()
    return counts, of_drafts
