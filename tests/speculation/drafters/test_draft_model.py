"""A draft model: what it proposes is what it would say itself, whatever it has missed, forgotten or guessed before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.types import SamplingParams
from engine.sampler import sample
from engine.step import SamplingRow, StepBatch, StepOutput
from speculation.drafters.draft_model import CATCH_UP_TOKENS, DraftModel
from speculation.drafters.draft_model_check import BLOCK_SIZE
from speculation.drafters.draft_model_kv import DraftCache
from speculation.laws import DraftLaw
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch
from tests.engine.driver import tokens
from tests.speculation.drafters.draft_models import logprobs, made, path_tokens, propose, request

Logits = Callable[[Sequence[int]], torch.Tensor]


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture
def says(folder: Path, reference: Callable[[Path, Sequence[int]], torch.Tensor]) -> Logits:
    """Logits of every position, by Transformers."""
    return lambda text: reference(folder, text)


@pytest.fixture
def drafter(folder: Path) -> DraftModel:
    return made(folder)


def check_confidence(drafts: DraftBatch, index: int, text: Sequence[int], says: Logits) -> None:
    """Each node has the probability that the model gives its token after the text and the nodes above it."""
    assert drafts.confidence is not None
    own = drafts.confidence[drafts.offsets[index] : drafts.offsets[index + 1]]
    for path, chance in zip(path_tokens(drafts, index), own.tolist(), strict=True):
        law = logprobs(says([*text, *path[:-1]])[-1])
        assert chance == pytest.approx(float(law[path[-1]].exp()), rel=1e-3)


# --- what is likely ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [True, False])
def test_nodes_have_the_models_own_laws(folder: Path, says: Logits, branches: bool) -> None:
    drafter = made(folder, branches=branches)
    requests = [request(key, tokens(length, seed=key)) for key, length in enumerate((3, 40, 17, 100))]
    drafts = propose(drafter, requests, 12)
    assert (drafts.lengths > 1).all()
    assert bool(drafts.chains.all()) is not branches
    for index, one in enumerate(requests):
        check_confidence(drafts, index, one.token_ids, says)


def greedy(text: Sequence[int], count: int, says: Logits) -> list[int]:
    found = list(text)
    for _ in range(count):
        found.append(int(says(found)[-1].argmax()))
    return found[len(text) :]


def test_a_greedy_chain_is_what_the_model_would_say(folder: Path, says: Logits) -> None:
    drafter = made(folder, branches=False)
    requests = [request(key, tokens(length, seed=key)) for key, length in enumerate((3, 40, 17))]
    drafts = propose(drafter, requests, 8)
    for index, one in enumerate(requests):
        *_, deepest = path_tokens(drafts, index)
        assert deepest == greedy(one.token_ids, len(deepest), says)


def drawn(text: Sequence[int], count: int, seed: int, temperature: float, says: Logits) -> list[int]:
    """What the engine's sampler would, of a text whose output begins now."""
    found, params = list(text), SamplingParams(max_tokens=99, temperature=temperature, seed=seed)
    for position in range(count):
        ids, _ = sample(says(found)[-1:].float(), [SamplingRow(params, position)])
        found.append(int(ids[0]))
    return found[len(text) :]


def test_with_a_temperature_the_first_chain_is_what_the_sampler_would_draw_of_the_same_law(
    folder: Path, says: Logits
) -> None:
    drafter = made(folder, branches=False)
    requests = [request(key, tokens(9, seed=key), seed=key, temperature=0.5 + key) for key in range(4)]
    drafts = propose(drafter, requests, 5)
    assert (drafts.lengths > 2).all()
    for index, one in enumerate(requests):
        *_, deepest = path_tokens(drafts, index)
        assert deepest == drawn(one.token_ids, len(deepest), one.seed, one.temperature, says)


# --- what it has missed, forgotten or guessed ----------------------------------------------------------------------


def with_blocks(drafter: DraftModel, num_blocks: int) -> DraftModel:
    drafter._cache = DraftCache(num_blocks, BLOCK_SIZE)
    return drafter


