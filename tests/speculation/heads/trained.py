"""Heads for a tiny model in which most tokens have one that follows them, which can be learned in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.checkpoints.progress import Silent
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from speculation.drafters.base import Surroundings
from speculation.drafters.registry import make_drafter
from speculation.heads.distil import Distillation, Result, distil
from speculation.heads.drafter import HeadDrafter
from speculation.heads.new import Shape
from speculation.laws import DraftLaw
from speculation.rounds import DraftRequest, Observed
from tests.engine.driver import TINY, Driver, tokens

KINDS = ("eagle3", "hydra", "medusa")
BUDGET = 12
MEMORY = 8 << 20


def save_target(folder: Path) -> None:
    """Of the TINY shape: its output layer has the embedding of each token for the one that follows, and its layers
    disturb that a little."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.12)
        embedding = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight[torch.randperm(len(embedding))] = embedding
    model.save_pretrained(folder)


PROMPTS = [tokens(6 + n % 9, seed=n) for n in range(40)]


def distilled(kind: str, runner: ModelRunner, out: Path, *, steps: int = 80, start: Path | None = None) -> Result:
    out.mkdir(exist_ok=True)
    wanted = Distillation(
        kind=kind,  # type: ignore[arg-type]
        shape=Shape(draft_vocab_size=80, depth=3),
        start=start,
        max_tokens=24,
        learning_rate=3e-2,
        steps=steps,
    )
    return distil(runner, PROMPTS, (), wanted, out, Silent())


def made(
    kind: str,
    runner: ModelRunner | GroupRunner,
    folder: Path,
    *,
    branches: bool = True,
    memory: int = MEMORY,
    requests: int = 8,
) -> HeadDrafter:
    shared = runner.vocabulary()
    drafter = make_drafter(
        kind,
        Surroundings(
            vocab_size=TINY["vocab_size"],
            max_budget=BUDGET,
            max_requests=requests,
            max_memory_bytes=memory,
            law=DraftLaw.POINT_MASS,
            branches=branches,
            weights=folder,
            embedding=shared.embedding,
            output=shared.output,
            num_layers=TINY["num_hidden_layers"],
            fingerprint=shared.fingerprint,
        ),
    )
    assert isinstance(drafter, HeadDrafter)
    return drafter


def request(key: int, token_ids: list[int]) -> DraftRequest:
    return DraftRequest(key, token_ids, 1, 0, 0.0)


def seen(runner: ModelRunner | GroupRunner, token_ids: list[int], taps: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Hidden states of all tokens but the last: what the target has computed when that is the root."""
    driver = Driver(runner)  # type: ignore[arg-type]
    return driver.run([(driver.new(len(token_ids)), token_ids[:-1])], taps=taps).taps


def told(drafter: HeadDrafter, one: DraftRequest, taps: dict[int, torch.Tensor], first: int, end: int) -> None:
    """Of the rows from `first` to `end`."""
    rows = {layer: tap[first:end] for layer, tap in taps.items()}
    drafter.absorb([one], Observed(np.array([0, end - first]), np.arange(first, end), rows))
