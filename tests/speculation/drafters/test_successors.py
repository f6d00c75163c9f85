"""The cache of what follows contexts, against a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.drafters.contexts import PRIVATE, SHARED, Contexts, windows_at
from speculation.drafters.key_table import KeyTable
from speculation.drafters.successors import WIDTH, Successors

FADING = 0.5
NUM_CAME = 2
Lesson = tuple[int, list[tuple[int, float]]]

LESSONS = st.lists(
    st.lists(
        st.tuples(
            st.integers(1, 6),
            st.lists(
                st.tuples(st.integers(0, WIDTH - 1), st.sampled_from([0.25, 1.0])), min_size=NUM_CAME, max_size=NUM_CAME
            ),
        ),
        max_size=8,
    ),
    max_size=6,
)


def taught(memory: Successors, lessons: list[Lesson], owner: int = 1) -> None:
    keys = keys_of([key for key, _ in lessons])
    tokens = np.array([[token for token, _ in came] for _, came in lessons], np.int64).reshape(len(lessons), NUM_CAME)
    weights = np.array([[weight for _, weight in came] for _, came in lessons], np.float32).reshape(tokens.shape)
    memory.add(keys, np.full(len(keys), owner, np.uint64), tokens, weights)


def keys_of(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)


def known(memory: Successors, key: int, owner: int = 1) -> dict[int, float]:
    tokens, weights = memory.after(keys_of([key]), np.array([owner], np.uint64))
    return {token: weight for token, weight in zip(tokens[0].tolist(), weights[0].tolist(), strict=True) if weight}


@settings(max_examples=60, deadline=None)
@given(LESSONS)
def test_evidence_adds_up_and_fades(rounds: list[list[Lesson]]) -> None:
    memory, expected = Successors(1 << 16, FADING), dict[int, dict[int, float]]()
    for lessons in rounds:
        taught(memory, lessons)
        for key, came in lessons:
            of = expected[key] = {token: weight * FADING for token, weight in expected.get(key, {}).items()}
            for token, weight in came:
                of[token] = of.get(token, 0.0) + weight
    for key in range(1, 7):
        of = expected.get(key, {})
        found = known(memory, key)
        assert found == pytest.approx(of)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_only_the_heaviest_are_kept() -> None:
    memory = Successors(1 << 16, 1.0)
    for token in range(20):
        taught(memory, [(3, [(token, 1.0 + token % 10), (token, 0.5)])])
    assert set(known(memory, 3)) <= {*range(4, 10), *range(14, 20)}
    assert len(known(memory, 3)) == WIDTH


@settings(max_examples=30, deadline=None)
@given(LESSONS, LESSONS)
def test_owners_do_not_see_each_other(ours: list[list[Lesson]], theirs: list[list[Lesson]]) -> None:
    both, alone = Successors(1 << 16, FADING), Successors(1 << 16, FADING)
    for lessons in ours:
        taught(both, lessons, owner=1)
        taught(alone, lessons, owner=1)
    for lessons in theirs:
        taught(both, lessons, owner=2)
    # A key holds whose it is in Contexts; the same one here may drive out, but never show, what the other has.
    for key in range(1, 7):
        assert known(both, key, owner=1) in (known(alone, key, owner=1), {})
    both.forget(1)
    assert not any(known(both, key, owner=1) for key in range(1, 7))


def test_what_was_written_longest_ago_goes_first() -> None:
    memory = Successors(0, FADING)  # the smallest there is
    for key in range(1, 200):
        taught(memory, [(key, [(3, 0.5)] * 2)])
        taught(memory, [(7, [(5, 0.5)] * 2)])  # comes up again and again
    assert known(memory, 199) == {3: 1.0}
    assert known(memory, 7)[5] == pytest.approx(2.0)
    assert sum(bool(known(memory, key)) for key in range(1, 200)) <= 8


def test_more_keys_at_once_than_there_is_room_for_do_not_mix() -> None:
    memory = Successors(0, FADING)
    taught(memory, [(key, [(key % 20, 0.5)] * 2) for key in range(1, 100)])
    kept = {key: known(memory, key) for key in range(1, 100) if known(memory, key)}
    assert 0 < len(kept) <= 8
    assert all(of == {key % 20: 1.0} for key, of in kept.items())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(1, 50), max_size=12), max_size=8))
def test_rows_of_a_key_table_belong_to_one_key(batches: list[set[int]]) -> None:
    table, owner = KeyTable(16), np.uint64(3)
    for batch in batches:
        keys = np.sort(keys_of(sorted(batch)))
        rows, _ = table.claim(keys, np.full(len(keys), owner))
        there = rows[rows != table.nowhere]
        assert len(set(there.tolist())) == len(there)
        assert (table.find(keys, np.full(len(keys), owner)) == rows).all()


# --- keys ----------------------------------------------------------------------------------------------------------

CONTEXTS = Contexts((1, 2, 2), (SHARED, SHARED, PRIVATE))


def key(text: list[int], owners: tuple[int, int] = (1, 2)) -> list[int]:
    windows = windows_at(text, len(text) - 1, len(text), CONTEXTS.width)
    return CONTEXTS.keys(windows, CONTEXTS.salts(np.array([owners], np.uint64)))[0].tolist()


def test_a_key_is_of_the_last_tokens_and_the_owner() -> None:
    assert key([9, 1, 2]) == key([8, 1, 2])
    assert key([1, 2])[0] == key([3, 2])[0]
    assert not {*key([1, 2])[1:]} & {*key([3, 2])[1:]}
    assert key([1, 2], (1, 2))[:2] != key([1, 2], (1, 3))[:2]
    assert key([1, 2], (1, 2))[2] == key([1, 2], (1, 3))[2]
    assert len({*key([1, 2]), *key([2, 1]), *key([0, 2]), *key([2])}) == 10  # the last token alone: thrice the same


def test_a_text_begins_with_nothing_that_a_token_could_be() -> None:
    assert windows_at([4, 5], -1, 2, 3).tolist() == [[-1, -1, -1], [-1, -1, 4], [-1, 4, 5]]
