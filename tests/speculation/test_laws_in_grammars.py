"""Texts that an engine draws with drafts under a grammar follow the law of plain sampling under it, over several tokens
and so over several rounds; and what goes wrong where drafts are pruned by what was drawn, or laws not normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import speculation.in_batch
import speculation.under_way
from core.types import Grammar, GrammarKind
from engine.sampler import sampling_law
from engine.step import SamplingRow
from engine.structured.constraint import Constraint
from engine.structured.grammars import Grammars
from speculation.grammars import Masks, follow_grammars
from speculation.laws import DraftLaw
from speculation.tree import DraftBatch
from tests.chi_square import p_value
from tests.speculation.drawn_texts import VOCAB, Pair, drawn, joint_law

LETTERS = "abcdefghijkl"
FOLLOWING = {"a": "bcdfhl", "b": "acdegk", "c": "aehijk", "d": "abefhi", "f": "bdgil", "g": "abcjkl"}
"""A text is of pairs: one of these letters, and one of those that may follow it. The draft knows nothing
of it, so most of what it draws is ruled out."""
GRAMMAR = Grammar(GrammarKind.REGEX, "({}){{3,9}}".format("|".join(f"{a}[{b}]" for a, b in FOLLOWING.items())))
LENGTH, REQUESTS = 3, 1100
"""The first token is the prompt's; the others, which are looked at, come from one round or two."""
P_VALUE = 1e-9
"""Seeds are fixed: the tests pass or fail always."""
PARAMS: dict[str, Any] = {"temperature": 1.5, "repetition_penalty": 1.2, "grammar": GRAMMAR}
Logits = Callable[[Path, list[int]], torch.Tensor]


def allowed(text: Sequence[int]) -> list[int]:
    last = LETTERS[text[-1]] if len(text) % 2 else ""
    return [LETTERS.index(letter) for letter in (FOLLOWING[last] if last else FOLLOWING)]


@pytest.fixture
def grammars(tmp_path: Path) -> Grammars:
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Grammars(tmp_path, VOCAB)


@pytest.fixture(scope="module")
def law(pair: Pair, reference: Logits) -> NDArray[np.float64]:
    """[VOCAB] * LENGTH"""
    return joint_law(partial(reference, pair.folder), LENGTH, PARAMS, allowed)


@pytest.mark.parametrize("rule", ["sampled", "chain", "tree", "k_seq"])
def test_drawn_texts_follow_the_law(pair: Pair, law: NDArray[np.float64], grammars: Grammars, rule: str) -> None:
    counts, of_drafts = drawn(pair, rule, LENGTH, PARAMS, REQUESTS, grammars)
    assert of_drafts.accepted_tokens > REQUESTS // 20
    assert p_value(counts.sum(0).ravel(), law.sum(0).ravel()) > P_VALUE


def leave_out(drafts: DraftBatch, constraints: Sequence[Constraint | None]) -> tuple[DraftBatch, list[Masks | None]]:
    """What is ruled out, whether it was drawn or not."""
    followed, masks = follow_grammars(replace(drafts, law=DraftLaw.POINT_MASS), constraints)
    return replace(followed, law=drafts.law), masks


def mask_laws(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """That is all, where they must be a law of what is left."""
    laws = sampling_law(logits, [replace(row, allowed=None) for row in rows])
    words = np.array([row.allowed if row.allowed is not None else [] for row in rows], np.uint32)
    return laws * torch.from_numpy(words >> np.arange(VOCAB, dtype=np.uint32) & 1)


@pytest.mark.parametrize(
    ("rule", "module", "name", "wrong"),
    [
        ("chain", speculation.under_way, "sampling_law", mask_laws),
        ("tree", speculation.in_batch, "follow_grammars", leave_out),
        ("k_seq", speculation.in_batch, "follow_grammars", leave_out),
    ],
    ids=["laws are not normalised", "what was drawn is pruned", "what was drawn independently is pruned"],
)
def test_what_may_go_wrong_is_found(
    pair: Pair,
    law: NDArray[np.float64],
    grammars: Grammars,
    rule: str,
    module: ModuleType,
    name: str,
    wrong: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, name, wrong)
    counts, _ = drawn(pair, rule, LENGTH, PARAMS, REQUESTS, grammars)
    assert p_value(counts.sum(0).ravel(), law.sum(0).ravel()) < P_VALUE


def test_the_law_has_something_to_tell(law: NDArray[np.float64]) -> None:
    likely = law[law > 0]
    assert len(likely) == 35 * len(FOLLOWING)
    assert 1.0 / (likely**2).sum() > 8  # as many texts as good as equally likely
