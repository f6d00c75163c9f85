"""Requests of which some are under way: what their outputs are taken to be."""

from __future__ import annotations

import numpy as np
import pytest

from placement.arrived import Arrived

NOBODY = Arrived.of([])


def arrived(*outputs: tuple[int, bool], prompt: int = 100, cached: int = 0) -> Arrived:
    return Arrived.of((float(place), prompt, cached, tokens, ended) for place, (tokens, ended) in enumerate(outputs))


def completed(of: Arrived, earlier: Arrived = NOBODY) -> list[int]:
    return of.completed(earlier, np.random.default_rng(0)).output_tokens.tolist()


def test_requests_stand_in_the_order_in_which_they_came() -> None:
    found = Arrived.of([(2.0, 5, 0, 3, True), (1.0, 7, 2, 4, False)])
    assert (found.came_s.tolist(), found.prompts.tolist(), found.ended.tolist()) == ([1.0, 2.0], [7, 5], [False, True])
    both = found.followed_by(found[1:])
    assert (len(both), both.outputs.tolist(), len(NOBODY)) == (3, [4, 3, 3], 0)


def test_what_has_ended_is_as_it_is() -> None:
    assert completed(arrived((3, True), (9, True), (1, True))) == [3, 9, 1]


def test_who_is_under_way_ends_like_somebody_who_had_more() -> None:
    found = completed(arrived((5, True), (40, False), (50, True), (60, True), (55, False)))
    assert found[1] in (50, 60)
    assert found[4] == 60


def test_if_nobody_has_had_more_those_who_came_earlier_count_and_else_as_much_again_is_to_come() -> None:
    assert completed(arrived((5, True), (40, False)), arrived((30, True), (70, True), (90, False))) == [5, 70]
    assert completed(arrived((5, True), (40, False), (8, False)), arrived((30, True))) == [5, 80, 80]
    assert completed(arrived((0, False), (0, False))) == [1, 1]


def test_of_a_prompt_without_a_token_as_large_a_part_is_cached() -> None:
    one = Arrived.of([(0.0, 200, 150, 9, True), (1.0, 40, 0, 0, False), (2.0, 40, 10, 3, False)])
    assert one.completed(NOBODY, np.random.default_rng(0)).cached_tokens.tolist() == [150, 30, 10]


@pytest.mark.parametrize(("most", "off"), [(600, 0.06), (150, 0.15)])
def test_outputs_have_their_law_though_the_long_ones_have_not_ended(most: int, off: float) -> None:
    """Of 100 tokens on average, looked at when they have had up to so many: of what has ended the mean is too low."""
    rng, found, ended = np.random.default_rng(1), [], []
    for _ in range(60):
        outputs, so_far = 1 + rng.exponential(100.0, 300).astype(int), rng.uniform(0, most, 300).astype(int)
        seen = arrived(*((min(out, past), out <= past) for out, past in zip(outputs, so_far, strict=True)))
        found.append(np.mean(completed(seen)))
        ended.append(seen.outputs[seen.ended].mean())
    assert np.mean(found) == pytest.approx(100.0, rel=off)
    assert np.mean(ended) < 88.0
