"""The joint law of several tokens over as many rounds as they take, with the random numbers that a worker uses; and
what goes wrong when one of the known traps is stepped into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.sampler import uniforms
from speculation.dice import KeyedDice, Stream
from speculation.laws import DraftLaw
from speculation.rules.registry import RULES
from speculation.tree import ROOT, DraftBatch
from tests.chi_square import p_value
from tests.speculation.played import LENGTH, TEXTS, Game, draw, game, likeliest

P_VALUE = 1e-9
"""Seeds are fixed, so this is no rate of false alarms: the tests pass or fail always."""
REQUESTS = 10_000
EXPECTED = TEXTS.texts.joint(LENGTH).ravel()

IID, WITHOUT_REPLACEMENT = DraftLaw.IID, DraftLaw.WITHOUT_REPLACEMENT


@pytest.mark.parametrize(
    ("rule", "law"),
    [(rule.name, law) for rule in RULES.values() if rule.lossless for law in sorted(rule.laws)],
)
def test_texts_follow_the_targets_law_across_rounds(rule: str, law: DraftLaw) -> None:
    requests = REQUESTS if RULES[rule].reads_laws else REQUESTS // 4  # the sampler's draws take longest
    assert p_value(game(RULES[rule], law).counts(requests), EXPECTED) > P_VALUE


def test_a_lossy_rule_is_noticed() -> None:
    assert p_value(game(RULES["typical"], IID).counts(REQUESTS), EXPECTED) < P_VALUE


# --- traps ---------------------------------------------------------------------------------------------------------


def top_children_scored_with_softmax_q() -> Game:
    return replace(game(RULES["tree"], WITHOUT_REPLACEMENT), choose=likeliest)


def siblings_pruned_by_value() -> Game:
    return replace(game(RULES["tree"], WITHOUT_REPLACEMENT), shape=(ROOT, ROOT, ROOT), reshape=without_the_unlikeliest)


def without_the_unlikeliest(drafts: DraftBatch, seen: NDArray[np.int64]) -> tuple[DraftBatch, NDArray[np.int64]]:
    assert drafts.q is not None
    q = drafts.q.of(np.arange(drafts.num_nodes), drafts.tokens).reshape(-1, 3)
    kept = np.arange(3) != q.argmin(1)[:, None]
    some = np.flatnonzero(kept.ravel())
    pruned = replace(
        drafts,
        tokens=drafts.tokens[some],
        parents=drafts.parents[some],
        offsets=drafts.offsets // 3 * 2,
        q=drafts.q.of_nodes(some),
    )
    return pruned, seen.reshape(-1, 4)[np.column_stack([np.ones(len(kept), np.bool_), kept])]


def drawn_in_bfloat16() -> Game:
    """By a draft as good as the target; the logits of a model may be this large."""

    def choose(_: Game, laws: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.int64]:
        logits = torch.tensor(np.log(laws) + 80.0).bfloat16()
        return draw(_, logits.double().softmax(-1).numpy(), u)

    return replace(game(RULES["chain"], IID), q=TEXTS, choose=choose)


def one_uniform_to_accept_and_to_draw() -> Game:
    class OneUniform(KeyedDice):
        def draw(self, requests: NDArray[np.int64], depths: NDArray[np.int64], laws: torch.Tensor) -> NDArray[np.int64]:
            u = self._uniforms(Stream.ACCEPT, requests, depths, 1)[:, 0]
            return draw(game(RULES["chain"], IID), laws.double().numpy(), u)

    return replace(game(RULES["chain"], IID), dice=OneUniform)


def one_uniform_to_draft_and_to_accept() -> Game:
    def numbers(seeds: list[int], positions: list[int], count: int) -> NDArray[np.float64]:
        return uniforms([seed + Stream.ACCEPT for seed in seeds], positions, count)

    return replace(game(RULES["chain"], IID), numbers=numbers)


def the_same_numbers_in_every_round() -> Game:
    return replace(game(RULES["chain"], IID), dice=lambda seeds, positions: KeyedDice(seeds, np.zeros_like(positions)))


def first_draft_token_committed_unverified() -> Game:
    def target(drafts: DraftBatch, laws: torch.Tensor) -> torch.Tensor:
        first = torch.from_numpy(drafts.tokens[drafts.offsets[:-1]])
        laws[drafts.root_rows] = torch.nn.functional.one_hot(first, laws.shape[1]).to(laws)
        return laws

    return replace(game(RULES["chain"], IID), target=target)


def bonus_from_the_row_before() -> Game:
    def target(drafts: DraftBatch, laws: torch.Tensor) -> torch.Tensor:
        leaves = np.flatnonzero(np.diff(drafts.child_starts)[drafts.rows] == 0)
        laws[drafts.rows[leaves]] = laws[drafts.parent_rows[leaves]]
        return laws

    return replace(game(RULES["chain"], IID), target=target)


TRAPS: tuple[Callable[[], Game], ...] = (
    top_children_scored_with_softmax_q,
    siblings_pruned_by_value,
    drawn_in_bfloat16,
    one_uniform_to_accept_and_to_draw,
    one_uniform_to_draft_and_to_accept,
    the_same_numbers_in_every_round,
    first_draft_token_committed_unverified,
    bonus_from_the_row_before,
)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_every_trap_is_noticed(trap: Callable[[], Game]) -> None:
    assert p_value(trap().counts(REQUESTS), EXPECTED) < P_VALUE
