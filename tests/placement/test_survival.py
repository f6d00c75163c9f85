"""Lengths that became longer or shorter: how likely they are, how soon it is noticed, and how rarely by mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest

from placement.arrived import Arrived
from placement.drift import SizeWatch
from placement.live_log import LiveLog
from placement.survival import LEAST_ENDED, Survival

POWERS = np.array([1 / 16, 1 / 2, 2.0, 16.0])


def everything(lengths: np.ndarray) -> np.ndarray:
    return np.ones(len(lengths), np.bool_)


def test_the_share_above_a_length_is_that_in_closed_form_with_one_more_that_is_longer() -> None:
    """Of 6, 12 and 6 of 1, 2 and 3 tokens and one more, 19 are above 1, 7 above 2, 1 above 3."""
    known, lengths = np.repeat([1, 2, 3], [6, 12, 6]), np.array([1, 2, 3, 9])
    law = Survival(known, everything(known))
    law._off = 0.0
    above = np.array([25.0, 19.0, 7.0, 1.0]) / 25
    found = law.likelier(lengths, everything(lengths), POWERS)
    under_way = law.likelier(lengths, ~everything(lengths), POWERS)
    for row, power in enumerate(POWERS):
        squared = above**power
        expected = [*np.log((squared[:-1] - squared[1:]) / (above[:-1] - above[1:])), math.log(above[3] ** (power - 1))]
        assert found[row] == pytest.approx(expected)
        assert under_way[row] == pytest.approx(np.log(above[[1, 2, 3, 3]]) * (power - 1))


@pytest.mark.parametrize("ends", [0.1, 0.5, 1.0])
def test_lengths_of_the_same_law_are_likelier_under_no_other_on_average(ends: float) -> None:
    """The mean ratio is 1 at the most, whatever part of them has not ended, and little more if the law was learnt."""
    rng = np.random.default_rng(0)

    def seen(count: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = 1 + rng.lognormal(4.0, 0.8, count).astype(int)
        past = np.where(rng.random(count) < ends, 10**9, rng.integers(1, 300, count))
        return np.minimum(lengths, past), lengths <= past

    law = Survival(*seen(1000))
    assert np.exp(law.likelier(*seen(20_000), POWERS)).mean(axis=1).max() < 1.3


def test_where_few_are_known_to_have_ended_nothing_is_likelier() -> None:
    law = Survival(np.arange(50), np.arange(50) < LEAST_ENDED - 1)
    assert not law.likelier(np.array([1, 9]), everything(np.ones(2)), POWERS).any()


class Log(LiveLog):
    """Who came is as it is said."""

    def __init__(self, came: Arrived) -> None:
        self.came_ = came

    def arrived(self, since_s: float, until_s: float = math.inf) -> Arrived:
        return self.came_[slice(*np.searchsorted(self.came_.came_s, (since_s, until_s)))]


def requests(count: int, rng: np.random.Generator, prompt: float = 5.0, output: float = 4.0) -> Arrived:
    """One each 0.1 s, whose lengths vary about as much as their mean; all of them have ended."""
    lengths = (1 + rng.lognormal(mean, 0.8, count).astype(int) for mean in (prompt, output))
    prompts, outputs = lengths
    return Arrived(0.1 * np.arange(count), prompts, np.zeros(count, int), outputs, everything(outputs))


def looked(watch: SizeWatch, came: Arrived, known: int, step: int = 1) -> tuple[int, float] | None:
    """After how many requests it tells of a change, and since when."""
    watch.expect(float(came.came_s[known]), came[:known])
    for seen in range(known + 1, len(came) + 1, step):
        if (since_s := watch.look(float(came.came_s[seen - 1]), Log(came[:seen]))) is not None:
            return seen, since_s
    return None


@pytest.mark.parametrize("known", [30, 300])
def test_false_alarms_of_sizes_are_no_more_often_than_said(known: int) -> None:
    """One in 1000 requests at the most: of 40 times 300 there are 12, give or take three times 3.5."""
    rng = np.random.default_rng(2)
    told = [looked(SizeWatch(mean_requests=1000), requests(known + 300, rng), known, 5) for _ in range(40)]
    assert sum(one is not None for one in told) <= 22


@pytest.mark.parametrize(
    ("changed", "within"), [({"prompt": 8.0}, 8), ({"prompt": 2.0}, 8), ({"output": 7.0}, 8), ({"output": 1.0}, 9)]
)
def test_a_few_requests_of_quite_other_lengths_are_noticed_and_since_when_they_came(
    changed: dict[str, float], within: int
) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        after = requests(40, rng, **changed)
        came = requests(340, rng).followed_by(
            Arrived(34.0 + after.came_s, after.prompts, after.cached, after.outputs, after.ended)
        )
        found = looked(SizeWatch(), came, 300)
        assert found is not None
        assert 340 < found[0] <= 340 + within
        assert found[1] == pytest.approx(34.0, abs=0.31)


def test_long_outputs_are_noticed_before_one_of_them_ends() -> None:
    rng = np.random.default_rng(3)
    late = Arrived(
        34.0 + 0.1 * np.arange(8), np.full(8, 150), np.zeros(8, int), np.full(8, 1000), np.zeros(8, np.bool_)
    )
    found = looked(SizeWatch(), requests(340, rng).followed_by(late), 300)
    assert found is not None
    assert found[0] <= 345
