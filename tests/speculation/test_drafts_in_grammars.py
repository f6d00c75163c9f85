"""Drafts and the grammars of their requests: what is ruled out goes, unless it was drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from core.types import Grammar, GrammarKind
from engine.sequence import Sequence as EngineSequence
from engine.structured.constraint import Constraint
from engine.structured.grammars import Grammars
from speculation.grammars import follow_grammars
from speculation.laws import DraftLaw
from speculation.tree import ROOT, DraftBatch
from tests.engine.late import LateRunner, engine_over
from tests.engine.structured import world as structured
from tests.speculation.prompting import Prompter, in_batch

WRONG = 9


class NoNine:
    """Allows all tokens but WRONG. What it allows next is named after the tokens so far."""

    allowed = np.array([0], np.uint32)

    def look_along(self, tokens: Sequence[int], parents: Sequence[int]) -> list[NDArray[np.uint32] | None]:
        found: list[NDArray[np.uint32] | None] = []
        for token, parent in zip(tokens, parents, strict=True):
            above = self.allowed if parent == ROOT else found[parent]
            found.append(None if above is None or token == WRONG else above * 10 + np.uint32(token))
        return found


def followed(law: DraftLaw) -> tuple[list[list[int]], list[list[int] | None]]:
    """Tokens of each request, and the names of what is allowed after its rows."""
    free, bound = ([1, WRONG], [ROOT, 0]), ([1, WRONG, 3, 4, 5], [ROOT, ROOT, 0, 1, 2])
    drafts = DraftBatch(np.array(free[0] + bound[0]), np.array(free[1] + bound[1]), np.array([0, 2, 7]), law, "drafter")
    left, masks = follow_grammars(drafts, [None, cast("Constraint", NoNine())])
    tokens = [left.tokens[start:end].tolist() for start, end in zip(left.offsets, left.offsets[1:], strict=False)]
    return tokens, [None if of is None else [int(mask[0]) for mask in of] for of in masks]


def test_what_a_grammar_rules_out_is_not_verified_nor_what_hangs_from_it() -> None:
    assert followed(DraftLaw.POINT_MASS) == ([[1, WRONG], [1, 3, 5]], [None, [0, 1, 13, 135]])


@pytest.mark.parametrize("law", [law for law in DraftLaw if law is not DraftLaw.POINT_MASS])
def test_of_what_was_drawn_it_is_rejected_where_it_was_drawn(law: DraftLaw) -> None:
    """To leave it out would give its chance to the tokens that were drawn beside it."""
    assert followed(law) == ([[1, WRONG], [1, WRONG, 3, 5]], [None, [0, 1, 0, 13, 135]])


def test_grammars_are_followed_and_bend_no_text(tmp_path: Path) -> None:
    world = structured.World(structured.save_tokenizer(tmp_path))
    grammar = Grammar(GrammarKind.REGEX, "(ab|cd){3,9}x")
    requests = [world.request(f"r{i}", grammar if i % 2 else None, max_tokens=30, seed=i) for i in range(6)]
    found: list[list[list[int]]] = []
    drafter = Prompter(vocab=world.vocab_size)
    for speculator in (None, in_batch(drafter, vocab=world.vocab_size)):
        grammars = Grammars(tmp_path, world.vocab_size)
        with engine_over(LateRunner(world.runner, 1), grammars=grammars, speculator=speculator) as harness:
            texts = harness.outputs([EngineSequence(request) for request in requests])
        found.append([output.token_ids for output in texts])
        for request, output in zip(requests, texts, strict=True):
            drafter.outputs[tuple(request.prompt_token_ids)] = output.token_ids
            if request.sampling.grammar is not None:
                assert re.fullmatch(grammar.text, world.text(output))
    assert found[0] == found[1]
    assert any(len(round_.outcome.path) > 1 for round_ in drafter.seen)
