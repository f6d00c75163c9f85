"""The drafters that need no training, over texts that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.rounds import DraftRequest, Observed
from tests.speculation.drafters.replays import LOGPROBS, VOCAB, Replay, likely, made, paths, propose, request

ALL = ("hybrid", "prompt_lookup", "suffix", "token_recycling", "aded")
LOOKUPS, RECYCLERS = ("prompt_lookup", "suffix"), ("token_recycling", "aded", "hybrid")
EACH = pytest.mark.parametrize("name", ALL)

TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=9, max_size=40), min_size=1, max_size=4)


@EACH
@settings(max_examples=15, deadline=None)
@given(TEXTS, st.integers(1, 12), st.booleans(), st.sampled_from([0.0, 0.2]))
def test_what_is_proposed_is_trees_within_budget_and_floor(
    name: str, texts: list[list[int]], budget: int, branches: bool, floor: float
) -> None:
    replay = Replay(made(name, branches=branches), texts, 3)
    for drafts in replay.run(budget, floor):
        assert (drafts.lengths <= budget).all()
        assert branches or drafts.chains.all()
        assert drafts.confidence is not None
        assert ((drafts.confidence > 0) & (drafts.confidence <= 1.0 + 1e-6)).all()
        assert (drafts.path_products(drafts.confidence) >= floor - 1e-6).all()


@pytest.mark.parametrize("name", [name for name in ALL if name != "aded"])  # more simulations may look elsewhere
@settings(max_examples=15, deadline=None)
@given(TEXTS, st.integers(1, 6))
def test_the_first_nodes_are_the_tree_of_a_smaller_budget(name: str, texts: list[list[int]], less: int) -> None:
    replay = Replay(made(name), texts, 8)
    for _ in range(3):
        smaller, larger = (propose(replay.drafter, replay.requests, budget) for budget in (less, 12))
        pruned = larger.prune(np.full(len(texts), less))
        assert [paths(smaller, index) for index in range(len(texts))] == [
            paths(pruned, index) for index in range(len(texts))
        ]
        going = [one for one in replay.requests if len(one.token_ids) < len(texts[one.key])]
        if not going:
            break
        replay.step(going, larger.select([one.key for one in going]))


@EACH
@settings(max_examples=10, deadline=None)
@given(TEXTS)
def test_a_request_is_proposed_the_same_in_any_company(name: str, texts: list[list[int]]) -> None:
    replay = Replay(made(name), texts, 8)
    together = propose(replay.drafter, replay.requests, 6)
    alone = [propose(replay.drafter, [one], 6) for one in replay.requests]
    assert [paths(together, index) for index in range(len(texts))] == [paths(one) for one in alone]


@EACH
def test_the_same_history_proposes_the_same(name: str) -> None:
    texts = np.random.default_rng(0).integers(0, 6, (3, 60)).tolist()
    runs = [[(d.tokens.tolist(), d.parents.tolist()) for d in Replay(made(name), texts, 5).run(7)] for _ in range(2)]
    assert runs[0] == runs[1]


@EACH
def test_a_text_that_goes_in_circles_is_guessed(name: str) -> None:
    circle = [3, 1, 4, 1, 5, 9, 2, 6]
    replay = Replay(made(name), [circle * 20], 20)
    replay.run(8)
    assert replay.num_steps <= 45  # for 140 tokens


@EACH
def test_texts_that_are_too_short_to_know_anything_get_nothing_or_little(name: str) -> None:
    drafter = made(name)
    short = [request(0, [7]), request(1, [7, 8]), request(2, [])]
    for one in short[:2]:
        drafter.start(one)
    assert propose(drafter, short[:2], 5).num_requests == 2
    assert drafter.propose([], np.zeros(0, np.int64), 0.0).num_requests == 0


@EACH
def test_no_budget_is_no_draft(name: str) -> None:
    replay = Replay(made(name), [[1, 2] * 10], 20)
    assert propose(replay.drafter, replay.requests, 0).num_nodes == 0


@EACH
@pytest.mark.parametrize("memory", [10_000, 100_000])
def test_memory_is_bounded_whatever_comes(name: str, memory: int) -> None:
    drafter = made(name, memory=memory)
    before = drafter.memory_bytes
    rng = np.random.default_rng(1)
    for key in range(30):
        one = request(key, rng.integers(0, VOCAB, 400).tolist(), scope=str(key % 3), remember=key % 2 == 0)
        drafter.start(one)
        propose(drafter, [one], 5)
        if key % 4:
            drafter.finish(key)
    assert drafter.memory_bytes == before <= memory


# --- who sees what -------------------------------------------------------------------------------------------------

SECRET = [20, 21, 22, 23, 24, 25, 26]


def tell(name: str, scope: str, *, remember: bool = True) -> object:
    """A drafter that has decoded the secret twice for a request of the scope."""
    drafter = made(name)
    replay = Replay(drafter, [SECRET * 2 + [1]], 2, scope)
    replay.requests[0] = told = request(9, SECRET[:2], scope, remember=remember)
    drafter.finish(0)
    drafter.start(told)
    replay.texts = {9: SECRET * 2 + [1]}  # type: ignore[assignment]
    replay.run(4)
    drafter.finish(9)
    return drafter


def guesses(drafter: object, asker: DraftRequest) -> set[int]:
    drafter.start(asker)  # type: ignore[attr-defined]
    return set(propose(drafter, [asker], 10).tokens.tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in ALL if name != "prompt_lookup"])
def test_a_scope_learns_of_its_own_requests_only(name: str) -> None:
    assert 24 in guesses(tell(name, "ours"), request(10, SECRET[:4], "ours"))
    assert not guesses(tell(name, "ours"), request(10, SECRET[:4], "theirs"))


@EACH
def test_nothing_is_left_of_what_may_not_be_remembered(name: str) -> None:
    drafter = tell(name, "ours", remember=False)
    assert not guesses(drafter, request(10, SECRET[:4], "ours"))
    assert not guesses(drafter, request(9, SECRET[:4], "ours", remember=False))  # not even under its own key


def test_prompt_lookup_knows_no_other_request() -> None:
    assert not guesses(tell("prompt_lookup", ""), request(10, SECRET[:4]))


# --- what is learned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECYCLERS)
def test_what_the_target_found_likely_is_proposed_where_it_comes_again(name: str) -> None:
    drafter = made(name)
    one = request(0, [30, 7])
    drafter.start(one)
    drafter.absorb([one], Observed(np.array([0, 1]), np.array([1]), {}, likely(12)[None], LOGPROBS[None]))
    one.token_ids.extend([12, 30, 7])
    found = [path for path in paths(propose(drafter, [one], 8)) if len(path) == 1]
    assert {(token,) for token in likely(12)[:2].tolist()} <= set(found)


@EACH
def test_what_others_steps_emitted_is_read_before_the_next_proposal(name: str) -> None:
    drafter = made(name)
    one = request(0, [1, 2, 3])
    drafter.start(one)
    one.token_ids.extend([10, 11, 12, 13, 14, 10, 11, 12])
    assert paths(propose(drafter, [one], 2)) == [(13,), (13, 14)]


@pytest.mark.parametrize("name", LOOKUPS)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=40), st.data())
def test_how_a_text_came_does_not_matter_to_lookups(name: str, text: list[int], data: st.DataObject) -> None:
    whole, pieces = made(name), made(name)
    first = request(0, text)
    whole.start(first)
    one = request(0, text[:3])
    pieces.start(one)
    while len(one.token_ids) < len(text):
        one.token_ids.extend(text[len(one.token_ids) :][: data.draw(st.integers(1, 7))])
        propose(pieces, [one], 3)
    assert paths(propose(pieces, [one], 8)) == paths(propose(whole, [first], 8))


def test_of_continuations_the_one_of_the_longer_match_comes_first() -> None:
    text = [1, 2, 3, 4, 30, 9, 4, 31, 8, 4, 31, 1, 2, 3, 4]
    replay = Replay(made("prompt_lookup"), [text], len(text))
    assert paths(propose(replay.drafter, replay.requests, 8))[0] == (30,)


def test_of_equal_matches_the_more_frequent_continuation_comes_first() -> None:
    text = [1, 5, 6, 30, 2, 5, 6, 30, 3, 5, 6, 31, 4, 5, 6]
    for name in LOOKUPS:
        replay = Replay(made(name), [text], len(text))
        assert paths(propose(replay.drafter, replay.requests, 8))[0] == (30,)


@pytest.mark.parametrize(("name", "far"), [("suffix", 12), ("hybrid", 5)])
def test_a_long_answer_that_was_given_before_is_drafted_far(name: str, far: int) -> None:
    answer = np.random.default_rng(2).permutation(VOCAB).tolist()
    drafter = made(name)
    Replay(drafter, [answer], 4).run(1)
    drafter.finish(0)
    again = request(1, answer[:8])
    drafter.start(again)
    longest = max(paths(propose(drafter, [again], 30)), key=len)
    assert list(longest) == answer[8 : 8 + len(longest)]
    assert len(longest) >= far