class Life:
    """Requests that go on in whatever way."""

    def __init__(self, drafter: DraftModel, says: Logits) -> None:
        self.drafter, self.says = drafter, says
        self.requests: dict[int, DraftRequest] = {}

    def check(self, keys: Sequence[int], budget: int) -> DraftBatch:
        requests = [self.requests[key] for key in keys]
        drafts = propose(self.drafter, requests, budget)
        for index, one in enumerate(requests):
            check_confidence(drafts, index, one.token_ids, self.says)
        return drafts

    def accept(self, drafts: DraftBatch, index: int, key: int, depth: int, extra: Sequence[int]) -> None:
        """Emits so many tokens of a path, the last node's as far as it goes, and then others."""
        paths = list(path_tokens(drafts, index))
        path = paths[-1][:depth] if paths else []
        self.requests[key].token_ids.extend([*path, *extra])  # type: ignore[attr-defined]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["propose", "plain", "finish"]), st.integers(0, 7), st.integers(0, 4), st.integers(0, 96)
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=15, deadline=None)
@given(events=EVENTS, branches=st.booleans(), budget=st.integers(1, 9), blocks=st.integers(5, 40))
def test_whatever_happened_between_two_proposals_the_laws_are_those_of_the_text(
    folder: Path,
    reference: Callable[..., torch.Tensor],
    events: list[tuple[str, int, int, int]],
    branches: bool,
    budget: int,
    blocks: int,
) -> None:
    """Accepted and rejected drafts, steps without, requests that begin with a prefix of others, and too few blocks."""
    drafter = with_blocks(made(folder, branches=branches, law=DraftLaw.POINT_MASS), blocks)
    life = Life(drafter, lambda text: reference(folder, text))
    for number, (event, which, depth, token) in enumerate(events):
        keys = sorted(life.requests)
        if event == "propose" and keys:
            some = keys[which % len(keys) :]
            drafts = life.check(some, budget)
            for index, key in enumerate(some):
                life.accept(drafts, index, key, depth, [token])
        elif event == "finish" and keys:
            drafter.finish(keys[which % len(keys)])
            del life.requests[keys[which % len(keys)]]
        elif event == "plain" and keys and depth:
            life.requests[keys[which % len(keys)]].token_ids.extend(tokens(depth, seed=token))  # type: ignore[attr-defined]
        else:
            life.requests[number] = request(number, tokens(20 + 8 * which, seed=1))
    for key in list(life.requests):
        drafter.finish(key)
    assert drafter._cache.num_free_blocks == blocks


def steps_of(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the steps of its model, as they come."""
    rows, submit = list[int](), drafter._runner.submit

    def counting(batch: StepBatch) -> Future[StepOutput]:
        rows.append(len(batch.token_ids))
        return submit(batch)

    monkeypatch.setattr(drafter._runner, "submit", counting)
    return rows


def test_a_long_text_is_caught_up_with_over_several_steps_and_the_short_ones_do_not_wait(
    drafter: DraftModel, says: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = steps_of(drafter, monkeypatch)
    long, short = request(0, tokens(400, seed=1)), request(1, tokens(20, seed=2))
    proposals = 0
    while not (drafts := propose(drafter, [long, short], 4)).lengths[0]:
        assert drafts.lengths[1] > 0
        short.token_ids.append(5)  # type: ignore[attr-defined]
        proposals += 1
    assert proposals == 1
    assert max(rows) == CATCH_UP_TOKENS
    check_confidence(drafts, 0, long.token_ids, says)


def test_a_chain_costs_one_row_a_token_and_what_was_accepted_is_not_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = made(folder, branches=False, law=DraftLaw.IID)
    rows = steps_of(drafter, monkeypatch)
    one = request(0, tokens(20, seed=3))
    drafts = propose(drafter, [one], 4)
    assert drafts.num_nodes == 4
    assert rows == [20, 1, 1, 1]
    rows.clear()
    one.token_ids.extend([*drafts.tokens[:2].tolist(), 7])  # type: ignore[attr-defined]
    propose(drafter, [one], 4)
    assert rows == [1] * 4, "the first is the target's own token"


def test_a_prefix_that_another_request_of_the_scope_had_is_not_computed_again(
    drafter: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = steps_of(drafter, monkeypatch)
    text = tokens(64, seed=4)

    def computed(key: int, scope: str, *, remember: bool = True) -> int:
        rows.clear()
        propose(drafter, [request(key, [*text, key], scope=scope, remember=remember)], 1)
        drafter.finish(key)
        return rows[0]

    assert computed(0, "ours", remember=False) == 65
    assert computed(1, "ours") == 65, "nothing is kept of what may not be"
    assert computed(2, "ours") == 1
    assert computed(3, "theirs") == 65


def test_who_drafted_longest_ago_makes_room(folder: Path) -> None:
    drafter = with_blocks(made(folder), 6)
    first, second, third = (request(key, tokens(40, seed=key)) for key in range(3))
    assert propose(drafter, [first], 2).num_nodes
    assert propose(drafter, [second], 2).num_nodes
    assert propose(drafter, [third], 2).num_nodes
    assert set(drafter._cache._held) == {1, 2}
    together = propose(drafter, [first, second, third], 2)
    assert (together.lengths > 0).tolist() == [False, True, True], "those of one step leave each other alone"
    assert propose(drafter, [request(3, tokens(100, seed=9))], 2).num_nodes == 0


def test_texts_end_with_the_positions_that_the_model_was_made_for(make_checkpoint: Callable[..., Path]) -> None:
    drafter = made(make_checkpoint(max_position_embeddings=64), branches=False, law=DraftLaw.IID)
    assert propose(drafter, [request(0, tokens(60, seed=1))], 8).num_nodes == 4
    assert propose(drafter, [request(1, tokens(64, seed=1))], 8).num_nodes == 0
    assert propose(drafter, [request(2, tokens(90, seed=1))], 8).num_nodes == 0


def test_its_memory_is_what_it_was_given_at_most_and_goes_with_it(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for memory in (1 << 20, 4 << 20):
        assert made(folder, max_memory_bytes=memory).memory_bytes <= memory
    assert len(list(Path("/proc/self/fd").iterdir())) == before
