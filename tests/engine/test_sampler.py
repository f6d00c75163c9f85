"""Tokens follow the law their parameters state, and nothing else in the batch matters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.types import SamplingParams
from engine.sampler import sample, sampling_law, uniforms
from engine.step import UNDRAWABLE, SamplingRow
from tests.chi_square import p_value

P_VALUE = 1e-6
"""Seeds are fixed, so this is no rate of false alarms: the tests pass or fail always."""


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1, "temperature": 1.0} | settings))


def row(position: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **settings: Any) -> SamplingRow:
    forbidden = settings.pop("forbidden", ())
    return SamplingRow(params(**settings), position, prompt, output, forbidden)


def law(logits: list[float], **settings: Any) -> list[float]:
    """The law stated in plain Python, one rule after the other."""
    p = params(**settings)
    scaled = [math.exp(x / p.temperature) for x in logits]
    probs = [x / sum(scaled) for x in scaled]
    probs = [x if x >= p.min_p * max(probs) else 0.0 for x in probs]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if p.top_k:
        for i in order[p.top_k :]:
            probs[i] = 0.0
    total, mass = sum(probs), 0.0
    for i in order:
        if mass >= p.top_p * total:
            probs[i] = 0.0
        mass += probs[i]
    return [x / sum(probs) for x in probs]


LOGITS = [1.2, 0.3, -0.5, 2.0, 0.0, -3.0]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 4, "top_p": 0.7, "temperature": 1.5},
    {"min_p": 0.1, "top_p": 0.9, "top_k": 5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_stated_law(settings: dict[str, Any]) -> None:
    n = 20_000
    tokens, _ = sample(torch.tensor([LOGITS] * n), [row(position=i, seed=7, **settings) for i in range(n)])
    assert p_value(np.bincount(tokens, minlength=len(LOGITS)), law(LOGITS, **settings)) > P_VALUE


def test_the_chi_square_notices_a_slightly_wrong_law() -> None:
    n = 20_000
    tokens, _ = sample(torch.tensor([LOGITS] * n), [row(position=i, seed=7, temperature=1.1) for i in range(n)])
    assert p_value(np.bincount(tokens, minlength=len(LOGITS)), law(LOGITS)) < P_VALUE


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_law_is_the_one_stated_to_float_precision(settings: dict[str, Any]) -> None:
    got = sampling_law(torch.tensor([LOGITS]), [row(**settings)])[0].tolist()
    assert got == pytest.approx(law(LOGITS, **settings), abs=1e-6)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12), st.integers(0, 12), st.floats(0.01, 1.0))
def test_truncation_always_leaves_the_most_likely_token(logits: list[float], top_k: int, top_p: float) -> None:
    p = sampling_law(torch.tensor([logits]), [row(top_k=top_k, top_p=top_p, min_p=0.3)])[0]
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert p[int(torch.tensor(logits).argmax())] > 0


def test_a_token_depends_on_seed_and_position_and_on_nothing_else_in_the_batch() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    rows = [row(position=i, seed=i // 2, temperature=0.9, top_p=0.95) for i in range(8)]
    together = sample(logits, rows)[0].tolist()
    assert together == [int(sample(logits[i : i + 1], [rows[i]])[0][0]) for i in range(8)]
    mixed = [rows[0], row(temperature=0.0), None, rows[3]]
    got = sample(logits[:4], mixed)[0].tolist()
    assert got == [together[0], int(logits[1].argmax()), -1, together[3]]


def test_neighbouring_seeds_and_positions_have_nothing_in_common() -> None:
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200))
    u = uniforms(seeds.ravel().tolist(), positions.ravel().tolist(), 3).reshape(200, 200, 3)
    assert p_value(np.histogram(u, 20, (0, 1))[0], [1 / 20] * 20) > P_VALUE
    for shifted in (u[1:] - u[:-1], u[:, 1:] - u[:, :-1], u[..., 1:] - u[..., :-1], u[:-1, :, 1:] - u[1:, :, :-1]):
        assert p_value(np.histogram(shifted % 1.0, 20, (0, 1))[0], [1 / 20] * 20) > P_VALUE


def test_seeds_may_be_negative_and_large() -> None:
    u = uniforms([-1, 2**63 - 1, -(2**63), 2**64 - 1], range(4), 5)
    assert ((u > 0) & (u < 1)).all()
    assert (uniforms([-1], [0], 9)[:, :5] == u[:1]).all()


def test_greedy_takes_the_best_and_ignores_the_seed() -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    assert sample(logits, [row(temperature=0.0, seed=1), row(temperature=0.0, seed=2)])[0].tolist() == [3, 2]


def scores(logits: list[float], of: SamplingRow) -> list[float]:
    """What bias and penalties make of the logits, up to a constant: from the logarithm of the law at temperature 1."""
    log = sampling_law(torch.tensor([logits]), [of])[0].log()
    return (log - log[-1]).tolist()


def test_penalties_and_bias_change_the_logits_as_stated() -> None:
    logits = [2.0, -2.0, 1.0, 0.0]
    seen = row(prompt=(0,), output=(1, 1), repetition_penalty=2.0)
    assert scores(logits, seen) == pytest.approx([1.0, -4.0, 1.0, 0.0], abs=1e-5)
    counted = row(output=(1, 1, 2), frequency_penalty=0.5, presence_penalty=0.25)
    assert scores(logits, counted) == pytest.approx([2.0, -3.25, 0.25, 0.0], abs=1e-5)
    biased = row(logit_bias={2: 3.0}, forbidden=(0,))
    assert scores(logits, biased) == pytest.approx([-math.inf, -2.0, 4.0, 0.0], abs=1e-5)
    both = row(output=(0,), logit_bias={0: 4.0}, repetition_penalty=2.0)
    assert scores(logits, both) == pytest.approx([3.0, -2.0, 1.0, 0.0], abs=1e-5), "bias comes before penalties"


def test_logits_are_left_as_they_are() -> None:
    logits = torch.tensor([LOGITS, LOGITS])
    sample(logits, [row(output=(1,), presence_penalty=1.0, top_k=2), row(logit_bias={0: 1.0}, temperature=0.0)])
    assert logits.tolist() == torch.tensor([LOGITS, LOGITS]).tolist()


def test_the_prompt_does_not_count_for_presence_and_frequency() -> None:
    assert scores([1.0, 1.0], row(prompt=(0, 0), presence_penalty=1.0, frequency_penalty=1.0)) == [0.0, 0.0]


def test_greedy_minds_penalties_bias_and_forbidden_tokens() -> None:
    rows = [row(temperature=0.0, **s) for s in ({"logit_bias": {4: 9.0}}, {"forbidden": (3,)}, {})]
    rows.append(row(temperature=0.0, output=(3,), presence_penalty=1.9))
    assert sample(torch.tensor([LOGITS] * 4), rows)[0].tolist() == [4, 0, 3, 0]


def test_the_law_of_a_greedy_row_is_one_token() -> None:
    law_of = sampling_law(torch.tensor([LOGITS, LOGITS]), [row(temperature=0.0, top_k=2), row()])
    assert law_of[0].tolist() == [0, 0, 0, 1, 0, 0]
    assert law_of[1].tolist() == pytest.approx(law(LOGITS), abs=1e-6)


def test_ties_with_the_last_token_kept_are_kept() -> None:
    tied = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert (sampling_law(tied, [row(top_k=2)])[0] > 0).tolist() == [True, True, True, False]
    assert (sampling_law(tied, [row(top_p=0.6)])[0] > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 0.9), (1.0, 0.9), (4.0, 0.99), (50.0, 0.999)])
def test_a_nucleus_is_found_however_many_tokens_it_has(temperature: float, top_p: float) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 3
    got = sampling_law(logits, [row(temperature=temperature, top_p=top_p), row(top_k=7), row()])
    for index, settings in enumerate(({"temperature": temperature, "top_p": top_p}, {"top_k": 7}, {})):
        want = torch.tensor(law(logits[index].tolist(), **settings))
        assert int((got[index] > 0).sum()) == pytest.approx(int((want > 0).sum()), abs=2)  # rounding of the sums
        assert torch.allclose(got[index], want, atol=1e-6)


def test_a_token_that_was_cut_off_is_never_drawn() -> None:
    n = 5000
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)).expand(n, -1)
    tokens, _ = sample(logits, [row(position=i, top_k=3) for i in range(n)])
    assert set(tokens.tolist()) == set(logits[0].topk(3).indices.tolist())


@pytest.mark.parametrize("uniform", [2.0**-53, 1.0 - 2.0**-53])
def test_the_ends_of_the_uniform_range_draw_possible_tokens(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "engine.sampler.uniforms", lambda seeds, positions, count: np.full((len(seeds), count), uniform)
    )
    tokens, _ = sample(torch.tensor([[9.0, 1.0, 1.5, 1.0, 9.0]]), [row(forbidden=(0, 4))])
    assert tokens.tolist() == [2]


@pytest.mark.parametrize("vocab", [255, 256, 257, 700])
def test_large_vocabularies_are_drawn_from_by_their_law(vocab: int) -> None:
    n = 40_000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3))
    tokens, _ = sample(logits.expand(n, -1), [row(position=i, seed=1) for i in range(n)])
    assert p_value(np.bincount(tokens, minlength=vocab), logits[0].double().softmax(-1).tolist()) > P_VALUE


def test_rounding_of_the_logits_hardly_ever_changes_a_draw() -> None:
    """Batches of other sizes round otherwise, by about 1e-5: about one draw of 50 thousand may change for that."""
    n, random = 20_000, torch.Generator().manual_seed(4)
    logits = torch.randn(1, 3000, generator=random).expand(n, -1)
    rows = [row(position=i, seed=2) for i in range(n)]
    changed = 0
    for start in range(0, n, 1000):
        part = logits[start : start + 1000]
        rounded = part + 1e-5 * torch.randn(part.shape, generator=random)
        here = rows[start : start + 1000]
        changed += int((sample(part, here)[0] != sample(rounded, here)[0]).sum())
    assert changed <= 3


def test_logprobs_are_of_the_models_own_law() -> None:
    logits = torch.tensor([LOGITS, LOGITS, LOGITS, LOGITS])
    rows = [row(temperature=0.0, logprobs=2, logit_bias={4: 100.0}), row(), None, row(temperature=0.0, logprobs=0)]
    tokens, (first, second, third, fourth) = sample(logits, rows)
    assert tokens[[0, 2, 3]].tolist() == [4, -1, 3]
    assert second is None
    assert third is None
    assert first is not None
    assert fourth is not None
    own = [math.log(p) for p in law(LOGITS)]
    assert first.logprob == pytest.approx(own[4], abs=1e-5)
    assert [token for token, _ in first.top] == [3, 0]
    assert [value for _, value in first.top] == pytest.approx([own[3], own[0]], abs=1e-5)
    assert fourth.logprob == pytest.approx(own[3], abs=1e-5)
    assert fourth.top == []


def test_no_logprobs_are_computed_unless_asked_for() -> None:
    assert sample(torch.tensor([LOGITS]), [row()])[1] == ()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"min_p": 0.1, "logprobs": 1}], ids=str)
def test_a_row_without_a_law_fails_alone(settings: dict[str, Any]) -> None:
    nan, whole = [1.0, math.nan, 0.0], [1.0, 3.0, 0.0]
    tokens, _ = sample(torch.tensor([nan, whole, whole]), [row(**settings), row(**settings), row(temperature=0.0)])
    assert tokens[0] == UNDRAWABLE
    assert tokens[1] in range(3)
    assert tokens[2] == 1


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}], ids=str)
def test_a_row_whose_tokens_are_all_forbidden_is_undrawable(settings: dict[str, Any]) -> None:
    tokens, _ = sample(torch.tensor([[1.0, 3.0]]), [row(forbidden=(0, 1), **settings)])
    assert tokens.tolist() == [UNDRAWABLE]
